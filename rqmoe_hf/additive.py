"""Additive tables: one vector per code and step whose sum approximates what a code decodes to.

A code's neural contribution depends on the codes before it. Its mean over many codes does not, so that sums of means
can be scored by look-up tables, which is what Faiss's scanners do. They choose the few codes worth decoding.
"""

import numpy as np
import torch

from .modeling_rqmoe import RQMoEModel

SAMPLE = 4_096
BATCH = 1_024
MAX_COLUMNS = 1 << 14  # least squares: normal equations of 2 GiB in double precision


@torch.no_grad()
def mean_contributions(model: RQMoEModel, codes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean contribution of every codeword over a sample of codes, in the units of the embeddings.

    Args:
        model: The quantizer.
        codes: Integer codes `(n, m)`, unpacked.
        seed: Of the sample.

    Returns:
        float32 `(m, codebook_size, hidden_size)`. Codewords that do not occur in the sample have their own vector,
        undeformed. The quantizer's mean is not included: added to a sum of these it gives a reconstruction.
    """
    steps = codes.shape[1]
    rows = np.random.default_rng(seed).permutation(len(codes))[:SAMPLE]
    sample = torch.from_numpy(codes[np.sort(rows)].astype(np.int64)).to(model.codebooks.device)
    sums = torch.zeros_like(model.codebooks[:steps], dtype=torch.float32)
    counts = torch.zeros(sums.shape[:2], device=sums.device)
    for batch in sample.split(BATCH):
        contributions = model.contributions(batch).float()  # (n, m, d)
        for step in range(steps):
            sums[step].index_add_(0, batch[:, step], contributions[:, step])
            counts[step] += torch.bincount(batch[:, step], minlength=len(counts[step]))
    seen = counts[..., None] > 0
    tables = torch.where(seen, sums / counts[..., None].clamp(min=1), model.codebooks[:steps].float())
    return (tables * model.scale.float()).cpu().numpy()


def faiss_scanner(tables: np.ndarray, packed: np.ndarray):
    """A Faiss index over packed codes that scores queries by inner product with the sums of `tables`."""
    import faiss

    steps, codewords, size = tables.shape
    bits = (codewords - 1).bit_length()
    padded = np.zeros((steps, 1 << bits, size), np.float32)  # codes never reach the padding
    padded[:, :codewords] = tables
    index = faiss.IndexResidualQuantizer(size, steps, bits, faiss.METRIC_INNER_PRODUCT)
    index.rq.search_type = faiss.AdditiveQuantizer.ST_LUT_nonorm
    faiss.copy_array_to_vector(padded.reshape(-1), index.rq.codebooks)
    index.rq.is_trained = index.is_trained = True
    index.add_sa_codes(np.ascontiguousarray(packed))
    return index


def least_squares_tables(
    codes: np.ndarray, vectors: np.ndarray, codebook_size: int, ridge: float = 1e-3
) -> np.ndarray:
    """Tables whose sums over the codes are closest to the vectors.

    The mean of the vectors is fitted apart and spread over the tables, so that the ridge, which also settles what
    the codes leave open (a constant may move from table to table; codewords may not occur), shrinks towards it.

    Args:
        codes: Integers `(n, m)`, unpacked.
        vectors: `(n, d)`.
        codebook_size: Codewords per table (K); m * K may be up to `MAX_COLUMNS`.
        ridge: Weight of the squared entries, in units of vectors: a codeword seen `ridge` times is halved.

    Returns:
        float32 `(m, K, d)`.

    Raises:
        ValueError: If the equations would not fit into memory.
    """
    steps, columns = codes.shape[1], codes.shape[1] * codebook_size
    if columns > MAX_COLUMNS:
        raise ValueError(f"{steps} tables of {codebook_size} make {columns} equations, more than {MAX_COLUMNS}.")
    mean = vectors.mean(axis=0, dtype=np.float64)
    gram = _gram_of_codes(codes, codebook_size)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    del gram  # half of the memory
    solution = torch.cholesky_solve(_sums_by_code(codes, vectors - mean.astype(np.float32), codebook_size), factor)
    return (solution.reshape(steps, codebook_size, -1) + torch.from_numpy(mean / steps)).float().numpy()


def _gram_of_codes(codes: np.ndarray, codebook_size: int) -> torch.Tensor:
    """How often two codewords occur together: B^T B of the one-hot design B, float64 `(m * K, m * K)`."""
    steps = codes.shape[1]
    gram = torch.zeros(steps * codebook_size, steps * codebook_size, dtype=torch.float64)
    for row in range(steps):
        for column in range(row + 1):
            pairs = codes[:, row].astype(np.int64) * codebook_size + codes[:, column]
            counts = torch.from_numpy(np.bincount(pairs, minlength=codebook_size**2)).double()
            block = counts.reshape(codebook_size, codebook_size)
            rows = slice(row * codebook_size, (row + 1) * codebook_size)
            columns = slice(column * codebook_size, (column + 1) * codebook_size)
            gram[rows, columns], gram[columns, rows] = block, block.T
    return gram


def _sums_by_code(codes: np.ndarray, vectors: np.ndarray, codebook_size: int) -> torch.Tensor:
    """Sum of the vectors that hold each codeword: B^T X, float64 `(m * K, d)`."""
    sums = torch.zeros(codes.shape[1] * codebook_size, vectors.shape[1], dtype=torch.float64)
    starts = torch.arange(codes.shape[1]) * codebook_size
    for start in range(0, len(codes), 16 * BATCH):
        batch = torch.from_numpy(vectors[start : start + 16 * BATCH]).double()
        rows = torch.from_numpy(codes[start : start + 16 * BATCH].astype(np.int64)) + starts
        for column in rows.T:
            sums.index_add_(0, column, batch)
    return sums
