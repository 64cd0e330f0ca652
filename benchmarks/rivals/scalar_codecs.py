"""Codes of single coordinates: PCA with Faiss's scalar quantizer, TurboQuant, EDEN."""

from functools import lru_cache

import faiss
import numpy as np

from rqmoe_hf import pack_codes, unpack_codes

from .faiss_codecs import FaissCodec
from .interface import BestOf
from .linear import lloyd_max_normal, principal_axes, random_rotation

SCALE_BITS = 16  # a float16 for each vector; EDEN's authors send 32 bits for vectors of millions of coordinates
levels_of = lru_cache(lloyd_max_normal)


def pca_scalar(dimension: int, size: int) -> BestOf:
    """As many principal components as fit with 4, 6 or 8 bits each, whichever is best."""
    kinds = {
        4: faiss.ScalarQuantizer.QT_4bit,
        6: faiss.ScalarQuantizer.QT_6bit,
        8: faiss.ScalarQuantizer.QT_8bit,
    }
    settings = []
    for bits, kind in kinds.items():
        kept = min(dimension, 8 * size // bits)
        index = faiss.IndexPreTransform(faiss.PCAMatrix(dimension, kept), faiss.IndexScalarQuantizer(kept, kind))
        settings.append(FaissCodec(index, kept * bits, kept * dimension + dimension + 2 * kept))
    return BestOf(settings)


class RotatedScalar:
    """A random rotation, then each coordinate rounded to the Lloyd-Max levels of the normal distribution.

    After a random rotation the coordinates of a vector are nearly normal with equal variance, so one set of levels
    suits all. TurboQuant (arXiv 2504.19874, its variant for squared error) uses the levels of the exact distribution,
    from which those of the normal hardly differ in the 32 dimensions and more that occur here.

    Rates below one bit per coordinate do not exist in the papers. There the vectors are first projected on as many
    principal components as fit; with all of them kept, this is but a part of the rotation.

    Args:
        dimension: Of the vectors (d).
        kept: Coordinates after the projection (k).
        bits: Of each coordinate.
        vector_scale: Whether each vector stores a scale of 16 bits (EDEN, arXiv 2108.08842; with one bit DRIVE, arXiv
            2105.08339). Else one scale serves all, TurboQuant's setting for vectors of unit norm.
    """

    def __init__(self, dimension: int, kept: int, bits: int, vector_scale: bool):
        self.kept, self.bits, self.vector_scale = kept, bits, vector_scale
        self.levels = levels_of(bits)
        self.code_bits = kept * bits + SCALE_BITS * vector_scale
        self.codebook_bytes = 4 * (kept * dimension + dimension + len(self.levels) + 1)

    def train(self, vectors: np.ndarray) -> None:
        """Mean, projection, rotation and common scale."""
        self.mean, axes = principal_axes(vectors, self.kept)
        self.basis = random_rotation(self.kept) @ axes  # (k, d), orthonormal rows
        self.scale = float(np.sqrt(np.square((vectors - self.mean) @ axes.T).mean()))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8; behind them the bytes of the vector's scale if there is one."""
        rotated = (vectors - self.mean) @ self.basis.T
        if not self.vector_scale:
            return pack_codes(self._nearest(rotated / self.scale), 1 << self.bits)
        spread = np.sqrt(np.square(rotated).mean(axis=1, keepdims=True))
        codes = self._nearest(rotated / np.maximum(spread, 1e-12))
        scales = optimal_scales(rotated, self.levels[codes]).astype(np.float16)
        return np.concatenate([pack_codes(codes, 1 << self.bits), scales[:, None].view(np.uint8)], axis=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        scales: float | np.ndarray = self.scale
        if self.vector_scale:
            stored = SCALE_BITS // 8
            scales = np.ascontiguousarray(codes[:, -stored:]).view(np.float16).astype(np.float32)
            codes = np.ascontiguousarray(codes[:, :-stored])
        values = self.levels[unpack_codes(codes, self.kept, 1 << self.bits)]
        return (values * scales) @ self.basis + self.mean

    def _nearest(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, values)


def optimal_scales(vectors: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """The factor of each `rounded` `(n, k)` that brings it closest to its vector: <y, q> / <q, q>, `(n,)`.

    EDEN's papers also give the factor |y|^2 / <y, q>, which is unbiased and has a larger squared error.
    """
    return (vectors * rounded).sum(axis=1) / np.square(rounded).sum(axis=1)


def rotated_scalar(dimension: int, size: int, vector_scale: bool) -> BestOf | None:
    """TurboQuant or EDEN at `size` bytes: the best of 1 to 4 bits, 8 where more would fit than four bits can use."""
    available = 8 * size - SCALE_BITS * vector_scale
    settings = []
    for bits in (1, 2, 3, 4, 8):
        if bits == 8 and available <= 4 * dimension:
            continue
        kept = min(dimension, available // bits)
        if kept >= 2:
            settings.append(RotatedScalar(dimension, kept, bits, vector_scale))
    return BestOf(settings) if settings else None


def eden_one_bit(dimension: int, size: int) -> RotatedScalar | None:
    """EDEN with one bit per coordinate and a scale per vector."""
    kept = min(dimension, 8 * size - SCALE_BITS)
    return RotatedScalar(dimension, kept, 1, vector_scale=True) if kept > 0 else None
