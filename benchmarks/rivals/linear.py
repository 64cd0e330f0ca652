"""Projections that the scalar and the binary codes begin with."""

import numpy as np


def principal_axes(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(d,)` and the `count` directions of most variance, float32 `(count, d)` with orthonormal rows."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    # In double precision: the last directions of embeddings carry a millionth of the variance.
    covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(vectors), 1 << 16):
        centred = vectors[start : start + (1 << 16)] - mean
        covariance += centred.T @ centred
    directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
    return mean.astype(np.float32), np.ascontiguousarray(directions.T, np.float32)


def random_rotation(size: int, seed: int = 0) -> np.ndarray:
    """A rotation drawn uniformly, float32 `(size, size)`."""
    factor, triangle = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return (factor * np.sign(np.diag(triangle))).astype(np.float32)


def lloyd_max_normal(bits: int, points: int = 1 << 16, iterations: int = 1_000) -> np.ndarray:
    """The levels with the least squared error for a standard normal variable, float32 `(2**bits,)`, ascending.

    Lloyd's algorithm on equally likely points of the distribution.
    """
    from statistics import NormalDist

    normal = NormalDist()
    sample = np.array([normal.inv_cdf((index + 0.5) / points) for index in range(points)])
    sums = np.concatenate([[0.0], np.cumsum(sample)])
    levels = sample[(np.arange(1 << bits) * 2 + 1) * points // (2 << bits)]
    for _ in range(iterations):
        edges = np.searchsorted(sample, (levels[1:] + levels[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [points]])
        levels = np.diff(sums[bounds]) / np.diff(bounds)
    return levels.astype(np.float32)
