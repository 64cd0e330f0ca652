"""LangChain's vector store over compressed embeddings."""

import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..index import Document as IndexDocument
from ..index import RQMoEIndex
from ..index.intake import EncodesTexts
from ..modeling_rqmoe import RQMoEModel
from . import needs_extra
from .common import open_index, own_ids

with needs_extra("langchain"):
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.runnables.config import run_in_executor
    from langchain_core.vectorstores import VectorStore
    from langchain_core.vectorstores.utils import maximal_marginal_relevance

Filter = dict[str, Any] | Callable[[Document], bool]


class EncoderEmbeddings(Embeddings):
    """A sentence-transformers model, or what else `RQMoEIndex` takes as an encoder, as LangChain's embeddings."""

    def __init__(self, encoder: EncodesTexts):
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embeds documents."""
        return np.asarray(self.encoder.encode_document(texts), np.float32).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        """Embeds a query."""
        return np.asarray(self.encoder.encode_query([text]), np.float32)[0].tolist()


class RQMoEVectorStore(VectorStore):
    """Documents with embeddings of some bytes each, for LangChain.

    Documents are added under their ids, replacing those that have them; without ids they get random ones. All searches
    take, besides what LangChain documents:

    - filter: Which documents to consider. A dictionary over the metadata, such as `{"year": {"$gte": 2020}}`, is
      evaluated before scanning (the language: `rqmoe_hf.index.filters`). A function of a `Document`, as
      `InMemoryVectorStore` takes it, is called for every document in the store.
    - shortlist, rescore, nprobe: see `RQMoEIndex.search`.

    Args:
        embedding: Embeds documents and queries: LangChain's embeddings or a sentence-transformers model, of the
            encoder that the quantizer was trained for.
        quantizer: The quantizer, or its bundled name, folder or Hub id. May be left out if the folder holds a
            collection.
        folder: Where the collection is, or will be. Every change is on disk when the call returns. None keeps it in
            this process.
        index: A collection that is open already, instead of quantizer and folder.
        relevance_score_fn: Brings scores into the range from 0 to 1. Default: negative cosines are 0.
        settings: Further arguments of `RQMoEIndex`, such as `metric`, `num_codebooks` or `keep_floats`.

    Example:
    ```python
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from rqmoe_hf.integrations.langchain import RQMoEVectorStore

    store = RQMoEVectorStore(DeterministicFakeEmbedding(size=384), "minilm-384-32-bytes", "runs/langchain")
    store.add_texts(["a text", "another"], metadatas=[{"lang": "en"}, {"lang": "fr"}])
    store.similarity_search("a text", k=1, filter={"lang": "en"})
    ```
    """

    def __init__(
        self,
        embedding: Embeddings | EncodesTexts,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        folder: str | os.PathLike | None = None,
        *,
        index: RQMoEIndex | None = None,
        relevance_score_fn: Callable[[float], float] | None = None,
        **settings: Any,
    ):
        self.embedding = embedding if isinstance(embedding, Embeddings) else EncoderEmbeddings(embedding)
        self.index = open_index(quantizer, folder, index, settings)
        self.relevance_score_fn = relevance_score_fn

    @property
    def embeddings(self) -> Embeddings:
        """What embeds documents and queries."""
        return self.embedding

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | EncodesTexts,
        metadatas: list[dict] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> "RQMoEVectorStore":
        """A store with these texts; `kwargs` are those of the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | EncodesTexts,
        metadatas: list[dict] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> "RQMoEVectorStore":
        """As [`from_texts`]."""
        store = await run_in_executor(None, cls, embedding, **kwargs)
        await store.aadd_texts(texts, metadatas, ids=ids)
        return store

    def save(self, folder: str | os.PathLike | None = None) -> None:
        """Prepares the folder for quick loading, or keeps a store of this process in one; see `RQMoEIndex.save`."""
        self.index.save(folder)

    # --- changes -------------------------------------------------------------------------------------------------

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[str]:
        """Adds texts or replaces those with the same ids, all of them or none."""
        listed = list(texts)
        return self._add(listed, self.embedding.embed_documents(listed), metadatas, ids)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[str]:
        """As [`add_texts`]."""
        listed = list(texts)
        vectors = await self.embedding.aembed_documents(listed)
        return await run_in_executor(None, self._add, listed, vectors, metadatas, ids)

    def _add(
        self,
        texts: list[str],
        vectors: list[list[float]],
        metadatas: list[dict] | None,
        ids: Sequence[str | None] | None,
    ) -> list[str]:
        named = [id or str(uuid.uuid4()) for id in ids or [None] * len(texts)]
        own = own_ids(self.index, named)
        self.index.add(vectors, texts=texts, ids=own, metadata=metadatas or None, duplicates="replace")
        return named

    def delete(self, ids: list[str] | None = None, *, filter: dict | None = None) -> bool:  # type: ignore[override]
        """Removes documents by ids, passing over unknown ones, or by a filter; without either all of them.

        Raises:
            TypeError: If anything else is given: passed over, a misspelt filter would remove everything.
            ValueError: If both are given.
        """
        if ids is not None and filter is not None:
            raise ValueError(
                "Give either the ids or the filter of what to delete, got both: to delete what is among the ids and "
                'matches, add {"$id": {"$in": ids}} to the filter.'
            )
        if ids is not None:
            self.index.remove(own_ids(self.index, ids, missing_ok=True), missing_ok=True)
        else:
            self.index.remove(filter=filter or {})
        return True

    # --- reading -------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in their order; unknown ids are left out."""
        own = own_ids(self.index, ids, missing_ok=True)
        return [_to_langchain(found) for found in self.index.get(own, missing_ok=True)]

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The documents nearest to a vector, with their scores (cosines unless the store has another metric)."""
        with self.index.reading():  # what one call finds must be there for the next
            if callable(filter):
                kwargs["ids"] = [found.id for found in self.index.documents() if filter(_to_langchain(found))]
            else:
                kwargs["filter"] = filter
            scores, ids = self.index.search(np.asarray(embedding, np.float32), k, **kwargs)
            documents = [_to_langchain(found) for found in self.index.get(ids)]
        return list(zip(documents, scores.tolist(), strict=True))

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The documents nearest to a text, with their scores."""
        return self.similarity_search_with_score_by_vector(self.embedding.embed_query(query), k, **kwargs)

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As [`similarity_search_with_score`]."""
        vector = await self.embedding.aembed_query(query)
        return await run_in_executor(None, self.similarity_search_with_score_by_vector, vector, k, **kwargs)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The documents nearest to a text."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """As [`similarity_search`]."""
        return [document for document, _ in await self.asimilarity_search_with_score(query, k, **kwargs)]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The documents nearest to a vector."""
        return [document for document, _ in self.similarity_search_with_score_by_vector(embedding, k, **kwargs)]

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Documents near to a vector and far from each other; how far, their reconstructed embeddings say."""
        with self.index.reading():
            found = self.similarity_search_by_vector(embedding, fetch_k, **kwargs)
            ids = own_ids(self.index, [document.id for document in found if document.id is not None])
            vectors = list(self.index.reconstruct(ids))
        chosen = maximal_marginal_relevance(np.asarray(embedding, np.float32), vectors, lambda_mult, k)
        return [found[place] for place in chosen]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Documents near to a text and far from each other."""
        vector = self.embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As [`max_marginal_relevance_search`]."""
        vector = await self.embedding.aembed_query(query)
        search = self.max_marginal_relevance_search_by_vector
        return await run_in_executor(None, search, vector, k, fetch_k, lambda_mult, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self.relevance_score_fn is not None:
            return self.relevance_score_fn
        metric, unit = self.index.settings["metric"], self.index.quantizer.is_unit_norm
        if metric == "cosine" or (metric == "inner_product" and unit):
            return lambda score: min(max(score, 0.0), 1.0)
        if metric == "l2":
            return lambda score: 1 / (1 - score)
        raise ValueError("Inner products have no bound: give the store a relevance_score_fn, or use metric='cosine'.")


def _to_langchain(document: IndexDocument) -> Document:
    return Document(id=str(document.id), page_content=document.text or "", metadata=document.metadata)
