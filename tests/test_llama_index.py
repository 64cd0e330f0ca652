"""LlamaIndex's index and retriever over the vector store, and the store beside the framework's simple one."""

import asyncio

import numpy as np
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import ImageNode, IndexNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from rag import Meanwhile, embed, make_quantizer, random_metadata

from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.integrations.llama_index import RQMoEVectorStore

SIZE = 16
COUNT = 60


class Embedding(BaseEmbedding):
    """Different texts have different vectors, and nothing else decides on them."""

    def _get_text_embedding(self, text):
        return embed(text, SIZE)

    def _get_query_embedding(self, query):
        return embed(query, SIZE)

    async def _aget_query_embedding(self, query):
        return embed(query, SIZE)


@pytest.fixture(scope="module")
def quantizer():
    return make_quantizer(SIZE)


@pytest.fixture
def nodes():
    """Nodes of a dozen documents, with their embeddings."""
    made = []
    for number, metadata in enumerate(random_metadata(COUNT)):
        node = TextNode(id_=f"node {number}", text=f"text {number}", metadata=metadata)
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"document {number % 12}")
        node.embedding = embed(node.text, SIZE)
        made.append(node)
    return made


@pytest.fixture
def store(quantizer, nodes):
    store = RQMoEVectorStore(quantizer)
    assert store.add(nodes) == [node.node_id for node in nodes]
    return store


@pytest.fixture
def simple(quantizer, nodes):
    """The framework's store, of the vectors that the codes stand for."""
    restored = quantizer.decompress(quantizer.compress(np.array([node.embedding for node in nodes], np.float32)))
    simple = SimpleVectorStore()
    pairs = zip(nodes, restored.tolist(), strict=True)
    simple.add([node.model_copy(update={"embedding": embedding}) for node, embedding in pairs])
    return simple


def ask(text="text 3", top_k=7, **kwargs):
    return VectorStoreQuery(embed(text, SIZE), top_k, **kwargs)


def where(*conditions, condition=FilterCondition.AND):
    parts = [MetadataFilter(key=key, operator=operator, value=value) for key, operator, value in conditions]
    return MetadataFilters(filters=parts, condition=condition)


def test_queries_are_those_of_the_frameworks_store_over_the_reconstructions(store, simple, nodes):
    for text in ("text 3", "unseen"):
        found, expected = store.query(ask(text)), simple.query(ask(text))
        assert found.ids == expected.ids
        np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-5)
        assert [node.text for node in found.nodes] == [id.replace("node", "text") for id in found.ids]
        diverse = ask(text, mode=VectorStoreQueryMode.MMR)
        found = store.query(diverse, mmr_threshold=0.3, mmr_prefetch_k=COUNT)
        expected = simple.query(diverse, mmr_threshold=0.3)
        assert found.ids == expected.ids
        np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-5)
    assert len(store.query(diverse).ids) == 7
    original = nodes[3].model_copy(update={"embedding": None})
    assert store.get_nodes(["node 3"]) == [original]


CONDITIONS = [
    ("year", FilterOperator.EQ, 2020),
    ("lang", FilterOperator.EQ, "en"),
    ("lang", FilterOperator.NE, "en"),
    ("year", FilterOperator.GT, 2020),
    ("rating", FilterOperator.GTE, 1.5),
    ("year", FilterOperator.LT, 2020),
    ("rating", FilterOperator.LTE, 1.5),
    ("year", FilterOperator.IN, [2019, 2021]),
    ("lang", FilterOperator.NIN, ["en", "de"]),
    ("tags", FilterOperator.CONTAINS, "red"),
    ("tags", FilterOperator.ANY, ["red", "blue"]),
    ("tags", FilterOperator.ALL, ["red", "blue"]),
    ("ref_doc_id", FilterOperator.EQ, "document 5"),
    ("lang", FilterOperator.TEXT_MATCH, "e"),
    ("lang", FilterOperator.TEXT_MATCH_INSENSITIVE, "E"),
    ("tags", FilterOperator.IS_EMPTY, None),
    ("note", FilterOperator.IS_EMPTY, None),
    ("a.dotted key", FilterOperator.EQ, 1),
    ("missing", FilterOperator.NE, "en"),
    ("missing", FilterOperator.GT, 0),
]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_each_operator_selects_what_it_does_in_the_frameworks_store(store, simple, condition):
    query = ask(top_k=COUNT, filters=where(condition))
    found, expected = store.query(query), simple.query(query)
    assert found.ids == expected.ids
    assert {node.node_id for node in store.get_nodes(filters=query.filters)} == set(expected.ids)


