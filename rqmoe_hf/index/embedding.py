"""Texts to vectors, by whatever encoder the user has."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class EncodesTexts(Protocol):
    """What an encoder must do; sentence-transformers models do."""

    def encode_query(self, texts: list[str], /) -> Any:
        """Embeds queries, `(n, d)`."""

    def encode_document(self, texts: list[str], /) -> Any:
        """Embeds documents, `(n, d)`."""


Encoder = str | EncodesTexts


class TextEncoder:
    """An encoder that is loaded when it is first needed.

    Args:
        encoder: Name of a sentence-transformers model, or an encoder; None if there is none.
    """

    def __init__(self, encoder: Encoder | None):
        self.encoder = encoder

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds queries, float32 `(n, d)`."""
        return np.asarray(self._loaded().encode_query(list(texts)), np.float32)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds documents, float32 `(n, d)`."""
        return np.asarray(self._loaded().encode_document(list(texts)), np.float32)

    def _loaded(self) -> EncodesTexts:
        if self.encoder is None:
            raise ValueError(
                "Texts need an encoder, and the quantizer does not record its own: give RQMoEIndex an `encoder`, or "
                "pass embeddings instead of texts."
            )
        if not isinstance(self.encoder, str):
            return self.encoder
        from ..data.jobs import load_encoder

        loaded: EncodesTexts = load_encoder(self.encoder)
        self.encoder = loaded
        return loaded
