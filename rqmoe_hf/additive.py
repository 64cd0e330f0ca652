"""Additive tables: one vector per code and step whose sum approximates what a code decodes to.

A code's neural contribution depends on the codes before it. Its mean over many codes does not, so that sums of means
can be scored by look-up tables, which is what Faiss's scanners do. They choose the few codes worth decoding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .codes import bits_per_code, sizes_of
from .least_squares import solve_codewords
from .modeling_rqmoe import RQMoEModel

SAMPLE = 4_096
BATCH = 1_024


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
