"""Compressing and searching embeddings in one call each, after `sentence_transformers.util.quantization`."""

import time
from typing import Any

import numpy as np
import torch

from .additive import SAMPLE, faiss_scanner, mean_contributions
from .codes import unpack_codes
from .modeling_rqmoe import RQMoEModel

DECODE_ALL = 50_000  # up to so many codes, decoding all of them is as quick as anything else, and exact
CHUNK = 16_384
QUERIES = 256


def quantize_embeddings(
    embeddings: np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor],
    quantizer: RQMoEModel,
    num_codebooks: int | None = None,
    num_candidates: int | None = None,
    beam_size: int | None = None,
    local_search: int | None = None,
) -> np.ndarray:
    """Compresses embeddings to packed codes.

    Args:
        embeddings: Floating point `(n, hidden_size)`, or one embedding, `(hidden_size,)`, or a list of such.
        quantizer: The quantizer.
        num_codebooks: Keep only this many codes, hence fewer bytes.
        num_candidates: See `RQMoEModel.encode`.
        beam_size: See `RQMoEModel.encode`.
        local_search: See `RQMoEModel.encode`.

    Returns:
        uint8 `(n, bytes_per_vector)`, or `(bytes_per_vector,)` for one embedding.

    Example:
    ```python
    import numpy as np
    from rqmoe_hf import load_quantizer, quantize_embeddings, semantic_search

    quantizer = load_quantizer("minilm-384-32-bytes")
    embeddings = np.random.default_rng(0).normal(size=(100, 384)).astype("float32")
    codes = quantize_embeddings(embeddings, quantizer)  # uint8 (100, 32)
    hits, seconds = semantic_search(embeddings[:2], codes, quantizer, top_k=3)
    ```
    """
    vectors = _as_array(embeddings)
    codes = quantizer.compress(
        np.atleast_2d(vectors), num_codebooks, num_candidates, beam_size, local_search=local_search
    )
    return codes[0] if vectors.ndim == 1 else codes


def semantic_search(
    query_embeddings: np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor],
    codes: np.ndarray,
    quantizer: RQMoEModel,
    top_k: int = 10,
    rescore_multiplier: int = 10,
    num_codebooks: int | None = None,
) -> tuple[list[list[dict[str, int | float]]], float]:
    """Finds the codes nearest to uncompressed queries.

    Scores are inner products of the queries with the reconstructions, which are normalised if the quantizer was
    trained on embeddings of norm 1: ranks by cosine are better than those by the shrunken reconstructions. Up to
    50,000 codes all are decoded. Beyond, Faiss scores all codes by additive tables, and `top_k * rescore_multiplier`
    of them are decoded and ranked. For a collection that is searched again and again, keep the reconstructions or an
    index instead.

    Args:
        query_embeddings: Floating point `(n_queries, hidden_size)`, or one query `(hidden_size,)`, or a list of such.
        codes: Packed codes, uint8 `(n, bytes)`.
        quantizer: The quantizer that made them.
        top_k: Hits per query; all codes if there are fewer.
        rescore_multiplier: Shortlist per hit.
        num_codebooks: Codes per vector, where the bytes leave it open (see `RQMoEModel.decompress`).

    Returns:
        For each query its hits, best first, as `{"corpus_id": int, "score": float}`; and the seconds taken.

    Raises:
        ValueError: If the queries or codes are not of this quantizer's shape, or `top_k` or `rescore_multiplier` is
            below 1.
    """
    start = time.perf_counter()
    queries = np.atleast_2d(_as_array(query_embeddings)).astype(np.float32)
    if top_k < 1 or rescore_multiplier < 1:
        raise ValueError(f"top_k and rescore_multiplier must be at least 1, got {top_k} and {rescore_multiplier}.")
    quantizer._check_embeddings(torch.from_numpy(queries))
    steps = quantizer._packed_steps(codes, num_codebooks)
    count = min(top_k, len(codes))
    shortlist = count * rescore_multiplier
    if len(codes) <= max(DECODE_ALL, shortlist):
        scores, ids = _search_all(queries, codes, quantizer, count, steps)
    else:
        scores, ids = _search_shortlist(queries, codes, quantizer, count, shortlist, steps)
    hits = [
        [{"corpus_id": int(found), "score": float(score)} for found, score in zip(*row, strict=True)]
        for row in zip(ids, scores, strict=True)
    ]
    return hits, time.perf_counter() - start


def _search_all(queries, codes, quantizer: RQMoEModel, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids `(n_queries, count)` over all reconstructions, decoded chunk by chunk."""
    scores = np.empty((len(queries), 0), np.float32)
    ids = np.empty((len(queries), 0), np.int64)
    for first in range(0, len(codes), CHUNK):
        restored = _restore(codes[first : first + CHUNK], quantizer, steps)
        found = np.arange(first, first + len(restored))
        scores = np.hstack([scores, queries @ restored.T])
        ids = np.hstack([ids, np.broadcast_to(found, (len(queries), len(found)))])
        scores, ids = _best(scores, ids, count)
    return scores, ids


def _search_shortlist(
    queries, codes, quantizer: RQMoEModel, count: int, shortlist: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same over those codes only that Faiss ranks highest by additive tables."""
    rows = np.linspace(0, len(codes) - 1, SAMPLE).astype(int)
    tables = mean_contributions(quantizer, unpack_codes(codes[rows], steps, quantizer.config.code_sizes))
    scanner = faiss_scanner(tables, codes, quantizer.config.code_sizes)
    scores = np.empty((len(queries), count), np.float32)
    ids = np.empty((len(queries), count), np.int64)
    for first in range(0, len(queries), QUERIES):
        block = slice(first, first + QUERIES)
        _, candidates = scanner.search(queries[block], shortlist)
        wanted, places = np.unique(candidates, return_inverse=True)
        restored = _restore(codes[wanted], quantizer, steps)
        places = places.reshape(candidates.shape)
        rescored = np.stack([restored[row] @ query for row, query in zip(places, queries[block], strict=True)])
        scores[block], ids[block] = _best(rescored, candidates, count)
    return scores, ids


def _best(scores: np.ndarray, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest scores of each row and their ids, highest first; the lower id first among equals."""
    order = np.lexsort((ids, -scores), axis=1)[:, :count]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _restore(codes: np.ndarray, quantizer: RQMoEModel, steps: int) -> np.ndarray:
    restored = quantizer.decompress(codes, steps, show_progress_bar=False)
    if quantizer.is_unit_norm:
        restored /= np.maximum(np.linalg.norm(restored, axis=1, keepdims=True), 1e-12)
    return restored


def _as_array(embeddings: Any) -> np.ndarray:
    if isinstance(embeddings, list):
        embeddings = np.stack([_as_array(row) for row in embeddings])
    return (
        embeddings.detach().float().cpu().numpy() if isinstance(embeddings, torch.Tensor) else np.asarray(embeddings)
    )