@pytest.mark.parametrize("condition", list(FilterCondition))
def test_conditions_combine_as_in_the_frameworks_store(store, simple, condition):
    rng = np.random.default_rng(0)
    for _ in range(30):
        chosen = [CONDITIONS[place] for place in rng.choice(len(CONDITIONS), size=rng.integers(1, 4), replace=False)]
        query = ask(top_k=COUNT, filters=where(*chosen, condition=condition))
        assert store.query(query).ids == simple.query(query).ids
    empty = ask(top_k=COUNT, filters=MetadataFilters(filters=[], condition=condition))
    assert len(store.query(empty).ids) == COUNT


def test_nested_filters_node_ids_and_document_ids(store):
    either = where(("lang", FilterOperator.EQ, "en"), ("lang", FilterOperator.EQ, "de"), condition=FilterCondition.OR)
    late = where(("year", FilterOperator.GTE, 2020))
    both = MetadataFilters(filters=[either, late])
    found = store.query(ask(top_k=COUNT, filters=both)).nodes
    assert found and all(node.metadata["lang"] in ("en", "de") and node.metadata["year"] >= 2020 for node in found)
    assert set(store.query(ask(node_ids=["node 8", "node 9", "unknown"])).ids) == {"node 8", "node 9"}
    assert set(store.query(ask(top_k=COUNT, doc_ids=["document 4"])).ids) == {f"node {n}" for n in range(4, COUNT, 12)}
    assert set(store.query(ask(node_ids=["node 4", "node 5"], doc_ids=["document 4"])).ids) == {"node 4"}


@pytest.mark.parametrize("method", ["search", "get"])
@pytest.mark.parametrize("mode", [VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR])
def test_one_state_answers_while_others_remove(store, quantizer, tmp_path, mode, method):
    query = ask(mode=mode, node_ids=[f"node {number}" for number in range(20)])
    expected = store.query(query)
    store.client.save(tmp_path / "store")
    store.client.close()
    meanwhile = Meanwhile(tmp_path / "store", quantizer, method)
    assert RQMoEVectorStore(index=meanwhile.index).query(query) == expected
    assert meanwhile.removed and meanwhile.removed[0] not in meanwhile.index


def test_nodes_are_removed_by_document_by_id_and_by_filter(store):
    store.delete("document 0")
    assert len(store.client) == COUNT - 5 and store.query(ask("text 0", 1)).ids != ["node 0"]
    store.delete_nodes(["node 1", "unknown"])
    store.delete_nodes([])
    assert len(store.client) == COUNT - 6
    english = where(("lang", FilterOperator.EQ, "en"))
    kept = [node.node_id for node in store.get_nodes() if node.metadata.get("lang") != "en"]
    first = next(node.node_id for node in store.get_nodes(filters=english))
    store.delete_nodes([first, kept[0]], english)
    assert store.get_nodes([first, kept[0]])[0].node_id == kept[0] and len(store.client) == COUNT - 7
    store.delete_nodes(filters=english)
    assert [node.node_id for node in store.get_nodes()] == kept
    with pytest.raises(ValueError, match="clear"):
        store.delete_nodes()
    store.clear()
    assert store.get_nodes() == [] and store.query(ask()).ids == []


