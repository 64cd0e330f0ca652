"""LlamaIndex's vector store over compressed embeddings."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..index import Document, RQMoEIndex
from ..modeling_rqmoe import RQMoEModel
from . import needs_extra
from .common import open_index, own_ids

with needs_extra("llama-index"):
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
    from llama_index.core.schema import BaseNode, MetadataMode, TextNode
    from llama_index.core.vector_stores.simple import DEFAULT_VECTOR_STORE, NAMESPACE_SEP
    from llama_index.core.vector_stores.types import (
        DEFAULT_PERSIST_DIR,
        DEFAULT_PERSIST_FNAME,
        BasePydanticVectorStore,
        FilterCondition,
        FilterOperator,
        MetadataFilter,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

OPERATORS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
    FilterOperator.CONTAINS: "$contains",
    FilterOperator.TEXT_MATCH: "$text",
    FilterOperator.TEXT_MATCH_INSENSITIVE: "$itext",
}


class RQMoEVectorStore(BasePydanticVectorStore):
    """Nodes with embeddings of some bytes each, for LlamaIndex.

    Nodes are stored whole, under their ids, and replace those that have them. Metadata filters, also nested ones, are
    evaluated before scanning. Query modes are the default one and MMR, which takes `mmr_threshold`, and
    `mmr_prefetch_factor` or `mmr_prefetch_k` for how many nodes it chooses from. `vector_store_kwargs` may also hold
    `shortlist`, `rescore` and `nprobe`, see `RQMoEIndex.search`.

    Args:
        quantizer: The quantizer, or its bundled name, folder or Hub id: that of the embedding model. May be left out
            if the folder holds a collection.
        folder: Where the collection is, or will be. Every change is on disk when the call returns, so there is
            nothing to persist. None keeps it in this process, until `StorageContext.persist` writes it to a folder.
        index: A collection that is open already, instead of quantizer and folder.
        settings: Further arguments of `RQMoEIndex`, such as `metric`, `num_codebooks` or `keep_floats`.

    Example:
    ```python
    from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from rqmoe_hf.integrations.llama_index import RQMoEVectorStore

    store = RQMoEVectorStore("minilm-384-32-bytes", "runs/llama-index")
    context = StorageContext.from_defaults(vector_store=store)
    nodes = [TextNode(text="a text"), TextNode(text="another")]
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=MockEmbedding(384))
    index.as_retriever(similarity_top_k=1).retrieve("a text")
    ```
    """

    stores_text: bool = True
    _index: RQMoEIndex = PrivateAttr()
    _keeps_itself: bool = PrivateAttr()  # in a folder that was named when it was made

    def __init__(
        self,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        folder: str | os.PathLike | None = None,
        *,
        index: RQMoEIndex | None = None,
        **settings: Any,
    ):
        super().__init__(stores_text=True)
        self._index = open_index(quantizer, folder, index, settings)
        self._keeps_itself = self._index.folder is not None

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex knows the class by."""
        return "RQMoEVectorStore"

    @property
    def client(self) -> RQMoEIndex:
        """The collection."""
        return self._index

    # --- changes -------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Adds nodes or replaces those with the same ids, all or none; returns their ids."""
        named = [node.node_id for node in nodes]
        self._index.add(
            [node.get_embedding() for node in nodes],
            texts=[node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes],
            ids=own_ids(self._index, named),
            metadata=[node_to_metadata_dict(node, remove_text=True) for node in nodes],
            duplicates="replace",
        )
        return named

    # What else is given is refused, a TypeError: passed over, a misspelt filter would remove too much.

    def delete(self, ref_doc_id: str) -> None:  # type: ignore[override]
        """Removes the nodes of a document."""
        self._index.remove(filter={"ref_doc_id": ref_doc_id})

    def delete_nodes(  # type: ignore[override]
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> None:
        """Removes the nodes that have one of these ids and match the filters; at least one must be given.

        Raises:
            ValueError: If neither is given.
        """
        if node_ids is None and filters is None:
            raise ValueError("Give node_ids or filters of what to remove; clear() removes everything.")
        if filters is None:
            self._index.remove(own_ids(self._index, node_ids or [], missing_ok=True), missing_ok=True)
        else:
            self._index.remove(filter=self._both(node_ids, filters))

    def clear(self) -> None:
        """Removes everything."""
        self._index.remove(filter={})

    def persist(self, persist_path: str = "", fs: Any = None) -> None:
        """Keeps the store in the folder `persist_path`, which [`from_persist_dir`] opens.

        A store of this process lives there from then on, and leaves a copy in other folders that it is persisted to
        later. One that was made with a folder is on disk anyway; it is only prepared for quick loading.

        Raises:
            ValueError: If the file system is not the local one, or the folder holds another collection.
        """
        if fs is not None and "file" not in np.atleast_1d(fs.protocol):
            raise ValueError(f"A collection is a local folder, but the file system is {fs.protocol}.")
        self._index.save(None if self._keeps_itself else persist_path or None)

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str = DEFAULT_PERSIST_DIR,
        namespace: str = DEFAULT_VECTOR_STORE,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
    ) -> "RQMoEVectorStore":
        """Opens what `StorageContext.persist(persist_dir)` wrote; give it back as the context's `vector_store`.

        Raises:
            ValueError: If there is no collection. A store that was made with a folder is opened by that folder.
        """
        folder = os.path.join(persist_dir, f"{namespace}{NAMESPACE_SEP}{DEFAULT_PERSIST_FNAME}")
        store = cls(index=RQMoEIndex.load(folder, quantizer))
        store._keeps_itself = False
        return store

    # --- reading -------------------------------------------------------------------------------------------------

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes that have one of these ids and match the filters; all if neither is given."""
        return [_to_node(document) for document in self._found(node_ids, filters)]

    def _found(self, node_ids: Sequence[str] | None, filters: MetadataFilters | None) -> list[Document]:
        if node_ids is not None and filters is None:
            return self._index.get(own_ids(self._index, node_ids, missing_ok=True), missing_ok=True)
        return list(self._index.documents(self._both(node_ids, filters)))

    def _both(self, node_ids: Sequence[str] | None, filters: MetadataFilters | None) -> dict[str, Any]:
        """A filter for the nodes that have one of these ids and match the filters."""
        parts = [to_filter(filters) or {}]
        if node_ids is not None:
            parts.append({"$id": {"$in": own_ids(self._index, node_ids, missing_ok=True)}})
        return {"$and": parts}

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes nearest to the query's embedding, among those that its filters, node and document ids leave.

        Raises:
            ValueError: If there is no embedding, or the mode is neither the default nor MMR.
        """
        if query.mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
            raise ValueError(f"The query mode must be 'default' or 'mmr', got {query.mode.value!r}.")
        if query.query_embedding is None:
            raise ValueError("The query has no embedding.")
        filter = to_filter(query.filters)
        if query.doc_ids:
            filter = {"$and": [filter or {}, {"ref_doc_id": {"$in": query.doc_ids}}]}
        search = self._diverse if query.mode == VectorStoreQueryMode.MMR else self._nearest
        with self._index.reading():  # what one call finds must be there for the next
            among = [found.id for found in self._found(query.node_ids, None)] if query.node_ids else None
            scores, ids = search(query, filter=filter, ids=among, **kwargs)
            nodes = [_to_node(found) for found in self._index.get(ids)]
        return VectorStoreQueryResult(nodes, [float(score) for score in scores], [node.node_id for node in nodes])

    def _nearest(self, query: VectorStoreQuery, **kwargs: Any) -> tuple[Sequence[float], Sequence[Any]]:
        scores, ids = self._index.search(np.asarray(query.query_embedding), query.similarity_top_k, **kwargs)
        return scores.tolist(), ids.tolist()

    def _diverse(
        self,
        query: VectorStoreQuery,
        mmr_threshold: float | None = None,
        mmr_prefetch_factor: float = 4,
        mmr_prefetch_k: int | None = None,
        **kwargs: Any,
    ) -> tuple[Sequence[float], Sequence[Any]]:
        """Chosen among more nodes than asked for by their reconstructed embeddings; scores are what MMR gives them."""
        wanted = max(query.similarity_top_k, mmr_prefetch_k or int(mmr_prefetch_factor * query.similarity_top_k))
        _, ids = self._index.search(np.asarray(query.query_embedding), wanted, **kwargs)
        threshold = query.mmr_threshold if mmr_threshold is None else mmr_threshold
        return get_top_k_mmr_embeddings(
            query.query_embedding,  # type: ignore[arg-type]
            list(self._index.reconstruct(ids)),  # type: ignore[arg-type]
            similarity_top_k=query.similarity_top_k,
            embedding_ids=ids.tolist(),
            mmr_threshold=threshold,
        )

    # --- asynchronous: the same in another thread ------------------------------------------------------------------

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As [`get_nodes`]."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As [`add`]."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **kwargs: Any) -> None:
        """As [`delete`]."""
        await asyncio.to_thread(self.delete, ref_doc_id, **kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> None:
        """As [`delete_nodes`]."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **kwargs)

    async def aclear(self) -> None:
        """As [`clear`]."""
        await asyncio.to_thread(self.clear)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As [`query`]."""
        return await asyncio.to_thread(self.query, query, **kwargs)


def to_filter(filters: MetadataFilters | MetadataFilter | None) -> dict[str, Any] | None:
    """LlamaIndex's filters in the index's language; see `rqmoe_hf.index.filters`.

    Raises:
        ValueError: If an operator has no counterpart.
    """
    if filters is None or (isinstance(filters, MetadataFilters) and not filters.filters):
        return None
    if isinstance(filters, MetadataFilters):
        parts = [to_filter(part) or {} for part in filters.filters]
        if filters.condition == FilterCondition.NOT:
            return {"$not": {"$or": parts}}
        return {"$or" if filters.condition == FilterCondition.OR else "$and": parts}
    value, operator = filters.value, filters.operator
    key = filters.key.replace(".", r"\.")  # to LlamaIndex a dot is a character like others
    if operator == FilterOperator.IS_EMPTY:
        return {key: {"$empty": True}}
    if operator in OPERATORS:
        return {key: {OPERATORS[operator]: value}}
    if operator in (FilterOperator.ANY, FilterOperator.ALL) and isinstance(value, list):
        return {"$or" if operator == FilterOperator.ANY else "$and": [{key: {"$contains": one}} for one in value]}
    raise ValueError(f"The filter {operator.value!r} on {filters.key!r} with {value!r} is not supported.")


def _to_node(document: Document) -> BaseNode:
    if "_node_content" in document.metadata:
        return metadata_dict_to_node(document.metadata, document.text)
    return TextNode(id_=str(document.id), text=document.text or "", metadata=document.metadata)
