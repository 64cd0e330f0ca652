"""Haystack's document store over compressed embeddings, and its retriever."""

import asyncio
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...index import Document as IndexDocument
from ...index import RQMoEIndex
from ...modeling_rqmoe import RQMoEModel
from .. import needs_extra
from ..common import open_index, own_ids
from .filters import to_filter
from .metadata import OWN, MetadataReports

with needs_extra("haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.dataclasses import ByteStream, SparseEmbedding
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy, FilterPolicy
    from haystack.document_stores.types.filter_policy import apply_filter_policy

DUPLICATES = {DuplicatePolicy.SKIP: "skip", DuplicatePolicy.OVERWRITE: "replace"}


class RQMoEDocumentStore(MetadataReports):
    """Documents with embeddings of some bytes each, for Haystack.

    Filters on `meta` and `id` are evaluated before scanning. Strings are compared as strings, so dates in ISO
    format must all be written alike. Documents without an embedding are stored, too, but never retrieved. A saved
    pipeline is loaded with `Pipeline.loads(..., allowed_modules=["rqmoe_hf.*"])`, as all components from outside
    Haystack are.

    Args:
        quantizer: The quantizer, or its bundled name, folder or Hub id: that of the embedder. May be left out if the
            folder holds a collection.
        folder: Where the collection is, or will be. Every change is on disk when the call returns. None keeps it in
            this process.
        metric: See `RQMoEIndex`, as all that follow; None is its default, or that of the collection in the folder.
        kind: How codes are scanned.
        num_lists: Inverted lists.
        num_codebooks: Codes kept of each vector.
        keep_floats: Keep the embeddings besides, to rank exactly.
        return_embedding: Give documents the embeddings that their codes restore.
        index: A collection that is open already, instead of quantizer and folder. Such a store can be serialised if
            the collection has a folder.

    Example:
    ```python
    from haystack import Document
    from rqmoe_hf.integrations.haystack import RQMoEDocumentStore, RQMoEEmbeddingRetriever

    store = RQMoEDocumentStore("minilm-384-32-bytes", "runs/haystack")
    store.write_documents([Document(content="a text", meta={"lang": "en"}, embedding=[0.1] * 384)])
    retriever = RQMoEEmbeddingRetriever(store, filters={"field": "meta.lang", "operator": "==", "value": "en"})
    retriever.run(query_embedding=[0.1] * 384)["documents"]
    ```
    """

    def __init__(
        self,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        folder: str | os.PathLike | None = None,
        metric: str | None = None,
        kind: str | None = None,
        num_lists: int | None = None,
        num_codebooks: int | None = None,
        keep_floats: bool | None = None,
        return_embedding: bool = True,
        index: RQMoEIndex | None = None,
    ):
        given = {"metric": metric, "kind": kind, "num_lists": num_lists, "num_codebooks": num_codebooks,
                 "keep_floats": keep_floats}  # fmt: skip
        self._settings = {name: value for name, value in given.items() if value is not None}
        self._folder = None if folder is None else str(folder)
        self._is_given = index is not None
        self.return_embedding = return_embedding
        self.index = open_index(quantizer, folder, index, self._settings)

    def to_dict(self) -> dict[str, Any]:
        """What makes the store again. Its documents are in its folder; without one they are not included.

        Raises:
            ValueError: If it was made of an open collection that has no folder.
        """
        quantizer = self.index.settings["quantizer"]["model"] or None
        folder = self._folder or (None if self.index.folder is None else str(self.index.folder))
        if self._is_given and folder is None:
            raise ValueError(
                "A store of a collection without a folder cannot be serialised: keep the collection in one first, by "
                "index.save(folder)."
            )
        settings = {"folder": folder, "return_embedding": self.return_embedding, **self._settings}
        return default_to_dict(self, quantizer=quantizer, **settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RQMoEDocumentStore":
        """The store that [`to_dict`] describes."""
        return default_from_dict(cls, data)

    # --- changes -------------------------------------------------------------------------------------------------

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Writes documents, all or none; returns how many. The policy NONE is FAIL.

        Raises:
            ValueError: If they are no documents.
            DuplicateDocumentError: If an id is there already, or comes twice, and the policy is FAIL.
        """
        if not isinstance(documents, Iterable) or not all(isinstance(document, Document) for document in documents):
            raise ValueError(f"Expected a list of Documents, got {documents!r}.")
        named = own_ids(self.index, [document.id for document in documents])
        if policy not in DUPLICATES and (len(set(named)) < len(named) or self.index.get(named, missing_ok=True)):
            raise DuplicateDocumentError(
                "Some ids are in the store already or come twice: give other ids, or the policy SKIP or OVERWRITE."
            )
        nothing = np.zeros(self.index.quantizer.config.hidden_size, np.float32)
        embeddings = [nothing if document.embedding is None else document.embedding for document in documents]
        written = self.index.add(
            embeddings,
            texts=[document.content or "" for document in documents],
            ids=named,
            metadata=[_to_metadata(document) for document in documents],
            duplicates=DUPLICATES.get(policy, "error"),  # type: ignore[arg-type]
        )
        return len(named) if policy == DuplicatePolicy.OVERWRITE else len(written)

    def delete_documents(self, document_ids: list[str]) -> None:
        """Removes documents; unknown ids are passed over."""
        self.index.remove(own_ids(self.index, document_ids, missing_ok=True), missing_ok=True)

    def delete_all_documents(self) -> None:
        """Removes everything."""
        self.index.remove(filter={})

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Removes the documents that match; returns how many."""
        return self.index.remove(filter=to_filter(filters))

    def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """Sets some metadata of the documents that match; returns how many."""
        found = list(self.index.documents(to_filter(filters)))
        ids, metadata = [document.id for document in found], [document.metadata | meta for document in found]
        return self.index.update(ids, metadata=metadata, missing_ok=True)  # some may have been removed meanwhile

    # --- reading -------------------------------------------------------------------------------------------------

    def count_documents(self) -> int:
        """How many documents there are."""
        return len(self.index)

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        """How many documents match."""
        return self.index.count(to_filter(filters))

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """The documents that match, in the order in which they were written.

        Raises:
            FilterError: If the filters are malformed, or on other fields than `meta` and `id`.
        """
        with self.index.reading():  # what one call finds must be there for the next
            found = list(self.index.documents(to_filter(filters)))
            return self._documents(found, [None] * len(found), self.return_embedding)

    def embedding_retrieval(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        scale_score: bool = False,
        return_embedding: bool | None = False,
    ) -> list[Document]:
        """The documents nearest to an embedding, best first.

        Args:
            query_embedding: The embedding.
            filters: Consider only documents that match.
            top_k: How many.
            scale_score: Bring scores into the range from 0 to 1, as Haystack's in-memory store does.
            return_embedding: Give the documents the embeddings that their codes restore; None: as the store does.
        """
        if top_k == 0:
            return []
        query, filter = np.asarray(query_embedding, np.float32), to_filter(filters)
        with_embeddings = self.return_embedding if return_embedding is None else return_embedding
        with self.index.reading():
            scores, ids = self.index.search(query, top_k, filter=filter)
            found = self.index.get(ids)
            if any(map(_lacks_embedding, found)):
                embedded = {f"{OWN}.embedded": {"$exists": False}}
                scores, ids = self.index.search(query, top_k, filter={"$and": [filter or {}, embedded]})
                found = self.index.get(ids)
            scaled = [self._scaled(score) if scale_score else score for score in scores.tolist()]
            return self._documents(found, scaled, with_embeddings)

    def _scaled(self, score: float) -> float:
        metric = self.index.settings["metric"]
        if metric == "cosine":
            return (score + 1) / 2
        return 1 / (1 - score) if metric == "l2" else 1 / (1 + math.exp(-score / 100))

    def _documents(
        self, found: list[IndexDocument], scores: Sequence[float | None], with_embeddings: bool
    ) -> list[Document]:
        embedded = [document.id for document in found if with_embeddings and not _lacks_embedding(document)]
        embeddings = dict(zip(embedded, self.index.reconstruct(embedded).tolist(), strict=True))
        return [_to_haystack(one, score, embeddings.get(one.id)) for one, score in zip(found, scores, strict=True)]

    def close(self) -> None:
        """Lets others write to the folder. The store cannot be used afterwards."""
        self.index.close()

    # --- asynchronous: the same in another thread ------------------------------------------------------------------

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """As [`write_documents`]."""
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        """As [`delete_documents`]."""
        await asyncio.to_thread(self.delete_documents, document_ids)

    async def delete_all_documents_async(self) -> None:
        """As [`delete_all_documents`]."""
        await asyncio.to_thread(self.delete_all_documents)

    async def delete_by_filter_async(self, filters: dict[str, Any]) -> int:
        """As [`delete_by_filter`]."""
        return await asyncio.to_thread(self.delete_by_filter, filters)

    async def update_by_filter_async(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """As [`update_by_filter`]."""
        return await asyncio.to_thread(self.update_by_filter, filters, meta)

    async def count_documents_async(self) -> int:
        """As [`count_documents`]."""
        return await asyncio.to_thread(self.count_documents)

    async def count_documents_by_filter_async(self, filters: dict[str, Any]) -> int:
        """As [`count_documents_by_filter`]."""
        return await asyncio.to_thread(self.count_documents_by_filter, filters)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """As [`filter_documents`]."""
        return await asyncio.to_thread(self.filter_documents, filters)

    async def embedding_retrieval_async(self, query_embedding: list[float], **kwargs: Any) -> list[Document]:
        """As [`embedding_retrieval`]."""
        return await asyncio.to_thread(self.embedding_retrieval, query_embedding, **kwargs)


@component
class RQMoEEmbeddingRetriever:
    """Retrieves the documents of an `RQMoEDocumentStore` that are nearest to the embedding of a query.

    Args:
        document_store: The store.
        filters: Consider only documents that match.
        top_k: How many documents.
        scale_score: Bring scores into the range from 0 to 1.
        return_embedding: Give documents the embeddings that their codes restore.
        filter_policy: Whether filters at run time replace these or are merged with them.

    Raises:
        TypeError: If the store is another one.
        ValueError: If top_k is below 1.
    """

    def __init__(
        self,
        document_store: RQMoEDocumentStore,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        scale_score: bool = False,
        return_embedding: bool = False,
        filter_policy: FilterPolicy = FilterPolicy.REPLACE,
    ):
        if not isinstance(document_store, RQMoEDocumentStore):
            raise TypeError(f"document_store must be an RQMoEDocumentStore, got {type(document_store).__name__}.")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        self.document_store = document_store
        self.filters = filters
        self.top_k = top_k
        self.scale_score = scale_score
        self.return_embedding = return_embedding
        self.filter_policy = filter_policy

    def to_dict(self) -> dict[str, Any]:
        """What makes the component again."""
        return default_to_dict(
            self,
            document_store=self.document_store,
            filters=self.filters,
            top_k=self.top_k,
            scale_score=self.scale_score,
            return_embedding=self.return_embedding,
            filter_policy=self.filter_policy.value,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RQMoEEmbeddingRetriever":
        """The component that [`to_dict`] describes."""
        policy = data["init_parameters"].get("filter_policy", FilterPolicy.REPLACE.value)
        parameters = data["init_parameters"] | {"filter_policy": FilterPolicy.from_str(policy)}
        return default_from_dict(cls, data | {"init_parameters": parameters})

    @component.output_types(documents=list[Document])
    def run(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        scale_score: bool | None = None,
        return_embedding: bool | None = None,
    ) -> dict[str, list[Document]]:
        """Retrieves documents; what is given here goes before the settings of the component."""
        found = self.document_store.embedding_retrieval(
            query_embedding,
            filters=apply_filter_policy(self.filter_policy, self.filters, filters),
            top_k=self.top_k if top_k is None else top_k,
            scale_score=self.scale_score if scale_score is None else scale_score,
            return_embedding=self.return_embedding if return_embedding is None else return_embedding,
        )
        return {"documents": found}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        scale_score: bool | None = None,
        return_embedding: bool | None = None,
    ) -> dict[str, list[Document]]:
        """As [`run`]."""
        return await asyncio.to_thread(self.run, query_embedding, filters, top_k, scale_score, return_embedding)


def _to_metadata(document: Document) -> dict[str, Any]:
    """The document's metadata, and what else the index has no place for."""
    own: dict[str, Any] = {}
    if document.embedding is None:
        own["embedded"] = False
    if document.content is None:
        own["content"] = False
    if document.blob is not None:
        own["blob"] = document.blob.to_dict()
    if document.sparse_embedding is not None:
        own["sparse_embedding"] = document.sparse_embedding.to_dict()
    return document.meta | {OWN: own} if own else document.meta


def _to_haystack(document: IndexDocument, score: float | None, embedding: list[float] | None) -> Document:
    meta = dict(document.metadata)
    own = meta.pop(OWN, {})
    blob, sparse = own.get("blob"), own.get("sparse_embedding")
    return Document(
        id=str(document.id),
        content=None if own.get("content") is False else document.text,
        blob=None if blob is None else ByteStream.from_dict(blob),
        meta=meta,
        score=score,
        embedding=embedding,
        sparse_embedding=None if sparse is None else SparseEmbedding.from_dict(sparse),
    )


def _lacks_embedding(document: IndexDocument) -> bool:
    return "embedded" in document.metadata.get(OWN, {})
