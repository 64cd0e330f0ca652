"""Haystack's own conformance suites over the document store, and the store beside the framework's in-memory one."""

import asyncio
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from haystack import Document, Pipeline, component
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import ByteStream, SparseEmbedding
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy, FilterPolicy
from haystack.errors import FilterError
from haystack.testing.document_store import (
    CountDocumentsByFilterTest,
    CountUniqueMetadataByFilterTest,
    DocumentStoreBaseExtendedTests,
    FilterableDocsFixtureMixin,
    GetMetadataFieldMinMaxTest,
    GetMetadataFieldsInfoTest,
    GetMetadataFieldUniqueValuesTest,
)
from haystack.testing.document_store_async import (
    CountDocumentsAsyncTest,
    CountDocumentsByFilterAsyncTest,
    CountUniqueMetadataByFilterAsyncTest,
    DeleteAllAsyncTest,
    DeleteByFilterAsyncTest,
    DeleteDocumentsAsyncTest,
    GetMetadataFieldMinMaxAsyncTest,
    GetMetadataFieldsInfoAsyncTest,
    GetMetadataFieldUniqueValuesAsyncTest,
    UpdateByFilterAsyncTest,
    WriteDocumentsAsyncTest,
)
from rag import Meanwhile, embed, make_quantizer, random_metadata

from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.integrations.haystack import RQMoEDocumentStore, RQMoEEmbeddingRetriever

SIZE = 16
COUNT = 60


@pytest.fixture(scope="module")
def wide():
    return make_quantizer(768, num_codebooks=2)  # the size of the embeddings in Haystack's tests


class SameButForTheEmbeddings:
    """Embeddings come back as their codes restore them."""

    @pytest.fixture(params=["in this process", "on disk"])
    def document_store(self, request, wide, tmp_path):
        return RQMoEDocumentStore(wide, None if request.param == "in this process" else tmp_path / "store")

    @staticmethod
    def assert_documents_are_equal(received, expected):
        assert [d.embedding is None for d in received] == [d.embedding is None for d in expected]
        assert [replace(d, embedding=None) for d in received] == [replace(d, embedding=None) for d in expected]


