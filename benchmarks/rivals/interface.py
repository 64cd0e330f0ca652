"""What a method must offer to be measured, and helpers that several methods share."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

CHOOSING_SHARE, MAX_CHOOSING = 0.1, 10_000


@runtime_checkable
class Quantizer(Protocol):
    """A lossy code for vectors.

    Attributes:
        code_bits: Bits of one vector's code, with any factors that are stored for each vector.
        codebook_bytes: Bytes that a reader needs besides the codes: codebooks, rotations, ranges. Known once trained.
    """

    code_bits: int
    codebook_bytes: int

    def train(self, vectors: np.ndarray) -> None:
        """Learns from float32 `(n, d)`."""

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes `(n, m)`, integers, of float32 `(n, d)`."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Reconstructions, float32 `(n, d)`, in the units of the vectors."""


@runtime_checkable
class Searcher(Protocol):
    """A quantizer whose authors rank with an estimator of their own, not by distance to reconstructions."""

    def search(self, queries: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
        """The `k` nearest codes of each query `(q, d)`: indices `(q, k)`, nearest first."""


def contiguous(vectors: np.ndarray) -> np.ndarray:
    """The layout that Faiss reads: C order, float32."""
    return np.ascontiguousarray(vectors, np.float32)


def squared_error(vectors: np.ndarray, restored: np.ndarray) -> float:
    """Squared error summed over dimensions, averaged over vectors."""
    return float(np.square(vectors - restored).sum(axis=1, dtype=np.float64).mean())


class BestOf:
    """The best of several settings: chosen on the last tenth of the training vectors, then trained on all of them."""

    def __init__(self, settings: Sequence[Quantizer]):
        if not settings:
            raise ValueError("Expected at least one setting to choose from.")
        self.settings = settings
        self.chosen: Quantizer = settings[0]

    @property
    def code_bits(self) -> int:
        """Of the chosen setting; before training the largest of all."""
        return self.chosen.code_bits if len(self.settings) == 1 else max(one.code_bits for one in self.settings)

    @property
    def codebook_bytes(self) -> int:
        """Of the chosen setting."""
        return self.chosen.codebook_bytes

    def train(self, vectors: np.ndarray) -> None:
        """Trains all settings on nine tenths and the best one again on everything."""
        held_out = min(MAX_CHOOSING, int(CHOOSING_SHARE * len(vectors)))
        kept, validation = vectors[:-held_out], vectors[-held_out:]
        errors = []
        for setting in self.settings:
            setting.train(kept)
            errors.append(squared_error(validation, setting.decode(setting.encode(validation))))
        self.chosen = self.settings[int(np.argmin(errors))]
        self.settings = [self.chosen]
        self.chosen.train(vectors)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """See [`Quantizer.encode`]."""
        return self.chosen.encode(vectors)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return self.chosen.decode(codes)
