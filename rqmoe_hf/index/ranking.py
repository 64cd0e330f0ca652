"""The stages of a search: tables choose a shortlist, and what is known better ranks it."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..codes import bits_per_code, bytes_per_vector, sizes_of
from ..modeling_rqmoe import RQMoEModel
from .documents import DamagedRowsError, Database, State, codes_array, floats_array
from .scanning import FIT_ROWS, POINTS_PER_LIST, Scanner, exact_codewords, fit_scanner

FLAT_UP_TO = 50_000  # codes
GROWTH = 4  # tables and lists are made anew when the collection has grown so much
FOREIGN = "The snapshot of the index does not belong to its database: delete scan-*.safetensors; it is made anew."
BLOCK = 16_384  # vectors restored at a time
DECODE_UP_TO = 1_024  # rows that a filter leaves: scanning them would not pay
SHORTLIST = 100
LEAST_LISTS = 32


@dataclass
class Progress:
    """Up to where in the database a scanner has come, and on how many vectors it was fitted."""

    version: int
    row: int
    removal: int
    fitted: int


class Ranker:
    """Searches the codes of a database.

    Args:
        quantizer: The quantizer that made them.
        database: Where they are.
        steps: Codes per vector.
        metric: "cosine", "inner_product" or "l2".
        kind: "auto", "flat" or "ivf".
        num_lists: Inverted lists; None for the square root of the number of codes.
    """

    def __init__(
        self, quantizer: RQMoEModel, database: Database, steps: int, metric: str, kind: str, num_lists: int | None
    ):
        self.quantizer, self.database, self.steps = quantizer, database, steps
        self.metric, self.kind, self.num_lists = metric, kind, num_lists
        # Reconstructions are shorter than what they stand for; where that had norm 1, they are given it back.
        self.normalizes = metric == "cosine" or quantizer.is_unit_norm
        self.scanned = "cosine" if self.normalizes else metric  # among vectors of norm 1 all metrics rank alike
        self.scanner: Scanner | None = None
        self.progress = Progress(-1, 0, 0, 0)

    def restore(self, codes: np.ndarray) -> np.ndarray:
        """What packed codes stand for, float32 `(n, hidden_size)`."""
        restored = self.quantizer.decompress(codes, self.steps, show_progress_bar=False)
        return normalized(restored) if self.quantizer.is_unit_norm else restored

    # --- the scanner follows the database --------------------------------------------------------------------------

    def refresh(self, state: State) -> Scanner:
        """The scanner, brought up to date; inside of a transaction."""
        progress = self.progress
        if self.scanner is None or state.forgotten > progress.removal:
            return self.rebuild(state)
        if state.count > GROWTH * progress.fitted or (self._lists(state.count) > 1 and self.scanner.lists == 1):
            return self.rebuild(state)
        if state.version != progress.version:
            rows, removal = self.database.removed(progress.removal)
            self.scanner.remove(rows[rows <= progress.row])
            last = self._scan_from(self.scanner, progress.row)
            self.progress = Progress(state.version, last, removal, progress.fitted)
        if len(self.scanner) != state.count:  # a snapshot of another time
            return self.rebuild(state)
        return self.scanner

    def save(self, file: Path, state: State) -> None:
        """Writes a snapshot of the scanner, brought up to date; inside of a transaction."""
        self.refresh(state).save(file, vars(self.progress), self.quantizer.config.has_experts)

    def load(self, file: Path) -> bool:
        """Opens a snapshot instead of making a scanner; whether there is one.

        Raises:
            ValueError: If the file is no snapshot of this collection.
        """
        if not file.exists():
            return False
        sizes = sizes_of(self.steps, self.quantizer.config.code_sizes)
        bits, width = [bits_per_code(size) for size in sizes], bytes_per_vector(self.steps, sizes)
        known = None if self.quantizer.config.has_experts else exact_codewords(self.quantizer, self.steps)
        scanner, notes = Scanner.load(file, known, bits, width, self.scanned)
        expected = {field.name for field in fields(Progress)}
        if scanner.size != self.quantizer.config.hidden_size or set(notes) != expected or min(notes.values()) < 0:
            raise ValueError(f"{file} is no snapshot of this index: its notes do not fit. Delete it; it is made anew.")
        self.scanner, self.progress = scanner, Progress(**notes)
        return True

    def rebuild(self, state: State) -> Scanner:
        """A scanner with tables and lists fitted to what is there now."""
        sample, lists = self._sample(state.count), self._lists(state.count)
        try:
            scanner = fit_scanner(self.quantizer, sample, self.steps, self.scanned, lists)
        except ValueError as error:
            raise DamagedRowsError(str(error).rstrip(".")) from error
        removal = self.database.removed(self.progress.removal)[1]
        last = self._scan_from(scanner, 0)
        self.scanner = scanner
        self.progress = Progress(state.version, last, max(removal, state.forgotten), state.count)
        return scanner

    def _scan_from(self, scanner: Scanner, row: int) -> int:
        """Adds the rows above one; the highest row."""
        last = row

        def batches():
            nonlocal last
            for rows, codes in self.database.batches(row):
                last = int(rows[-1])
                yield rows, codes

        scanner.add(batches())
        return last

    def _sample(self, count: int) -> np.ndarray:
        """Codes of random rows, enough to fit tables and lists."""
        wanted = max(FIT_ROWS, POINTS_PER_LIST * self._lists(count))
        rows = self.database.matching(None)
        if len(rows) > wanted:
            rows = np.sort(np.random.default_rng(0).choice(rows, wanted, replace=False))
        return codes_array(list(self.database.codes_of(rows).values()))

    def _lists(self, count: int) -> int:
        if self.kind == "flat" or (self.kind == "auto" and count < FLAT_UP_TO):
            return 1
        return min(self.num_lists or round(count**0.5), max(count, 1))

    # --- searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        queries: np.ndarray,
        top_k: int,
        shortlist: int,
        rescore: str,
        nprobe: int | None,
        allowed: np.ndarray | None,
        state: State,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and row numbers `(n, k)`, highest score first; inside of a transaction.

        k is `top_k`, or what there is if that is less.

        Args:
            queries: float32 `(n, hidden_size)`, n >= 1.
            top_k: Hits per query.
            shortlist: Rows that the tables choose.
            rescore: "floats", "codes" or "tables".
            nprobe: Lists to scan; None for a sixteenth of them, at least 32.
            allowed: Consider only these rows, int64, ascending.
            state: That of the transaction.
        """
        total = state.count if allowed is None else len(allowed)
        count = min(top_k, total)
        shortlist = min(max(shortlist, count), total)
        if self.metric == "cosine":
            queries = normalized(queries)
        if not count:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        everything = shortlist == total or (allowed is not None and total <= DECODE_UP_TO)
        if everything and rescore != "tables":
            rows = self.database.matching(None) if allowed is None else allowed
            candidates = np.broadcast_to(rows, (len(queries), len(rows)))
        else:
            candidates = self._shortlist(queries, count, shortlist, nprobe, allowed, self.refresh(state))
        scores, rows = self._rank(queries, candidates, count, rescore)
        if (rows < 0).any():
            raise ValueError(f"{self.database.file}: {FOREIGN}")
        return scores, rows

    def _shortlist(
        self, queries, count: int, shortlist: int, nprobe: int | None, allowed, scanner: Scanner
    ) -> np.ndarray:
        """Rows that the tables rank highest, `(n, shortlist)`, -1 where there are fewer."""
        asked = normalized(queries) if self.scanned == "cosine" else queries
        probed = nprobe or max(LEAST_LISTS, scanner.lists // 16)
        rows = scanner.search(asked, shortlist, probed, allowed)[1]
        if allowed is None and probed < scanner.lists:
            short = (rows >= 0).sum(axis=1) < count  # the lists scanned hold too few
            if short.any():
                rows[short] = scanner.search(asked[short], shortlist, scanner.lists)[1]
        return rows

    def _rank(self, queries, candidates, count: int, rescore: str) -> tuple[np.ndarray, np.ndarray]:
        """The best candidates by what they are restored to; the lower row first among equals."""
        scores = np.empty((len(queries), count), np.float32)
        rows = np.empty((len(queries), count), np.int64)
        height = max(1, BLOCK // candidates.shape[1])
        for start in range(0, len(queries), height):
            block = slice(start, start + height)
            best = np.empty((len(queries[block]), 0), np.float32)
            kept = np.empty((len(queries[block]), 0), np.int64)
            for left in range(0, candidates.shape[1], BLOCK):
                part = candidates[block, left : left + BLOCK]
                best = np.hstack([best, self._scores(queries[block], part, rescore)])
                kept = np.hstack([kept, part])
                order = np.lexsort((kept, -best), axis=1)[:, :count]
                best, kept = np.take_along_axis(best, order, 1), np.take_along_axis(kept, order, 1)
            scores[block], rows[block] = best, kept
        return scores, rows

    def _scores(self, queries: np.ndarray, rows: np.ndarray, rescore: str) -> np.ndarray:
        """Scores of candidates `(n, m)`; minus infinity where there is none."""
        wanted, places = np.unique(rows, return_inverse=True)
        vectors = np.zeros((len(wanted), queries.shape[1]), np.float32)
        there = wanted >= 0
        if there.any():
            vectors[there] = self.vectors_of(wanted[there], rescore)
        vectors = vectors[places.reshape(rows.shape)]  # (n, m, d)
        if self.metric == "l2":
            scores = -np.square(vectors - queries[:, None]).sum(axis=2)
        else:
            scores = np.einsum("nmd,nd->nm", vectors, queries)
        scores[rows < 0] = -np.inf
        return scores

    def vectors_of(self, rows: np.ndarray, source: str) -> np.ndarray:
        """What is known of rows, float32 `(n, hidden_size)`: their floats, reconstructions or sums of tables."""
        found = self.database.codes_of(rows)
        if len(found) < len(rows):
            raise ValueError(f"{self.database.file}: {FOREIGN}")
        codes = codes_array([found[row] for row in rows.tolist()])
        by_tables = source == "tables" or not self.quantizer.config.has_experts  # which are exact then, and quicker
        try:
            vectors = self.scanner.sums(codes) if by_tables and self.scanner is not None else self.restore(codes)
        except ValueError as error:  # codes that no quantizer of these sizes makes
            raise DamagedRowsError(str(error).rstrip(".")) from error
        if source == "floats":
            kept = self.database.floats_of(rows)
            for place, row in enumerate(rows.tolist()):
                if row in kept:
                    vectors[place] = floats_array(kept[row], vectors.shape[1])
        return normalized(vectors) if self.normalizes else vectors


def normalized(vectors: np.ndarray) -> np.ndarray:
    """The vectors at norm 1; those of norm 0 stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
