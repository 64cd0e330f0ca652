"""Makes the tables, norms and inverted lists of a scanner from a sample of codes."""

import numpy as np

from ..modeling_rqmoe import RQMoEModel
from .approximate import MOST_CODEWORDS, ApproximateDecoder, fit_decoder
from .codewords import exact_codewords, fit_codewords
from .first_codes import first_lists
from .scanning import NORM_LEVELS, Scanner, Tables

FIT_ROWS = 32_768
POINTS_PER_LIST = 48
DECODER_FROM = 100_000  # codes; fewer do not teach an approximate decoder enough
DECODER_ROWS = 200_000
DECODER_BYTES = 1 << 28  # of their vectors, unless those of DECODER_FROM codes take more
ITERATIONS = 10
PROBES = 1_024


def fit_scanner(quantizer: RQMoEModel, sample: np.ndarray, steps: int, metric: str, lists: int) -> Scanner:
    """An empty scanner whose tables, norms and lists suit a sample of codes, uint8 `(n, bytes)`, n >= 1.

    As many lists as the first codes make are made of the first codes. With experts there is an
    approximate decoder besides, if the sample is large enough to teach it.
    """
    tables = _fit_tables(quantizer, sample, steps, metric, lists)
    scanner = Scanner(tables, sample.shape[1], metric)
    if quantizer.config.has_experts and len(sample) >= DECODER_FROM:
        tables.decoder = _fit_decoder(quantizer, sample, steps, scanner)
    return scanner


def rows_to_fit(quantizer: RQMoEModel, lists: int) -> int:
    """How many codes suit a scanner of so many lists."""
    wanted = max(FIT_ROWS, POINTS_PER_LIST * lists)
    return max(wanted, decoder_rows(quantizer)) if quantizer.config.has_experts else wanted


def decoder_rows(quantizer: RQMoEModel) -> int:
    """How many codes an approximate decoder is fitted to."""
    return min(DECODER_ROWS, max(DECODER_FROM, DECODER_BYTES // (4 * quantizer.config.hidden_size)))


def _fit_decoder(
    quantizer: RQMoEModel, sample: np.ndarray, steps: int, scanner: Scanner
) -> ApproximateDecoder | None:
    """An approximate decoder that begins with a scanner's tables."""
    codewords = np.concatenate(scanner.tables.codewords)
    if len(codewords) > MOST_CODEWORDS:
        return None
    codes = _spread(sample, decoder_rows(quantizer))
    return fit_decoder(scanner.rows_of(codes).numpy(), quantizer.decompress(codes, steps), codewords)


def _spread(sample: np.ndarray, count: int) -> np.ndarray:
    """So many codes of a sample, from all of it: it is in the order in which they were added."""
    return sample if len(sample) <= count else sample[np.linspace(0, len(sample) - 1, count).astype(int)]


def _fit_tables(quantizer: RQMoEModel, sample: np.ndarray, steps: int, metric: str, lists: int) -> Tables:
    """The tables, norms and lists."""
    experts, by_first = quantizer.config.has_experts, lists == first_lists(quantizer.config, steps)
    if experts:
        codewords = fit_codewords(quantizer, _spread(sample, FIT_ROWS), steps)
    else:
        codewords = exact_codewords(quantizer, steps)
    flat = np.zeros((1, codewords[0].shape[1]), np.float32)
    centroids = codewords[0][:lists] if by_first else flat
    if metric == "inner_product" and (by_first or lists == 1):
        return Tables(codewords, None, centroids, by_first_code=by_first)
    sums = Scanner(Tables(codewords, None, flat), sample.shape[1], metric).sums(sample)
    lengths = np.linalg.norm(sums, axis=1)
    norms = np.linspace(lengths.min(), lengths.max(), NORM_LEVELS, dtype=np.float32)
    if lists > 1 and not by_first:
        centroids = find_centroids(sums, lists, spherical=metric != "l2")
    tables = Tables(codewords, None if metric == "inner_product" else norms, centroids, by_first_code=by_first)
    if metric == "cosine":
        rows = np.unique(np.linspace(0, len(sums) - 1, PROBES).astype(int))
        tables.probes = sums[rows] / np.maximum(lengths[rows, None], 1e-12)
    return tables


def find_centroids(vectors: np.ndarray, lists: int, spherical: bool, seed: int = 0) -> np.ndarray:
    """Centroids of the inverted lists by k-means: float32 `(lists, d)`."""
    import faiss

    kmeans = faiss.Kmeans(vectors.shape[1], lists, niter=ITERATIONS, seed=seed, spherical=spherical,
                          max_points_per_centroid=POINTS_PER_LIST, min_points_per_centroid=1)  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids)
