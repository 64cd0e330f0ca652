"""How good a quantizer is: error, recall and use of the codes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import torch

from .codes import sizes_of, truncate_codes, unpack_codes
from .modeling_rqmoe import RQMoEModel

MAX_QUERIES = 1_000
MIN_VECTORS = 11  # a query, and ten that can be its neighbours


@dataclass
class QuantizerReport:
    """Results at one rate.

    Args:
        num_codebooks: Codes used, a prefix of the model's.
        bytes_per_vector: Packed size.
        mse: Squared error, summed over dimensions, averaged over vectors, in the units of the embeddings.
        cosine: Mean cosine between vectors and reconstructions.
        recall_at_1_1: Share of queries whose true nearest neighbour comes first (R@1).
        recall_at_1_10: Share of queries whose true nearest neighbour is among the first ten (R@10).
        recall_10_at_10: Mean share of the true ten nearest neighbours among the first ten (recall@10).
        code_entropy: Entropy of the codes of each step, in bits; at most log2(codebook_size).
        codes_used: Share of the codewords of each step that occur.
    """

    num_codebooks: int
    bytes_per_vector: int
    mse: float
    cosine: float
    recall_at_1_1: float
    recall_at_1_10: float
    recall_10_at_10: float
    code_entropy: list[float]
    codes_used: list[float]

    def as_dict(self) -> dict:
        """The fields as a plain dictionary."""
        return asdict(self)


def nearest_neighbors(queries: np.ndarray, database: np.ndarray, k: int) -> np.ndarray:
    """Exact nearest neighbours by Euclidean distance: indices `(n_queries, k)`, nearest first."""
    return faiss.knn(np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(database, np.float32), k)[1]


def recalls(truth: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """R@1, R@10 and recall@10 of ranked neighbours.

    Args:
        truth: `(n, >= 10)`, exact neighbours, nearest first.
        found: `(n, >= 10)`, neighbours in the compressed ranking.
    """
    first = truth[:, :1]
    shared = (truth[:, :10, None] == found[:, None, :10]).any(axis=2)
    return (
        float((found[:, :1] == first).any(axis=1).mean()),
        float((found[:, :10] == first).any(axis=1).mean()),
        float(shared.mean()),
    )


def code_usage(codes: np.ndarray, codebook_size: int | Sequence[int]) -> tuple[list[float], list[float]]:
    """Entropy in bits, and share of codewords that occur, for each column of `(n, m)` integer codes."""
    entropies, used = [], []
    for column, size in zip(codes.T, sizes_of(codes.shape[1], codebook_size), strict=True):
        share = np.bincount(column, minlength=size) / len(column)
        present = share[share > 0]
        entropies.append(float(-(present * np.log2(present)).sum()))
        used.append(len(present) / size)
    return entropies, used


def split_queries(embeddings: np.ndarray, max_queries: int = MAX_QUERIES) -> tuple[np.ndarray, np.ndarray]:
    """Takes the first tenth of the embeddings, at most `max_queries`, as queries; the rest is the database."""
    if len(embeddings) < MIN_VECTORS:
        raise ValueError(f"Recall needs at least {MIN_VECTORS} vectors, got {len(embeddings)}: give more.")
    count = min(max_queries, len(embeddings) // 10)
    return embeddings[:count], embeddings[count:]


def evaluate(
    model: RQMoEModel,
    embeddings: np.ndarray,
    queries: np.ndarray | None = None,
    num_codebooks: list[int] | None = None,
    num_candidates: int | None = None,
    beam_size: int | None = None,
    local_search: int | None = None,
) -> list[QuantizerReport]:
    """Measures a quantizer on held-out embeddings.

    Queries stay uncompressed; the database is ranked by Euclidean distance to its reconstructions. On unit-norm
    embeddings the true neighbours by distance are those by cosine.

    Args:
        model: The quantizer.
        embeddings: Database `(n, hidden_size)`. If there are no queries, its first tenth (at most 1,000) are taken.
        queries: `(n_queries, hidden_size)`.
        num_codebooks: Prefixes to report, default the whole code only. All are cut from one encoding.
        num_candidates: See `RQMoEModel.encode`.
        beam_size: See `RQMoEModel.encode`.
        local_search: See `RQMoEModel.encode`.

    Returns:
        One report per prefix.

    Raises:
        ValueError: If embeddings or queries are no finite vectors of the model's size, or are too few.
    """
    config = model.config
    if queries is None:
        queries, embeddings = split_queries(embeddings)
    if len(embeddings) < 10:  # what Faiss fills the ranking up with would count as found
        raise ValueError(f"Recall@10 needs at least 10 vectors beside the queries, got {len(embeddings)}: give more.")
    model._check_embeddings(torch.from_numpy(np.array(queries, np.float32)), what="queries")
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    search: dict[str, Any] = {"num_candidates": num_candidates, "beam_size": beam_size, "local_search": local_search}
    packed = model.compress(embeddings, **search)  # first: it checks them, which Faiss does not
    truth = nearest_neighbors(queries, embeddings, 10)
    reports = []
    for steps in num_codebooks or [config.num_codebooks]:
        codes = truncate_codes(packed, config.num_codebooks, steps, config.code_sizes)
        restored = model.decompress(codes, steps)
        norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(restored, axis=1)
        reports.append(
            QuantizerReport(
                steps,
                codes.shape[1],
                float(np.square(embeddings - restored).sum(axis=1, dtype=np.float64).mean()),
                float(((embeddings * restored).sum(axis=1) / np.maximum(norms, 1e-12)).mean()),
                *recalls(truth, nearest_neighbors(queries, restored, 10)),
                *code_usage(unpack_codes(codes, steps, config.code_sizes), config.code_sizes),
            )
        )
    return reports
