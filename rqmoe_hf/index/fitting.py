"""Makes the tables, norms and inverted lists of a scanner from a sample of codes."""

import numpy as np

from ..modeling_rqmoe import RQMoEModel
from .codewords import exact_codewords, fit_codewords
from .first_codes import first_lists
from .scanning import NORM_LEVELS, Scanner, Tables

FIT_ROWS = 32_768
POINTS_PER_LIST = 48
ITERATIONS = 10
PROBES = 1_024


def fit_scanner(quantizer: RQMoEModel, sample: np.ndarray, steps: int, metric: str, lists: int) -> Scanner:
    """An empty scanner whose tables, norms and lists suit a sample of codes, uint8 `(n, bytes)`, n >= 1.

    As many lists as the first codes make are made of the first codes.
    """
    experts, by_first = quantizer.config.has_experts, lists == first_lists(quantizer.config, steps)
    codewords = fit_codewords(quantizer, sample[:FIT_ROWS], steps) if experts else exact_codewords(quantizer, steps)
    flat = np.zeros((1, codewords[0].shape[1]), np.float32)
    centroids = codewords[0][:lists] if by_first else flat
    if metric == "inner_product" and (by_first or lists == 1):
        return Scanner(Tables(codewords, None, centroids, by_first_code=by_first), sample.shape[1], metric)
    sums = Scanner(Tables(codewords, None, flat), sample.shape[1], metric).sums(sample)
    lengths = np.linalg.norm(sums, axis=1)
    norms = np.linspace(lengths.min(), lengths.max(), NORM_LEVELS, dtype=np.float32)
    if lists > 1 and not by_first:
        centroids = find_centroids(sums, lists, spherical=metric != "l2")
    tables = Tables(codewords, None if metric == "inner_product" else norms, centroids, by_first_code=by_first)
    if metric == "cosine":
        rows = np.unique(np.linspace(0, len(sums) - 1, PROBES).astype(int))
        tables.probes = sums[rows] / np.maximum(lengths[rows, None], 1e-12)
    return Scanner(tables, sample.shape[1], metric)


def find_centroids(vectors: np.ndarray, lists: int, spherical: bool, seed: int = 0) -> np.ndarray:
    """Centroids of the inverted lists by k-means: float32 `(lists, d)`."""
    import faiss

    kmeans = faiss.Kmeans(vectors.shape[1], lists, niter=ITERATIONS, seed=seed, spherical=spherical,
                          max_points_per_centroid=POINTS_PER_LIST, min_points_per_centroid=1)  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids)
