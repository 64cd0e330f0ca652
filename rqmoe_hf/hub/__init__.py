"""Sharing: model cards, pushing quantizers, and codes as data sets."""

from .cards import RQMoECardData, render_card, write_card
from .codes import load_codes, push_codes_to_hub
from .push import push_quantizer

__all__ = ["RQMoECardData", "load_codes", "push_codes_to_hub", "push_quantizer", "render_card", "write_card"]
