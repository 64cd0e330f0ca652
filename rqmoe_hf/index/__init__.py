"""Searchable collections of compressed embeddings: codes, ids, texts and metadata in one folder."""

from .documents import Document
from .index import RQMoEIndex
from .shards import RQMoEShards
from .storage import verify

__all__ = ["Document", "RQMoEIndex", "RQMoEShards", "verify"]
