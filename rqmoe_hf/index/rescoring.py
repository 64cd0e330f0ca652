"""The last stage of a search: a shortlist is ranked by what is known best of each vector."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..codes import bytes_per_vector
from ..modeling_rqmoe import RQMoEModel
from .codewords import exact_codewords
from .documents import DamagedRowsError, codes_array, floats_array
from .first_codes import first_lists
from .scanning import Scanner, Tables

FOREIGN = "The snapshot of the index does not belong to its database: delete scan-*.safetensors; it is made anew."
BLOCK = 16_384  # vectors restored at a time
WIDENING = 4  # times as many rows come from the tables where an approximate decoder chooses among them


class KnowsRows(Protocol):
    """What candidates are looked up in; the database of a collection is one."""

    @property
    def file(self) -> Any:
        """Names the source in messages."""

    def codes_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Packed codes by row number."""

    def floats_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Bytes of the float16 vectors by row number; rows without are left out."""


class ScannedRows:
    """Rows whose codes a scan has read, so that they need not be looked up.

    Args:
        rows: Row numbers, int64 `(n, m)`; -1 where there is none.
        codes: Their packed codes, uint8 `(n, m, bytes)`.
        known: What the rest is looked up in.
    """

    def __init__(self, rows: np.ndarray, codes: np.ndarray, known: KnowsRows):
        self.file, self.floats_of = known.file, known.floats_of
        self._rows, first = np.unique(rows, return_index=True)
        self._codes = codes.reshape(rows.size, -1)[first]

    def packed_codes(self, rows: np.ndarray) -> np.ndarray:
        """Packed codes of some of the rows, uint8 `(n, bytes)`."""
        return self._codes[np.searchsorted(self._rows, rows)]


Known = KnowsRows | ScannedRows


class Rescorer:
    """Ranks candidates.

    Args:
        quantizer: The quantizer that made their codes.
        steps: Codes per vector.
        metric: "cosine", "inner_product" or "l2".
    """

    def __init__(self, quantizer: RQMoEModel, steps: int, metric: str):
        self.quantizer, self.steps, self.metric = quantizer, steps, metric
        # Reconstructions are shorter than what they stand for; where that had norm 1, they are given it back.
        self.normalizes = metric == "cosine" or quantizer.is_unit_norm
        self.scanned = "cosine" if self.normalizes else metric  # among vectors of norm 1 all metrics rank alike
        self.first_lists = first_lists(quantizer.config, steps)
        self.scanner: Scanner | None = None  # whose tables may stand for the codebooks

    def restore(self, codes: np.ndarray) -> np.ndarray:
        """What packed codes stand for, float32 `(n, hidden_size)`."""
        restored = self.quantizer.decompress(codes, self.steps, show_progress_bar=False)
        return normalized(restored) if self.quantizer.is_unit_norm else restored

    @cached_property
    def _exact(self) -> Scanner:
        """The tables of an additive quantizer, so that scores are the same before there is a scanner."""
        codewords = exact_codewords(self.quantizer, self.steps)
        width = bytes_per_vector(self.steps, self.quantizer.config.code_sizes)
        flat = np.zeros((1, codewords[0].shape[1]), np.float32)
        return Scanner(Tables(codewords, None, flat), width, "inner_product")

    def asked(self, queries: np.ndarray) -> np.ndarray:
        """Queries as scanners take them, float32 `(n, hidden_size)`."""
        return normalized(queries) if self.scanned == "cosine" else queries

    def widening(self, rescore: str) -> int:
        """How many times as many rows the tables are to choose as are ranked."""
        chosen = self.scanner is not None and self.scanner.tables.decoder is not None
        return WIDENING if chosen and rescore != "tables" else 1

    def narrowed(self, queries: np.ndarray, candidates: np.ndarray, count: int, known: Known) -> np.ndarray:
        """The candidates that are worth ranking, `(n, count)`: those that the approximate decoder ranks highest."""
        if candidates.shape[1] <= count or self.scanner is None or self.scanner.tables.decoder is None:
            return candidates
        return self.rank(queries, candidates, count, "approximate", known)[1]

    def rank(
        self, queries: np.ndarray, candidates: np.ndarray, count: int, rescore: str, known: Known
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best candidates by what they are restored to; the lower row first among equals.

        Args:
            queries: float32 `(n, hidden_size)`.
            candidates: Row numbers, int64 `(n, m)`; -1 where there is none.
            count: How many to keep of each query's.
            rescore: "floats", "codes", "approximate" or "tables".
            known: What is known of the rows.

        Returns:
            Scores `(n, count)`, highest first, and row numbers.
        """
        scores = np.empty((len(queries), count), np.float32)
        rows = np.empty((len(queries), count), np.int64)
        height = max(1, BLOCK // max(candidates.shape[1], 1))
        for start in range(0, len(queries), height):
            block = slice(start, start + height)
            best = np.empty((len(queries[block]), 0), np.float32)
            kept = np.empty((len(queries[block]), 0), np.int64)
            for left in range(0, candidates.shape[1], BLOCK):
                part = candidates[block, left : left + BLOCK]
                best = np.hstack([best, self._scores(queries[block], part, rescore, known)])
                kept = np.hstack([kept, part])
                order = np.lexsort((kept, -best), axis=1)[:, :count]
                best, kept = np.take_along_axis(best, order, 1), np.take_along_axis(kept, order, 1)
            scores[block], rows[block] = best, kept
        return scores, rows

    def _scores(self, queries: np.ndarray, rows: np.ndarray, rescore: str, known: Known) -> np.ndarray:
        """Scores of candidates `(n, m)`; minus infinity where there is none."""
        wanted, places = np.unique(rows, return_inverse=True)
        places = places.reshape(rows.shape)
        if not len(wanted) or wanted[-1] < 0:
            return np.full(rows.shape, -np.inf, np.float32)
        if wanted[0] < 0:  # there is one place without a row
            vectors = np.zeros((len(wanted), queries.shape[1]), np.float32)
            vectors[1:] = self._vectors_of(wanted[1:], rescore, known)
        else:
            vectors = self._vectors_of(wanted, rescore, known)
        near = vectors[places]  # (n, m, d)
        if self.metric == "l2":
            near -= queries[:, None]
            scores = -np.square(near, out=near).sum(axis=2)
        else:
            scores = np.einsum("nmd,nd->nm", near, queries)
        scores[rows < 0] = -np.inf
        return scores

    def _vectors_of(self, rows: np.ndarray, source: str, known: Known) -> np.ndarray:
        """What is known of rows, float32 `(n, hidden_size)`: their floats, reconstructions or sums of tables."""
        codes = known.packed_codes(rows) if isinstance(known, ScannedRows) else _looked_up(rows, known)
        by_tables = source == "tables" or not self.quantizer.config.has_experts  # which are exact then, and quicker
        tables = self.scanner
        if tables is None and not self.quantizer.config.has_experts:
            tables = self._exact
        try:
            if source == "approximate" and tables is not None:
                vectors = tables.restored(codes)
            else:
                vectors = tables.sums(codes) if by_tables and tables is not None else self.restore(codes)
        except ValueError as error:  # codes that no quantizer of these sizes makes
            raise DamagedRowsError(str(error).rstrip(".")) from error
        if source == "floats":
            kept = known.floats_of(rows)
            for place, row in enumerate(rows.tolist()):
                if row in kept:
                    vectors[place] = floats_array(kept[row], vectors.shape[1])
        return normalized(vectors) if self.normalizes else vectors


def _looked_up(rows: np.ndarray, known: KnowsRows) -> np.ndarray:
    """Packed codes of rows, uint8 `(n, bytes)`."""
    found = known.codes_of(rows)
    if len(found) < len(rows):
        raise ValueError(f"{known.file}: {FOREIGN}")
    return codes_array([found[row] for row in rows.tolist()])


def normalized(vectors: np.ndarray) -> np.ndarray:
    """The vectors at norm 1; those of norm 0 stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
