"""The stages of a search: tables choose a shortlist, and what is known better ranks it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from ..codes import bits_per_code, bytes_per_vector, sizes_of
from ..data.sampling import sample_rows
from ..modeling_rqmoe import RQMoEModel
from .codewords import exact_codewords
from .documents import DamagedRowsError, Database, Id, State, codes_array
from .fitting import fit_scanner, rows_to_fit
from .rescoring import FOREIGN, Rescorer, ScannedRows, normalized
from .scanning import Scanner, Tables

FLAT_UP_TO = 50_000  # codes
GROWTH = 4  # tables and lists are made anew when the collection has grown so much
DECODE_UP_TO = 1_024  # rows that a filter leaves: scanning them would not pay
SHORTLIST = 100
LEAST_LISTS = 32
CANDIDATES = 1 << 20  # of some queries, whose rows and codes are in memory at a time


@dataclass
class Progress:
    """Up to where in the database a scanner has come, and on how many vectors it was fitted."""

    version: int
    row: int
    removal: int
    fitted: int


@dataclass(frozen=True)
class Plan:
    """What one search asks of the stages.

    Args:
        count: Hits per query.
        scanned: Rows that the tables choose.
        shortlist: Rows of these that are ranked, which an approximate decoder chooses if there are more.
        share: Of all rows that may be found, how many the tables choose.
        everything: Rank all rows that may be found, without the tables.
    """

    count: int
    scanned: int
    shortlist: int
    share: float
    everything: bool

    def widened(self, times: int, total: int) -> "Plan":
        """So many times as many rows of the tables, of `total`."""
        scanned = min(times * self.shortlist, total)
        return replace(self, scanned=scanned, share=scanned / max(total, 1))


def make_plan(total: int, top_k: int, shortlist: int, rescore: str, restricted: bool) -> Plan:
    """The plan of a search among `total` rows, which are all there are unless it is restricted to some."""
    count = min(top_k, total)
    shortlist = min(max(shortlist, count), total)
    few = shortlist == total or (restricted and total <= DECODE_UP_TO)
    return Plan(count, shortlist, shortlist, shortlist / max(total, 1), few and rescore != "tables")


def number_of_lists(kind: str, num_lists: int | None, count: int, first: int | None) -> int:
    """Inverted lists for so many codes, `first` where the first codes make them; 1 for a flat scan."""
    if kind == "flat" or (kind == "auto" and count < FLAT_UP_TO):
        return 1
    if first is not None and num_lists in (None, first):
        return first
    return min(num_lists or round(count**0.5), max(count, 1))


def sample_places(count: int, wanted: int) -> np.ndarray:
    """Which of so many rows, in their order, tables and lists are fitted to: their places, int64, ascending."""
    return sample_rows(count, min(count, wanted), np.random.default_rng(0))


def outgrown(count: int, fitted: int, lists: int, wanted_lists: int) -> bool:
    """Whether tables fitted on `fitted` rows are to be made anew for so many."""
    return count > GROWTH * fitted or (wanted_lists > 1 and lists == 1)


class RowsAbove:
    """Row numbers and codes above a row, batch by batch, read anew each time.

    Args:
        database: Where they are.
        row: The row.
    """

    def __init__(self, database: Database, row: int):
        self.database, self.row, self.last = database, row, row

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, codes in self.database.batches(self.row):
            self.last = int(rows[-1])
            yield rows, codes


class Ranker(Rescorer):
    """Searches the codes of a database.

    Args:
        quantizer: The quantizer that made them.
        database: Where they are.
        steps: Codes per vector.
        metric: "cosine", "inner_product" or "l2".
        kind: "auto", "flat" or "ivf".
        num_lists: Inverted lists; None for those that the first codes make, or the square root of the number of codes.
    """

    def __init__(
        self, quantizer: RQMoEModel, database: Database, steps: int, metric: str, kind: str, num_lists: int | None
    ):
        super().__init__(quantizer, steps, metric)
        self.database, self.kind, self.num_lists = database, kind, num_lists
        self.progress = Progress(-1, 0, 0, 0)
        self.shared: Tables | None = None  # with other shards, so that they are not fitted to this one's codes

    def share(self, tables: Tables, fitted: int) -> None:
        """Scores by tables fitted on so many codes of all shards from now on."""
        if self.scanner is None or self.scanner.tables.digest != tables.digest:
            self.scanner = None
        self.shared, self.progress.fitted = tables, fitted

    # --- the scanner follows the database --------------------------------------------------------------------------

    def refresh(self, state: State) -> Scanner:
        """The scanner, brought up to date; inside of a transaction."""
        progress = self.progress
        if self.scanner is None or state.forgotten > progress.removal:
            return self.rebuild(state)
        lists = self._lists(state)
        if self.shared is None and outgrown(state.count, progress.fitted, self.scanner.lists, lists):
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
        known = None if self.quantizer.config.has_experts else exact_codewords(self.quantizer, self.steps)
        bits = [bits_per_code(size) for size in sizes]
        scanner, notes = Scanner.load(file, known, bits, self.first_lists, self.scanned)
        expected = {field.name for field in fields(Progress)}
        if scanner.size != self.quantizer.config.hidden_size or set(notes) != expected or min(notes.values()) < 0:
            raise ValueError(f"{file} is no snapshot of this index: its notes do not fit. Delete it; it is made anew.")
        self.scanner, self.progress = scanner, Progress(**notes)
        return True

    def refit(self, state: State, anew: bool = True) -> None:
        """The scanner made anew, or brought up to date; none if there is nothing to fit it to."""
        if not state.count and self.shared is None:
            self.scanner = None
        elif anew:
            self.rebuild(state)
        else:
            self.refresh(state)

    def rebuild(self, state: State) -> Scanner:
        """A scanner with tables and lists fitted to what is there now, or shared ones."""
        scanner, fitted = self._empty(state), state.count if self.shared is None else self.progress.fitted
        removal = max(self.database.last_removal(), self.progress.removal)
        last = self._scan_from(scanner, 0)
        self.scanner = scanner
        self.progress = Progress(state.version, last, max(removal, state.forgotten), fitted)
        return scanner

    def _scan_from(self, scanner: Scanner, row: int) -> int:
        """Adds the rows above one; the highest row."""
        above = RowsAbove(self.database, row)
        scanner.add(above)
        return above.last

    def _lists(self, state: State) -> int:
        """Inverted lists for what is there now."""
        return number_of_lists(self.kind, self.num_lists, state.count, self.first_lists)

    def _empty(self, state: State) -> Scanner:
        """A scanner without rows."""
        if self.shared is not None:
            sizes = sizes_of(self.steps, self.quantizer.config.code_sizes)
            return Scanner(replace(self.shared), bytes_per_vector(self.steps, sizes), self.scanned)
        lists = self._lists(state)
        places = sample_places(state.count, rows_to_fit(self.quantizer, lists))
        rows = self.database.rows_at(places)
        if not len(places) or len(rows) != len(places):
            raise DamagedRowsError(f"its state counts {state.count} rows, and there are others or fewer")
        codes = codes_array(list(self.database.codes_of(rows).values()))
        try:
            return fit_scanner(self.quantizer, codes, self.steps, self.scanned, lists)
        except ValueError as error:
            raise DamagedRowsError(str(error).rstrip(".")) from error

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
    ) -> tuple[np.ndarray, np.ndarray, dict[int, Id]]:
        """Scores and row numbers `(n, k)`, highest score first, and ids by row number; inside of a transaction.

        k is `top_k`, or what there is if that is less.

        Args:
            queries: float32 `(n, hidden_size)`, n >= 1.
            top_k: Hits per query.
            shortlist: Rows that are ranked.
            rescore: "floats", "codes" or "tables".
            nprobe: Lists to scan; None for a sixteenth of them, at least 32.
            allowed: Consider only these rows, int64, ascending.
            state: That of the transaction.
        """
        total = state.count if allowed is None else len(allowed)
        plan = make_plan(total, top_k, shortlist, rescore, allowed is not None)
        if self.metric == "cosine":
            queries = normalized(queries)
        if not plan.count:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), {}
        if plan.everything:
            allowed = self.database.matching(None) if allowed is None else allowed
        else:
            self.refresh(state)
            plan = plan.widened(self.widening(rescore), total)
        height = max(1, CANDIDATES // max(plan.scanned, 1))
        parts = [
            self._ranked(queries[start : start + height], plan, rescore, nprobe, allowed)
            for start in range(0, len(queries), height)
        ]
        scores, rows = (np.concatenate(arrays) for arrays in zip(*(part[:2] for part in parts), strict=True))
        return scores, rows, {row: id for part in parts for row, id in part[2].items()}

    def _ranked(
        self, queries: np.ndarray, plan: Plan, rescore: str, nprobe: int | None, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, Id]]:
        """What [`search`] returns, of a few queries."""
        known: Database | ScannedRows = self.database
        if plan.everything and allowed is not None:
            candidates = np.broadcast_to(allowed, (len(queries), len(allowed)))
        else:
            assert self.scanner is not None  # up to date
            candidates, codes = self._shortlist(queries, plan, nprobe, allowed, self.scanner)
            if codes is not None:
                known = ScannedRows(candidates, codes, self.database)
            candidates = self.narrowed(queries, candidates, plan.shortlist, known)
        scores, rows = self.rank(queries, candidates, plan.count, rescore, known)
        if (rows < 0).any():
            raise ValueError(f"{self.database.file}: {FOREIGN}")
        return scores, rows, self._ids(np.unique(rows), known)

    def _ids(self, rows: np.ndarray, known: Database | ScannedRows) -> dict[int, Id]:
        """Ids by row number; what a scan has read of the rows must be what the database holds."""
        found = self.database.ids_and_codes_of(rows)
        foreign = len(found) < len(rows)
        if isinstance(known, ScannedRows) and not foreign:
            foreign = [found[row][1] for row in rows.tolist()] != [code.tobytes() for code in known.packed_codes(rows)]
        if foreign:
            raise ValueError(f"{self.database.file}: {FOREIGN}")
        return {row: id for row, (id, _) in found.items()}

    def _shortlist(
        self, queries: np.ndarray, plan: Plan, nprobe: int | None, allowed: np.ndarray | None, scanner: Scanner
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows that the tables rank highest, `(n, scanned)`, -1 where there are fewer, and their codes if read."""
        asked, probed = self.asked(queries), probed_lists(nprobe, scanner.lists)
        rows, codes = scanner.candidates(asked, plan.scanned, probed, allowed)
        if allowed is None and probed < scanner.lists:
            short = (rows >= 0).sum(axis=1) < plan.count  # the lists scanned hold too few
            if short.any():
                rows[short], more = scanner.candidates(asked[short], plan.scanned, scanner.lists)
                if codes is not None:
                    codes[short] = more
        return rows, codes


def probed_lists(nprobe: int | None, lists: int) -> int:
    """Lists to scan: what is asked for, otherwise a sixteenth of them, at least 32."""
    return nprobe or max(LEAST_LISTS, lists // 16)