class TestConformance(
    SameButForTheEmbeddings,
    DocumentStoreBaseExtendedTests,
    CountDocumentsByFilterTest,
    CountUniqueMetadataByFilterTest,
    GetMetadataFieldMinMaxTest,
    GetMetadataFieldsInfoTest,
    GetMetadataFieldUniqueValuesTest,
):
    def test_write_documents(self, document_store):
        """The suite leaves it to each store what the default policy is."""
        document = Document(content="a text")
        assert document_store.write_documents([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            document_store.write_documents([document])


class TestConformanceAsync(
    SameButForTheEmbeddings,
    FilterableDocsFixtureMixin,
    CountDocumentsAsyncTest,
    CountDocumentsByFilterAsyncTest,
    CountUniqueMetadataByFilterAsyncTest,
    DeleteAllAsyncTest,
    DeleteByFilterAsyncTest,
    DeleteDocumentsAsyncTest,
    GetMetadataFieldMinMaxAsyncTest,
    GetMetadataFieldsInfoAsyncTest,
    GetMetadataFieldUniqueValuesAsyncTest,
    UpdateByFilterAsyncTest,
    WriteDocumentsAsyncTest,
):
    async def test_write_documents_async(self, document_store):
        document = Document(content="a text")
        assert await document_store.write_documents_async([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            await document_store.write_documents_async([document])


@pytest.fixture(scope="module")
def quantizer():
    return make_quantizer(SIZE)


@pytest.fixture
def documents():
    return [
        Document(id=f"id {n}", content=f"text {n}", meta=meta, embedding=embed(f"text {n}", SIZE))
        for n, meta in enumerate(random_metadata(COUNT))
    ]


@pytest.fixture
def store(quantizer, documents):
    store = RQMoEDocumentStore(quantizer)
    assert store.write_documents(documents) == COUNT
    return store


@pytest.fixture
def exact(quantizer, documents):
    """The framework's store, of the vectors that the codes stand for."""
    vectors = np.array([document.embedding for document in documents], np.float32)
    restored = quantizer.decompress(quantizer.compress(vectors)).tolist()
    exact = InMemoryDocumentStore(embedding_similarity_function="cosine", shared=False)
    exact.write_documents([replace(d, embedding=row) for d, row in zip(documents, restored, strict=True)])
    return exact


def found_ids(documents):
    return [document.id for document in documents]


def test_retrieval_is_that_of_the_frameworks_store_over_the_reconstructions(store, exact):
    for text in ("text 3", "unseen"):
        for asked in ({"top_k": 7}, {"top_k": 3, "scale_score": True, "return_embedding": True}):
            found = store.embedding_retrieval(embed(text, SIZE), **asked)
            expected = exact.embedding_retrieval(embed(text, SIZE), **asked)
            assert found_ids(found) == found_ids(expected)
            np.testing.assert_allclose([d.score for d in found], [d.score for d in expected], atol=1e-5)
            for one, other in zip(found, expected, strict=True):
                assert (one.embedding is None) == (other.embedding is None) and one.meta == other.meta
                assert one.embedding is None or np.allclose(one.embedding, other.embedding, atol=1e-5)
    assert store.embedding_retrieval(embed("text", SIZE), top_k=0) == []


CONDITIONS = [
    ("meta.year", "==", 2020),
    ("meta.lang", "!=", "en"),
    ("meta.lang", "==", None),
    ("meta.note", "!=", None),
    ("meta.rating", ">", 1.5),
    ("meta.rating", "<=", 1.5),
    ("meta.year", ">=", 2020),
    ("meta.year", "<", None),
    ("meta.year", "in", [2019, 2021]),
    ("meta.lang", "not in", ["en", "de"]),
    ("meta.draft", "==", True),
    ("lang", "==", "fr"),
    ("meta.missing", "!=", 1),
    ("meta.missing", ">", 1),
    ("id", "in", ["id 3", "id 8", "unknown"]),
    ("id", "!=", "id 3"),
]


def random_filters(rng, depth=0):
    """A condition, or a combination of some."""
    if depth == 2 or rng.random() < 0.4:
        field, operator, value = CONDITIONS[rng.integers(len(CONDITIONS))]
        return {"field": field, "operator": operator, "value": value}
    parts = [random_filters(rng, depth + 1) for _ in range(rng.integers(1, 4))]
    return {"operator": str(rng.choice(["AND", "OR", "NOT"])), "conditions": parts}


def test_filters_select_what_they_do_in_the_frameworks_store(store, exact):
    rng = np.random.default_rng(0)
    single = [{"field": field, "operator": operator, "value": value} for field, operator, value in CONDITIONS]
    for filters in [*single, *(random_filters(rng) for _ in range(60))]:
        expected = exact.filter_documents(filters)
        assert found_ids(store.filter_documents(filters)) == found_ids(expected), filters
        assert store.count_documents_by_filter(filters) == len(expected)
        asked = {"filters": filters, "top_k": COUNT}
        expected = exact.embedding_retrieval(embed("text 3", SIZE), **asked)
        assert found_ids(store.embedding_retrieval(embed("text 3", SIZE), **asked)) == found_ids(expected), filters


def test_filters_on_dates_in_iso_format(quantizer):
    days = [f"20{n:02}-0{n % 9 + 1}-01T12:00:00" for n in range(20)]
    documents = [Document(content=day, meta={"date": day}) for day in days]
    store, exact = RQMoEDocumentStore(quantizer), InMemoryDocumentStore(shared=False)
    for each in (store, exact):
        each.write_documents(documents)
    for value in (days[7], datetime.fromisoformat(days[7])):
        for operator in ("==", "!=", ">", ">=", "<", "<="):
            filters = {"field": "meta.date", "operator": operator, "value": value}
            assert found_ids(store.filter_documents(filters)) == found_ids(exact.filter_documents(filters))


@pytest.mark.parametrize(
    "filters",
    [
        {"field": "meta.year", "operator": "near", "value": 1},
        {"field": "meta.year", "operator": "==", "value": [2020]},
        {"field": "content", "operator": "==", "value": "text 3"},
        {"field": "meta.lang", "operator": ">", "value": "en"},
        {"operator": "XOR", "conditions": []},
        {"operator": "AND", "conditions": [{}]},
    ],
)
def test_filters_that_are_refused(store, filters):
    with pytest.raises(FilterError):
        store.filter_documents(filters)
    with pytest.raises(FilterError):
        store.embedding_retrieval(embed("text", SIZE), filters)


def test_documents_without_an_embedding_are_kept_but_never_retrieved(quantizer, documents):
    bare = [replace(document, embedding=None) for document in documents]
    store = RQMoEDocumentStore(quantizer)
    store.write_documents([*documents[:5], *bare[5:]])
    assert found_ids(store.filter_documents()) == found_ids(documents)
    for vector in (embed("text 30", SIZE), [1e-9] * SIZE):
        found = store.embedding_retrieval(vector, top_k=COUNT)
        assert set(found_ids(found)) == set(found_ids(documents[:5]))
    assert store.embedding_retrieval(vector, {"field": "id", "operator": "==", "value": "id 30"}) == []


def test_all_parts_of_a_document_come_back(quantizer):
    documents = [
        Document(content="", meta={"nested": {"list": [1, None, {"a": "ü"}]}}),
        Document(blob=ByteStream(b"\x00\xff", meta={"page": 1}, mime_type="image/png")),
        Document(content="a text", sparse_embedding=SparseEmbedding([1, 5], [0.5, 0.25])),
    ]
    store = RQMoEDocumentStore(quantizer)
    store.write_documents(documents)
    assert store.filter_documents() == documents


@pytest.mark.parametrize(
    ("method", "ask"),
    [
        ("documents", lambda store: store.filter_documents()),
        ("search", lambda store: store.embedding_retrieval(embed("text 3", SIZE), top_k=5)),
        ("get", lambda store: store.embedding_retrieval(embed("text 3", SIZE), top_k=5, return_embedding=True)),
    ],
)
def test_one_state_answers_while_others_remove(store, quantizer, tmp_path, method, ask):
    expected = ask(store)
    store.index.save(tmp_path / "store")
    store.close()
    meanwhile = Meanwhile(tmp_path / "store", quantizer, method)
    assert ask(RQMoEDocumentStore(index=meanwhile.index)) == expected
    assert meanwhile.removed and meanwhile.removed[0] not in meanwhile.index


def test_an_update_passes_over_what_was_removed_meanwhile(store, monkeypatch):
    listed = list(store.index.documents())

    def listing(filter):
        store.delete_documents(["id 7"])
        return iter(listed)

    monkeypatch.setattr(store.index, "documents", listing)
    assert store.update_by_filter({}, {"seen": True}) == COUNT - 1
    monkeypatch.undo()
    assert [document.meta for document in store.filter_documents()] == [
        one.metadata | {"seen": True} for one in listed if one.id != "id 7"
    ]


def test_a_batch_with_a_duplicate_is_written_whole_or_not_at_all(store, documents):
    new = Document(id="new", content="new")
    with pytest.raises(DuplicateDocumentError):
        store.write_documents([new, documents[3]])
    with pytest.raises(DuplicateDocumentError):
        store.write_documents([new, new], DuplicatePolicy.FAIL)
    assert store.count_documents() == COUNT
    assert store.write_documents([new, documents[3]], DuplicatePolicy.SKIP) == 1
    assert store.write_documents([new, documents[3]], DuplicatePolicy.OVERWRITE) == 2
    assert store.count_documents() == COUNT + 1
    assert store.write_documents([]) == 0


@component
class Embedder:
    @component.output_types(embedding=list[float])
    def run(self, text: str):
        return {"embedding": embed(text, SIZE)}


def test_pipelines_run_serialise_and_run_again(quantizer, documents, tmp_path):
    quantizer.save_pretrained(tmp_path / "quantizer")
    store = RQMoEDocumentStore(str(tmp_path / "quantizer"), tmp_path / "store", keep_floats=True)
    writing = Pipeline()
    writing.add_component("writer", DocumentWriter(store))
    assert writing.run({"writer": {"documents": documents}}) == {"writer": {"documents_written": COUNT}}

    asking = Pipeline()
    english = {"field": "meta.lang", "operator": "==", "value": "en"}
    retriever = RQMoEEmbeddingRetriever(store, english, top_k=4, filter_policy=FilterPolicy.MERGE)
    asking.add_component("embedder", Embedder())
    asking.add_component("retriever", retriever)
    asking.connect("embedder.embedding", "retriever.query_embedding")
    recent = {"field": "meta.year", "operator": ">=", "value": 2020}
    asked = {"embedder": {"text": "text 3"}, "retriever": {"filters": recent}}
    found = asking.run(asked)["retriever"]["documents"]
    assert len(found) == 4 and all(d.meta["lang"] == "en" and d.meta["year"] >= 2020 for d in found)

    trusted = {"allowed_modules": ["rqmoe_hf.*", __name__]}
    again = Pipeline.loads(asking.dumps(), **trusted)
    assert again.get_component("retriever").to_dict() == retriever.to_dict()
    assert again.run(asked)["retriever"]["documents"] == found
    written = asking.dumps().replace("filter_policy: merge", "filter_policy: replace")
    replaced = Pipeline.loads(written, **trusted)
    assert any(d.meta.get("lang") != "en" for d in replaced.run(asked)["retriever"]["documents"])
    assert asyncio.run(again.get_component("retriever").run_async(embed("text 3", SIZE), recent))["documents"] == found


def test_a_pipeline_that_runs_asynchronously(store):
    asking = Pipeline()
    asking.add_component("retriever", RQMoEEmbeddingRetriever(store, top_k=3, scale_score=True))
    asked = {"retriever": {"query_embedding": embed("text 3", SIZE)}}
    found = asyncio.run(asking.run_async(asked))["retriever"]["documents"]
    assert found == store.embedding_retrieval(embed("text 3", SIZE), top_k=3, scale_score=True)
    assert found == asyncio.run(store.embedding_retrieval_async(embed("text 3", SIZE), top_k=3, scale_score=True))


def test_a_folder_is_opened_again(store, quantizer, documents, tmp_path):
    made = RQMoEDocumentStore(quantizer, tmp_path / "store", metric="l2")
    made.write_documents(documents)
    again = RQMoEDocumentStore(quantizer, tmp_path / "store", return_embedding=False)
    assert again.filter_documents() == [replace(document, embedding=None) for document in documents]
    asked = {"top_k": 9, "scale_score": True}
    expected = made.embedding_retrieval(embed("text 3", SIZE), **asked)
    assert again.embedding_retrieval(embed("text 3", SIZE), **asked) == expected
    assert all(0 < document.score <= 1 for document in expected)
    made.close()
    assert again.write_documents(documents[:5], DuplicatePolicy.OVERWRITE) == 5
    with pytest.raises(ValueError, match="metric='l2', not 'cosine'"):
        RQMoEDocumentStore(quantizer, tmp_path / "store", metric="cosine")


def test_a_collection_that_was_not_made_here(quantizer):
    collection = RQMoEIndex(quantizer)
    texts = [f"text {n}" for n in range(20)]
    collection.add([embed(text, SIZE) for text in texts], texts=texts, metadata=[{"number": n} for n in range(20)])
    store = RQMoEDocumentStore(index=collection, return_embedding=False)
    small = {"field": "meta.number", "operator": "<", "value": 9}
    assert found_ids(store.embedding_retrieval(embed("text 3", SIZE), small, top_k=1)) == ["3"]
    assert store.filter_documents(small)[3] == Document(id="3", content="text 3", meta={"number": 3})
    store.delete_documents(["3"])
    assert 3 not in collection


@pytest.mark.parametrize("given", [True, False])
def test_a_store_is_serialised_with_the_folder_of_its_collection(quantizer, documents, tmp_path, given):
    quantizer.save_pretrained(tmp_path / "quantizer")
    named = str(tmp_path / "quantizer")
    if given:
        store = RQMoEDocumentStore(index=RQMoEIndex(named))
        with pytest.raises(ValueError, match=r"cannot be serialised.* index\.save\(folder\)"):
            store.to_dict()
    else:
        store = RQMoEDocumentStore(named)
        assert RQMoEDocumentStore.from_dict(store.to_dict()).count_documents() == 0
    store.write_documents(documents)
    store.index.save(tmp_path / "store")
    again = RQMoEDocumentStore.from_dict(store.to_dict())
    assert again.filter_documents() == store.filter_documents() and again.count_documents() == COUNT


def test_errors(store, quantizer):
    with pytest.raises(ValueError, match="another encoder"):
        store.write_documents([Document(content="a", embedding=[0.5] * 7)])
    with pytest.raises(ValueError, match="another encoder"):
        store.embedding_retrieval([0.5] * 7)
    with pytest.raises(ValueError, match="top_k"):
        store.embedding_retrieval(embed("text", SIZE), top_k=-1)
    with pytest.raises(ValueError, match="top_k"):
        RQMoEEmbeddingRetriever(store, top_k=0)
    with pytest.raises(TypeError, match="InMemoryDocumentStore"):
        RQMoEEmbeddingRetriever(InMemoryDocumentStore())