@pytest.mark.parametrize(("method", "given"), [("delete", ["document 0"]), ("delete_nodes", [["node 1"]])])
def test_a_delete_that_is_not_understood_deletes_nothing(store, method, given):
    narrower = {"filter": where(("lang", FilterOperator.EQ, "xx"))}
    with pytest.raises(TypeError, match="filter"):
        getattr(store, method)(*given, **narrower)
    with pytest.raises(TypeError, match="filter"):
        asyncio.run(getattr(store, f"a{method}")(*given, **narrower))
    assert len(store.client) == COUNT


def test_asynchronous_calls_give_what_synchronous_ones_do(store, quantizer, nodes, tmp_path):
    async def use():
        made = RQMoEVectorStore(quantizer, tmp_path / "store")
        await made.async_add(nodes)
        await made.adelete("document 0")
        await made.adelete_nodes(["node 1"])
        found = await made.aquery(ask()), await made.aget_nodes(["node 2"])
        await made.aclear()
        return found, len(made.client)

    store.delete("document 0")
    store.delete_nodes(["node 1"])
    assert asyncio.run(use()) == ((store.query(ask()), store.get_nodes(["node 2"])), 0)


def test_an_index_inserts_refreshes_deletes_and_retrieves(quantizer):
    hidden = {"excluded_embed_metadata_keys": ["even"]}
    documents = [Document(text=f"text {n}", id_=f"id {n}", metadata={"even": n % 2 == 0}, **hidden) for n in range(20)]
    context = StorageContext.from_defaults(vector_store=RQMoEVectorStore(quantizer))
    index = VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=Embedding())
    index.insert(Document(text="one more", id_="more"))
    index.delete_ref_doc("id 4")
    index.update_ref_doc(Document(text="another text", id_="id 5"))
    held = {node.text for node in index.vector_store.get_nodes()}
    assert held == {f"text {n}" for n in range(20) if n not in (4, 5)} | {"one more", "another text"}
    even = where(("even", FilterOperator.EQ, 1))
    found = index.as_retriever(similarity_top_k=5, filters=even).retrieve("text 6")
    assert len(found) == 5 and all(hit.metadata["even"] for hit in found)
    retriever = index.as_retriever(similarity_top_k=3)
    assert asyncio.run(retriever.aretrieve("text 6")) == retriever.retrieve("text 6")
    assert retriever.retrieve("text 6")[0].node.ref_doc_id == "id 6"
    diverse = index.as_retriever(vector_store_query_mode="mmr", similarity_top_k=3)
    assert len(diverse.retrieve("text 6")) == 3


def test_other_kinds_of_nodes_come_back_whole(quantizer):
    made = [
        IndexNode(id_="a", text="a summary", index_id="details", embedding=embed("a", SIZE)),
        ImageNode(id_="b", text="a picture", image_url="http://example.org/b.png", embedding=embed("b", SIZE)),
        TextNode(id_="c", text="", embedding=embed("c", SIZE), metadata={"nested": {"list": [1, {"a": None}]}}),
    ]
    store = RQMoEVectorStore(quantizer)
    store.add(made)
    assert store.get_nodes(["a", "b", "c"]) == [node.model_copy(update={"embedding": None}) for node in made]


def test_a_storage_context_persists_and_loads(quantizer, tmp_path):
    documents = [Document(text=f"text {n}", id_=f"id {n}") for n in range(20)]
    context = StorageContext.from_defaults(vector_store=RQMoEVectorStore(quantizer))
    index = VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=Embedding())
    expected = index.as_retriever(similarity_top_k=5).retrieve("text 6")
    context.persist(tmp_path / "storage")
    index.insert(Document(text="one more", id_="more"))
    context.persist(tmp_path / "storage")
    store = RQMoEVectorStore.from_persist_dir(tmp_path / "storage", quantizer=quantizer)
    context = StorageContext.from_defaults(vector_store=store, persist_dir=tmp_path / "storage")
    again = load_index_from_storage(context, embed_model=Embedding())
    assert again.as_retriever(similarity_top_k=5).retrieve("text 6") == expected
    assert again.as_retriever(similarity_top_k=1).retrieve("one more")[0].text == "one more"


