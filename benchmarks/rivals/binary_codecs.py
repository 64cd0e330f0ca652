"""One bit per coordinate: ITQ and RaBitQ of Faiss."""

import faiss
import numpy as np

from .interface import contiguous

ITQ_POINTS_PER_DIMENSION = 400  # Faiss's default of 10 would train 64 bits on 640 vectors
RABITQ_FACTOR_BYTES = 8  # two float32: squared norm, and the factor of the estimator


class ITQ:
    """Iterative quantization: PCA, a rotation learnt for signs, and the signs.

    The method has no decoder. Here a bit stands for the mean absolute coordinate, which is the least-squares value,
    and the transform is undone. Faiss's transform divides centred vectors by their norm; the signs do not change.

    Args:
        dimension: Of the vectors (d).
        bits: Per vector (k), at most d.
    """

    def __init__(self, dimension: int, bits: int):
        self.code_bits = bits
        self.codebook_bytes = 4 * (bits * dimension + dimension + bits)
        self.transform = faiss.ITQTransform(dimension, bits, True)
        self.transform.max_train_per_dim = ITQ_POINTS_PER_DIMENSION

    def train(self, vectors: np.ndarray) -> None:
        """See [`Quantizer.train`]."""
        self.transform.train(contiguous(vectors))
        self.mean = faiss.vector_to_array(self.transform.mean)
        self.basis = faiss.vector_to_array(self.transform.pca_then_itq.A).reshape(self.code_bits, -1)
        self.scales = np.abs((vectors - self.mean) @ self.basis.T).mean(axis=0)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed signs, uint8."""
        return np.packbits(self.transform.apply(contiguous(vectors)) > 0, axis=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        signs = np.unpackbits(codes, axis=1, count=self.code_bits).astype(np.float32) * 2 - 1
        return (signs * self.scales) @ self.basis + self.mean


def itq(dimension: int, size: int) -> ITQ | None:
    """ITQ with `8 * size` bits; it cannot have more bits than dimensions."""
    return ITQ(dimension, 8 * size) if 8 * size <= dimension else None


class RaBitQ:
    """RaBitQ with one bit per coordinate, after PCA to the coordinates that the rate leaves beside its factors.

    Faiss keeps two float32 for each vector, 8 bytes, so nothing is left at 8 bytes. Its own decoder applies the factor
    that makes inner products unbiased, at the price of longer reconstructions; here they are shortened to the least
    error, for which both factors together suffice. Ranking by the unbiased estimator, with unquantized queries, is
    `search`. More bits per coordinate, which Faiss has too, would change only the search: its decoder ignores them.

    Args:
        dimension: Of the vectors (d).
        kept: Coordinates (k).
    """

    def __init__(self, dimension: int, kept: int):
        self.kept = kept
        # A random rotation, which the method needs and Faiss leaves to a transform, follows the PCA.
        self.transform = faiss.PCAMatrix(dimension, kept, 0, True)
        self.inner = faiss.IndexRaBitQ(kept, faiss.METRIC_L2)
        self.inner.qb = 0  # queries stay as they are
        self.index = faiss.IndexPreTransform(self.transform, self.inner)
        self.code_bits = kept + 8 * RABITQ_FACTOR_BYTES
        self.codebook_bytes = 4 * (kept * dimension + dimension + kept)

    def train(self, vectors: np.ndarray) -> None:
        """See [`Quantizer.train`]."""
        self.index.train(contiguous(vectors))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Signs and factors, uint8."""
        return self.index.sa_encode(contiguous(vectors))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        centre = faiss.vector_to_array(self.inner.center)
        direction = self.inner.sa_decode(np.ascontiguousarray(codes)) - centre
        norms = np.ascontiguousarray(codes[:, -RABITQ_FACTOR_BYTES:]).view(np.float32)[:, 0]  # squared
        # The decoder gives a * b with a = |y|^2 / <y, b>. The least error has the factor <y, b> / |b|^2 instead, that
        # is a * |y|^2 / |a * b|^2.
        shrink = norms / np.maximum(np.square(direction).sum(axis=1), 1e-12)
        return self.transform.reverse_transform(contiguous(direction * shrink[:, None] + centre))

    def search(self, queries: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
        """Faiss's search with the method's estimator of distances."""
        self.inner.reset()
        self.inner.add_sa_codes(np.ascontiguousarray(codes))
        found = self.inner.search(self.transform.apply(contiguous(queries)), k)[1]
        self.inner.reset()
        return found


def rabitq(dimension: int, size: int) -> RaBitQ | None:
    """RaBitQ within `size` bytes; None if the factors alone fill them."""
    kept = min(dimension, 8 * (size - RABITQ_FACTOR_BYTES))
    return RaBitQ(dimension, kept) if kept > 0 else None
