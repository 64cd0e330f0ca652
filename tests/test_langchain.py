"""LangChain's own conformance suite over the vector store, and the store beside the framework's in-memory one."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests
from langchain_tests.integration_tests.vectorstores import EMBEDDING_SIZE
from rag import Meanwhile, make_quantizer, random_metadata
from sentence_transformers import SentenceTransformer

from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.integrations.langchain import RQMoEVectorStore

TEXTS = [f"text {number}" for number in range(60)]


@pytest.fixture(scope="module")
def quantizer():
    return make_quantizer(EMBEDDING_SIZE)


@pytest.fixture
def embedding():
    return DeterministicFakeEmbedding(size=EMBEDDING_SIZE)


@pytest.fixture
def store(quantizer, embedding):
    metadatas = random_metadata(len(TEXTS))
    return RQMoEVectorStore.from_texts(TEXTS, embedding, metadatas, ids=TEXTS, quantizer=quantizer)


@pytest.fixture
def exact(quantizer, embedding):
    """The framework's store, of the vectors that the codes stand for."""

    class Restored(DeterministicFakeEmbedding):
        def embed_documents(self, texts):
            vectors = np.array(super().embed_documents(texts), np.float32)
            return quantizer.decompress(quantizer.compress(vectors)).tolist()

    metadatas = random_metadata(len(TEXTS))
    return InMemoryVectorStore.from_texts(TEXTS, Restored(size=EMBEDDING_SIZE), metadatas, ids=TEXTS)


class TestConformance(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, quantizer):
        return RQMoEVectorStore(self.get_embeddings(), quantizer)


class TestConformanceOnDisk(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, quantizer, tmp_path):
        return RQMoEVectorStore(self.get_embeddings(), quantizer, tmp_path / "store", keep_floats=True)


def test_searches_are_those_of_the_frameworks_store_over_the_reconstructions(store, exact):
    for query in ("text 3", "unseen"):
        vector = store.embeddings.embed_query(query)
        expected = exact.similarity_search_with_score(query, k=7)
        found = store.similarity_search_with_score(query, k=7)
        assert [document for document, _ in found] == [document for document, _ in expected]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=1e-5)
        assert store.similarity_search_by_vector(vector, k=7) == exact.similarity_search_by_vector(vector, k=7)
        asked = {"k": 5, "fetch_k": 30, "lambda_mult": 0.3}
        expected = exact.max_marginal_relevance_search(query, **asked)
        assert store.max_marginal_relevance_search(query, **asked) == expected
        assert store.max_marginal_relevance_search_by_vector(vector, **asked) == expected


def test_asynchronous_calls_give_what_synchronous_ones_do(store, quantizer, embedding):
    async def ask():
        made = await RQMoEVectorStore.afrom_texts(
            TEXTS, embedding, random_metadata(len(TEXTS)), ids=TEXTS, quantizer=quantizer
        )
        asked = {"k": 5, "filter": {"lang": "en"}}
        return (
            await made.asimilarity_search("text 3", **asked),
            await made.asimilarity_search_with_score("text 3", **asked),
            await made.asimilarity_search_by_vector(embedding.embed_query("text 3"), **asked),
            await made.amax_marginal_relevance_search("text 3", **asked),
            await made.asimilarity_search_with_relevance_scores("text 3", **asked),
            await asyncio.gather(*(made.asimilarity_search(text, k=1) for text in TEXTS[:8])),
        )

    asked = {"k": 5, "filter": {"lang": "en"}}
    assert asyncio.run(ask()) == (
        store.similarity_search("text 3", **asked),
        store.similarity_search_with_score("text 3", **asked),
        store.similarity_search_by_vector(embedding.embed_query("text 3"), **asked),
        store.max_marginal_relevance_search("text 3", **asked),
        store.similarity_search_with_relevance_scores("text 3", **asked),
        [store.similarity_search(text, k=1) for text in TEXTS[:8]],
    )


@pytest.mark.parametrize(
    ("filter", "function"),
    [
        ({"lang": "fr"}, lambda metadata: metadata.get("lang") == "fr"),
        ({"year": {"$gte": 2019, "$lt": 2022}}, lambda metadata: 2019 <= metadata.get("year", 0) < 2022),
        ({"lang": {"$nin": ["en", "de"]}}, lambda metadata: metadata.get("lang") not in ("en", "de")),
        ({"tags": {"$contains": "red"}, "draft": True}, lambda m: "red" in m.get("tags", []) and m.get("draft")),
        ({"missing": 1}, lambda metadata: False),
    ],
)
def test_filters_as_dictionaries_and_functions(store, exact, filter, function):
    expected = exact.similarity_search("text 3", k=len(TEXTS), filter=lambda document: function(document.metadata))
    for given in (filter, lambda document: function(document.metadata)):
        assert store.similarity_search("text 3", k=len(TEXTS), filter=given) == expected
        diverse = store.max_marginal_relevance_search("text 3", k=3, filter=given)
        assert len(diverse) == min(3, len(expected)) and all(document in expected for document in diverse)
    assert store.as_retriever(search_kwargs={"k": 60, "filter": filter}).invoke("text 3") == expected


