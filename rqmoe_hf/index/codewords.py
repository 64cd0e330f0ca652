"""The vectors whose sums stand for codes in a scan: codebooks where these add up, otherwise fitted to codes."""

import numpy as np
import torch

from ..additive import mean_contributions
from ..codes import bits_per_code, sizes_of, unpack_codes
from ..least_squares import improve_codewords, starts_of
from ..modeling_rqmoe import RQMoEModel

RIDGE = 1.0


def exact_codewords(quantizer: RQMoEModel, steps: int) -> list[np.ndarray]:
    """The tables of an additive quantizer: its codebooks, whose sums are the reconstructions of any codes."""
    codebooks = (quantizer.codebooks[:steps] * quantizer.scale).detach().float().cpu().numpy()
    return _with_mean(codebooks, quantizer, steps)


def fit_codewords(quantizer: RQMoEModel, packed: np.ndarray, steps: int) -> list[np.ndarray]:
    """The tables whose sums are closest to what the codes decode to, by least squares over a sample of them.

    Args:
        quantizer: The quantizer, with experts.
        packed: Codes, uint8 `(n, bytes)`.
        steps: Codes per vector.
    """
    sizes = sizes_of(steps, quantizer.config.code_sizes)
    codes = unpack_codes(packed, steps, sizes)
    mean = quantizer.mean.detach().float().cpu().numpy()
    start = mean_contributions(quantizer, codes)
    rows = np.concatenate([table[:size] for table, size in zip(start, sizes, strict=True)])
    target = quantizer.decompress(packed, steps, show_progress_bar=False) - mean
    # The ridge draws towards the mean contributions, which are what rare codewords keep.
    offset = sum(rows[codes[:, step] + first] for step, first in enumerate(starts_of(sizes)))
    given = torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(target - offset)
    rows += improve_codewords(torch.zeros(rows.shape), *given, sizes, RIDGE).numpy()
    padded = np.zeros((steps, max(sizes), rows.shape[1]), np.float32)
    for step, first in enumerate(starts_of(sizes)):
        padded[step, : sizes[step]] = rows[first : first + sizes[step]]
    return _with_mean(padded, quantizer, steps)


def _with_mean(codebooks: np.ndarray, quantizer: RQMoEModel, steps: int) -> list[np.ndarray]:
    """One table per code, padded to a power of two with rows that no code names."""
    tables = []
    for step, size in enumerate(sizes_of(steps, quantizer.config.code_sizes)):
        table = np.zeros((1 << bits_per_code(size), codebooks.shape[2]), np.float32)
        table[:size] = codebooks[step, :size]
        tables.append(table)
    tables[0] += quantizer.mean.detach().float().cpu().numpy()
    return tables
