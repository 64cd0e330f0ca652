"""Quantizers of other projects, read safely and converted to ours."""

from .faiss_quantizers import convert_faiss
from .official import convert_official
from .qinco import convert_qinco

__all__ = ["convert_faiss", "convert_official", "convert_qinco"]