@pytest.mark.parametrize(
    ("metric", "least", "most"), [("cosine", 0.0, 1.0), ("l2", 0.0, 1.0), ("inner_product", None, None)]
)
def test_relevance_lies_between_0_and_1(quantizer, embedding, metric, least, most):
    store = RQMoEVectorStore.from_texts(TEXTS, embedding, quantizer=quantizer, metric=metric)
    if least is None:
        with pytest.raises(ValueError, match="relevance_score_fn"):
            store.similarity_search_with_relevance_scores("text 3")
        store.relevance_score_fn = lambda score: 1 / (1 + np.exp(-score))
        least, most = 0.0, 1.0
    found = store.similarity_search_with_relevance_scores("text 3", k=60)
    scores = [score for _, score in found]
    assert metric == "inner_product" or found[0][0].page_content == "text 3"
    assert scores == sorted(scores, reverse=True) and min(scores) >= least and max(scores) <= most
    above = {"search_type": "similarity_score_threshold", "search_kwargs": {"score_threshold": scores[2]}}
    retriever = store.as_retriever(**above)
    assert [document.page_content for document in retriever.invoke("text 3")] == [d.page_content for d, _ in found[:3]]


def test_a_folder_is_opened_again(quantizer, embedding, tmp_path):
    store = RQMoEVectorStore(embedding, quantizer, tmp_path / "store")
    store.add_texts(TEXTS, random_metadata(len(TEXTS)), ids=TEXTS)
    store.delete(TEXTS[:10])
    store.add_documents([Document("changed", id="text 30")])
    again = RQMoEVectorStore(embedding, quantizer, tmp_path / "store")
    assert again.get_by_ids(["text 0", "text 30"]) == [Document("changed", id="text 30")]
    assert again.similarity_search_with_score("text 3", k=9) == store.similarity_search_with_score("text 3", k=9)
    with pytest.raises(ValueError, match="metric='cosine', not 'l2'"):
        RQMoEVectorStore(embedding, quantizer, tmp_path / "store", metric="l2")


def test_a_store_of_this_process_is_kept_in_a_folder(store, quantizer, embedding, tmp_path):
    store.save(tmp_path / "store")
    again = RQMoEVectorStore(embedding, quantizer, tmp_path / "store")
    assert again.similarity_search("text 3", k=9) == store.similarity_search("text 3", k=9)


@pytest.mark.parametrize(
    ("search", "method"),
    [("similarity_search_with_score", "documents"), ("similarity_search_with_score", "search"),
     ("max_marginal_relevance_search", "get")],
)  # fmt: skip
def test_one_state_answers_while_others_remove(store, quantizer, embedding, tmp_path, search, method):
    asked = {"k": 5, "filter": lambda document: True}
    expected = getattr(store, search)("text 3", **asked)
    store.save(tmp_path / "store")
    store.index.close()
    meanwhile = Meanwhile(tmp_path / "store", quantizer, method)
    assert getattr(RQMoEVectorStore(embedding, index=meanwhile.index), search)("text 3", **asked) == expected
    assert meanwhile.removed and meanwhile.removed[0] not in meanwhile.index


def test_delete_by_ids_by_filter_and_everything(store):
    english = store.index.count({"lang": "en"})
    assert store.delete(filter={"lang": "en"}) and len(store.index) == len(TEXTS) - english > 0
    assert store.delete(["unknown"]) and len(store.index) == len(TEXTS) - english
    assert store.delete([]) and len(store.index) == len(TEXTS) - english
    assert store.delete() and len(store.index) == 0 and store.similarity_search("text 3") == []
    assert store.max_marginal_relevance_search("text 3") == []


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"where": {"lang": "en"}}, TypeError),
        ({"filters": {"lang": "en"}}, TypeError),
        ({"ids": ["text 3"], "where": {"lang": "en"}}, TypeError),
        ({"ids": ["text 3"], "filter": {"lang": "xx"}}, ValueError),
        ({"ids": [], "filter": {}}, ValueError),
    ],
)
def test_a_delete_that_is_not_understood_deletes_nothing(store, given, error):
    for delete in (store.delete, lambda **given: asyncio.run(store.adelete(**given))):
        with pytest.raises(error):
            delete(**given)
    assert len(store.index) == len(TEXTS)


