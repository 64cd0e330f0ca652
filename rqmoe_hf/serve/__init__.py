"""A page over an index: a local web application with hits, memory and recall against exact search."""

from .app import make_app
from .live import LiveIndex
from .live_shards import LiveShards

__all__ = ["LiveIndex", "LiveShards", "make_app"]
