"""Additive tables: one vector per code and step whose sum approximates what a code decodes to.

A code's neural contribution depends on the codes before it. Its mean over many codes does not, so that sums of means
can be scored by look-up tables, which is what Faiss's scanners do. They choose the few codes worth decoding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .codes import bits_per_code, sizes_of
from .modeling_rqmoe import RQMoEModel

SAMPLE = 4_096
BATCH = 1_024
COLUMNS = 128  # dimensions that are improved at a time: each takes a number per vector
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


def faiss_widths(bits: Sequence[int]) -> Any:
    """The bits of each code, as Faiss's residual quantizers take them."""
    import faiss

    widths = faiss.UInt64Vector()
    faiss.copy_array_to_vector(np.array(bits, np.uint64), widths)
    return widths


def faiss_scanner(tables: np.ndarray, packed: np.ndarray, codebook_size: int | Sequence[int]):
    """A Faiss index over packed codes that scores queries by inner product with the sums of `tables`."""
    import faiss

    steps, codewords, size = tables.shape
    bits = [bits_per_code(codebook) for codebook in sizes_of(steps, codebook_size)]
    padded = np.zeros((steps, 1 << max(bits), size), np.float32)  # codes never reach the padding
    padded[:, :codewords] = tables
    index = faiss.IndexResidualQuantizer(size, faiss_widths(bits), faiss.METRIC_INNER_PRODUCT)
    index.rq.search_type = faiss.AdditiveQuantizer.ST_LUT_nonorm
    rows = np.concatenate([table[: 1 << width] for table, width in zip(padded, bits, strict=True)])
    faiss.copy_array_to_vector(rows.reshape(-1), index.rq.codebooks)
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
    steps = codes.shape[1]
    mean = vectors.mean(axis=0, dtype=np.float64)
    tables = solve_codewords(codes, vectors - mean.astype(np.float32), [codebook_size] * steps, ridge)
    return (tables.reshape(steps, codebook_size, -1) + mean / steps).astype(np.float32)


def solve_codewords(codes: np.ndarray, vectors: np.ndarray, sizes: Sequence[int], ridge: float) -> np.ndarray:
    """Least squares for the codewords of all steps, one step after the other: float32 `(sum of sizes, d)`.

    Args:
        codes: Integers `(n, m)`.
        vectors: float32 `(n, d)`, centred.
        sizes: Codebook size of each step.
        ridge: Weight of the squared entries, in units of vectors.

    Raises:
        ValueError: If the equations would not fit into memory.
    """
    total = sum(sizes)
    if total > MAX_COLUMNS:
        raise ValueError(f"Codebooks of {list(sizes)} make {total} equations, more than {MAX_COLUMNS}.")
    starts = starts_of(sizes)
    rows = codes.astype(np.int64) + starts
    gram = torch.zeros(total, total, dtype=torch.float64)
    for step, size in enumerate(sizes):
        for other in range(step + 1):
            block = _counts_of_pairs(codes[:, step], codes[:, other], size, sizes[other])
            here = slice(starts[step], starts[step] + size)
            there = slice(starts[other], starts[other] + sizes[other])
            gram[here, there], gram[there, here] = block, block.T
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    del gram  # half of the memory
    sums = torch.zeros(total, vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), 16 * BATCH):
        batch = torch.from_numpy(vectors[start : start + 16 * BATCH]).double()
        for column in torch.from_numpy(rows[start : start + 16 * BATCH]).T:
            sums.index_add_(0, column, batch)
    return torch.cholesky_solve(sums, factor).float().numpy()


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    """Row at which the codewords of each step begin."""
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def _counts_of_pairs(first: np.ndarray, second: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """How often two codewords of two steps occur together, float64 `(rows, columns)`."""
    pairs = first.astype(np.int64) * columns + second
    return torch.from_numpy(np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)).double()


def improve_codewords(
    codewords: np.ndarray,
    codes: np.ndarray,
    vectors: np.ndarray,
    sizes: Sequence[int],
    ridge: float,
    iterations: int = 12,
) -> np.ndarray:
    """Steps towards the codewords of [`solve_codewords`], for codebooks that are too large to solve for.

    Conjugate gradients on the normal equations, preconditioned by how often each codeword occurs. They never form the
    equations: a step costs two passes over the vectors. The dimensions do not depend on each other, so a block of them
    is improved at a time. From codewords that fitted similar codes a dozen steps are enough.

    Args:
        codewords: float32 `(sum of sizes, d)`, where to start.
        codes: Integers `(n, m)`.
        vectors: float32 `(n, d)`, centred.
        sizes: Codebook size of each step.
        ridge: Weight of the squared entries, in units of vectors.
        iterations: Steps.

    Returns:
        float32 `(sum of sizes, d)`.
    """
    rows = torch.from_numpy(codes.astype(np.int64) + starts_of(sizes))
    counts = torch.bincount(rows.flatten(), minlength=len(codewords))
    owners = rows.T.flatten().argsort(stable=True) % len(rows)  # the vectors that have each codeword
    begins = counts.cumsum(0) - counts
    weights = counts.float()[:, None] + ridge

    def restore(values: torch.Tensor) -> torch.Tensor:  # B values
        return F.embedding_bag(rows, values, mode="sum")

    def collect(values: torch.Tensor) -> torch.Tensor:  # B^T values
        return F.embedding_bag(owners, values, begins, mode="sum")

    improved = np.empty_like(codewords)
    for start in range(0, codewords.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        current, target = (torch.from_numpy(array[:, block].copy()) for array in (codewords, vectors))
        residual = collect(target - restore(current)) - ridge * current
        scaled = residual / weights
        direction, size = scaled.clone(), (residual * scaled).sum(dim=0)
        for _ in range(iterations):
            image = collect(restore(direction)) + ridge * direction
            length = size / (direction * image).sum(dim=0).clamp(min=1e-30)
            current += length * direction
            residual -= length * image
            scaled = residual / weights
            before, size = size, (residual * scaled).sum(dim=0)
            direction = scaled + (size / before.clamp(min=1e-30)) * direction
        improved[:, block] = current.numpy()
    return improved
