"""The best additive decoder of given codes: one table per step, fitted by least squares."""

import numpy as np

from rqmoe_hf.additive import least_squares_tables

RIDGES = (1e-3, 1.0, 10.0)
HELD_OUT = 0.1
DECODING_BATCH = 1 << 14


def decode_tables(tables: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums of table entries: float32 `(n, d)` from tables `(m, K, d)` and codes `(n, m)`."""
    restored = np.zeros((len(codes), tables.shape[2]), np.float32)
    for start in range(0, len(codes), DECODING_BATCH):
        for step, table in enumerate(tables):
            restored[start : start + DECODING_BATCH] += table[codes[start : start + DECODING_BATCH, step]]
    return restored


def best_tables(codes: np.ndarray, vectors: np.ndarray, codebook_size: int) -> np.ndarray:
    """Least-squares tables with the ridge that does best on a tenth of the vectors held out.

    Large tables over-fit codewords that are rare; a comparison with the best additive decoder must not profit.
    """
    cut = len(codes) - max(1, int(HELD_OUT * len(codes)))
    errors = {}
    for ridge in RIDGES:
        tables = least_squares_tables(codes[:cut], vectors[:cut], codebook_size, ridge)
        errors[ridge] = np.square(vectors[cut:] - decode_tables(tables, codes[cut:])).sum(axis=1).mean()
    return least_squares_tables(codes, vectors, codebook_size, min(errors, key=lambda ridge: errors[ridge]))
