"""A page over an index: a local web application with hits, memory and recall against exact search."""

from .app import make_app
from .live import LiveIndex

__all__ = ["LiveIndex", "make_app"]
