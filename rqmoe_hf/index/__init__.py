"""Searchable collections of compressed embeddings: codes, ids, texts and metadata in one folder."""

from .documents import Document
from .index import RQMoEIndex

__all__ = ["Document", "RQMoEIndex"]
