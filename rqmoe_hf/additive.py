"""Additive tables: one vector per code and step whose sum approximates what a code decodes to.

A code's neural contribution depends on the codes before it. Its mean over many codes does not, so that sums of means
can be scored by look-up tables, which is what Faiss's scanners do. They choose the few codes worth decoding.
"""

import numpy as np
import torch

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
