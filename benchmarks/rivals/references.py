"""Scalar and binary codes of sentence-transformers and the vectors themselves, each at its own bytes."""

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from .interface import contiguous


class Float32:
    """The vectors as they are."""

    def __init__(self, dimension: int):
        self.code_bits, self.codebook_bytes = 32 * dimension, 0

    def train(self, vectors: np.ndarray) -> None:
        """Nothing to learn."""

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The bits of the numbers."""
        return contiguous(vectors).view(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return np.ascontiguousarray(codes).view(np.float32)


class Int8:
    """`quantize_embeddings(precision="int8")` with ranges from the training vectors, as its documentation advises."""

    def __init__(self, dimension: int):
        self.code_bits, self.codebook_bytes = 8 * dimension, 4 * 2 * dimension

    def train(self, vectors: np.ndarray) -> None:
        """Smallest and largest value of each dimension."""
        self.ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """int8 `(n, d)`."""
        return quantize_embeddings(vectors, "int8", ranges=self.ranges)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The middle of each bucket."""
        steps = (self.ranges[1] - self.ranges[0]) / 255
        return ((codes.astype(np.float32) + 128.5) * steps + self.ranges[0]).astype(np.float32)


class Binary:
    """`quantize_embeddings(precision="ubinary")`, ranked with unquantized queries.

    The library finds candidates by Hamming distance and rescores them by the inner product of the query with the
    signs. Reconstructions of one length have this order too, here for all vectors rather than for candidates alone.
    """

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.code_bits, self.codebook_bytes = dimension, 4

    def train(self, vectors: np.ndarray) -> None:
        """The least-squares length of the signs."""
        self.scale = float(np.abs(vectors).mean())

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """uint8 `(n, d / 8)`."""
        return quantize_embeddings(vectors, "ubinary")

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        signs = np.unpackbits(codes, axis=1, count=self.dimension).astype(np.float32) * 2 - 1
        return signs * self.scale