def test_each_folder_that_a_store_is_persisted_to_holds_it(store, quantizer, nodes, tmp_path):
    context = StorageContext.from_defaults(vector_store=store)
    context.persist(tmp_path / "first")
    store.delete_nodes(["node 1"])
    context.persist(tmp_path / "second")
    store.client.close()
    opened = RQMoEVectorStore.from_persist_dir(tmp_path / "second", quantizer=quantizer)
    opened.delete_nodes(["node 2"])
    StorageContext.from_defaults(vector_store=opened).persist(tmp_path / "third")
    opened.client.close()
    for name, missing in (("first", ["node 1"]), ("second", ["node 1", "node 2"]), ("third", ["node 1", "node 2"])):
        again = RQMoEVectorStore.from_persist_dir(tmp_path / name, quantizer=quantizer)
        expected = [node.node_id for node in nodes if node.node_id not in missing]
        assert [node.node_id for node in again.get_nodes()] == expected
    with pytest.raises(ValueError, match="holds an index already"):
        StorageContext.from_defaults(vector_store=again).persist(tmp_path / "first")


def test_a_folder_without_a_collection_is_no_store(quantizer, tmp_path):
    with pytest.raises(ValueError, match="nowhere.* holds no index"):
        RQMoEVectorStore.from_persist_dir(tmp_path / "nowhere", quantizer=quantizer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no folder: name one"):
        RQMoEVectorStore(quantizer).persist()


def test_a_folder_is_opened_again(store, quantizer, nodes, tmp_path):
    made = RQMoEVectorStore(quantizer, tmp_path / "store")
    made.add(nodes)
    made.persist(str(tmp_path / "unused"))
    again = RQMoEVectorStore(quantizer, tmp_path / "store")
    assert again.query(ask()) == store.query(ask())
    assert not (tmp_path / "unused").exists()
    index = VectorStoreIndex.from_vector_store(again, embed_model=Embedding())
    assert [hit.text for hit in index.as_retriever(similarity_top_k=1).retrieve("text 9")] == ["text 9"]


def test_a_collection_that_was_not_made_here(quantizer):
    collection = RQMoEIndex(quantizer)
    texts = [f"text {n}" for n in range(20)]
    collection.add([embed(text, SIZE) for text in texts], texts=texts, metadata=[{"number": n} for n in range(20)])
    store = RQMoEVectorStore(index=collection)
    found = store.query(ask(top_k=1, filters=where(("number", FilterOperator.LT, 9))))
    assert found.nodes == store.get_nodes(["3"]) == [TextNode(id_="3", text="text 3", metadata={"number": 3})]
    store.delete_nodes(["3"])
    assert 3 not in collection


def test_errors(store, quantizer):
    with pytest.raises(ValueError, match="embedding"):
        store.add([TextNode(text="none")])
    with pytest.raises(ValueError, match="no embedding"):
        store.query(VectorStoreQuery(query_str="text"))
    with pytest.raises(ValueError, match="'default' or 'mmr', got 'hybrid'"):
        store.query(ask(mode=VectorStoreQueryMode.HYBRID))
    with pytest.raises(ValueError, match="another encoder"):
        store.query(VectorStoreQuery([0.5] * 7))
    with pytest.raises(ValueError, match=r"'tags'.*not supported"):
        store.query(ask(filters=where(("tags", FilterOperator.ANY, "red"))))
    with pytest.raises(ValueError, match="local folder"):
        import fsspec

        store.persist("somewhere", fs=fsspec.filesystem("memory"))