def test_the_frameworks_indexing_keeps_the_store_in_step_with_a_source(quantizer, embedding):
    store = RQMoEVectorStore(embedding, quantizer)
    records = InMemoryRecordManager("texts")
    records.create_schema()
    documents = [Document(text, metadata={"source": text}) for text in TEXTS[:9]]
    options = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    assert index(documents, records, store, **options)["num_added"] == 9
    documents[0] = Document("another", metadata={"source": "text 0"})
    done = index(documents[:8], records, store, **options)
    assert (done["num_added"], done["num_deleted"], done["num_skipped"]) == (1, 2, 7)
    assert {found.text for found in store.index.documents()} == {"another", *TEXTS[1:8]}


def test_a_collection_with_integer_ids(quantizer, embedding):
    collection = RQMoEIndex(quantizer)
    collection.add(embedding.embed_documents(TEXTS), texts=TEXTS)
    store = RQMoEVectorStore(embedding, index=collection)
    assert store.similarity_search("text 3", k=1) == store.get_by_ids(["3"]) == [Document("text 3", id="3")]
    assert len(store.max_marginal_relevance_search("text 3", k=4)) == 4
    store.add_documents([Document("changed", id="3")])
    store.delete(["4"])
    assert collection.get([3])[0].text == "changed" and 4 not in collection
    store.delete(["4", "5", "unknown"])
    assert len(collection) == len(TEXTS) - 2 and store.get_by_ids(["9" * 30, "unknown"]) == []
    assert store.get_by_ids(["unknown", "6"]) == [Document("text 6", id="6")]
    with pytest.raises(ValueError, match="of type int"):
        store.add_texts(["one with a random id"])


@pytest.mark.parametrize("id", [0, -1, 7, -(2**63), 10**18, 2**63 - 1])
def test_integer_ids_are_the_strings_that_they_are_written_as(quantizer, embedding, id):
    collection = RQMoEIndex(quantizer)
    collection.add(embedding.embed_documents(["the one", "another"]), texts=["the one", "another"], ids=[id, 5])
    store = RQMoEVectorStore(embedding, index=collection)
    assert store.get_by_ids([str(id)]) == [Document("the one", id=str(id))]
    others = [f"0{id}", f"+{id}", f" {id}", f"{id}_0", str(id).replace("-", "-0"), str(2**63), str(-(2**63) - 1), "-0"]
    others = [other for other in others if other != str(id)]
    assert store.get_by_ids(others) == []
    store.delete(others)
    with pytest.raises(ValueError, match="of type int, got '007'"):
        store.add_texts(["new"], ids=["007"])
    assert len(collection) == 2
    store.delete([str(id)])
    assert [document.id for document in collection.documents()] == [5]


def test_a_sentence_transformers_model_embeds(encoder):
    model = SentenceTransformer(encoder)
    store = RQMoEVectorStore(model, "minilm-384-32-bytes")
    store.add_texts(["how do I read a csv file", "the weather in spring"])
    assert store.similarity_search("csv files", k=1)[0].page_content == "how do I read a csv file"
    np.testing.assert_allclose(store.embeddings.embed_query("a"), model.encode_query("a"), atol=1e-6)


def test_errors(quantizer, embedding, store, tmp_path):
    with pytest.raises(ValueError, match="quantizer='minilm-384-32-bytes'"):
        RQMoEVectorStore(embedding, folder=tmp_path / "new")
    with pytest.raises(ValueError, match="quantizer and folder already"):
        RQMoEVectorStore(embedding, quantizer, index=store.index)
    with pytest.raises(ValueError, match="another encoder"):
        RQMoEVectorStore(DeterministicFakeEmbedding(size=7), quantizer).add_texts(["a"])
    with pytest.raises(ValueError, match="for 2 vectors"):
        store.add_texts(["a", "b"], ids=["a"])
    with pytest.raises(ValueError, match="for 2 vectors"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(ValueError, match="JSON"):
        store.add_texts(["a"], [{"value": object()}])
    with pytest.raises(ValueError, match="one of"):
        store.similarity_search("text 3", filter={"year": {"$near": 2020}})


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [("langchain", "langchain_core", "langchain"), ("llama_index", "llama_index", "llama-index"),
     ("haystack", "haystack", "haystack")],
)  # fmt: skip
def test_without_the_framework_one_error_names_the_extra(module, framework, extra):
    code = f"""
import sys
import rqmoe_hf.integrations
sys.modules["{framework}"] = None
try:
    import rqmoe_hf.integrations.{module}
except rqmoe_hf.integrations.OptionalDependencyError as error:
    assert 'pip install "rqmoe-hf[{extra}]"' in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
