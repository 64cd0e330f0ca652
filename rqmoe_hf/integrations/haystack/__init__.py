"""Haystack's document store over compressed embeddings, and its retriever."""

from .store import RQMoEDocumentStore, RQMoEEmbeddingRetriever

__all__ = ["RQMoEDocumentStore", "RQMoEEmbeddingRetriever"]
