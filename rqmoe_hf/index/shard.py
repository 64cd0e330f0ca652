"""What one shard answers when several are searched together, in this process or in another one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .documents import Document, Id, codes_array
from .filters import Filter
from .index import RQMoEIndex
from .scanning import Tables


@dataclass
class Facts:
    """What a shard is.

    Args:
        name: Names it in messages.
        settings: Of the collection.
        count: Vectors in it.
        id_type: "int" or "str"; None while it is empty.
        tables: Digest of the tables that score its codes; None if they are not made yet.
        fitted: On how many codes these were fitted.
        lists: Its inverted lists.
    """

    name: str
    settings: dict[str, Any]
    count: int
    id_type: str | None
    tables: str | None
    fitted: int
    lists: int


@dataclass
class Question:
    """What all shards are asked in one search.

    Args:
        queries: float32 `(n, hidden_size)`, as scanners take them.
        shortlist: Rows that are wanted of each query.
        share: Of the rows of all shards, how many that is.
        nprobe: Lists to scan.
        everything: Answer with all rows, unranked.
        floats: Answer with the floats that were kept, too.
        tables: Digest of the tables that give comparable scores.
        filter: Consider only documents that it holds for.
    """

    queries: np.ndarray
    shortlist: int
    share: float
    nprobe: int
    everything: bool
    floats: bool
    tables: str
    filter: Filter | None = None


@dataclass
class Candidates:
    """A shard's shortlist, and what ranking it needs.

    Args:
        scores: float32 `(n, m)`.
        rows: Row numbers in this shard, int64 `(n, m)`; -1 where there are no more.
        known: The row numbers among them, int64 `(k,)`, ascending.
        ids: Their ids.
        codes: Their packed codes, uint8 `(k, bytes)`.
        floats: Bytes of their float16 vectors by row number.
    """

    scores: np.ndarray
    rows: np.ndarray
    known: np.ndarray
    ids: list[Id]
    codes: np.ndarray
    floats: dict[int, bytes]


class Shard:
    """A collection as part of a larger one.

    Args:
        index: The collection.
    """

    def __init__(self, index: RQMoEIndex):
        self.index = index
        self._database, self._ranker = index._database, index._ranker
        if self._ranker.scanner is not None:  # stays with its tables, which the other shards have, too
            self.share(self._ranker.scanner.tables, self._ranker.progress.fitted)

    def facts(self) -> Facts:
        """What it is."""
        with self._database.reading() as state:
            kind, scanner, progress = self._database.id_type(), self._ranker.scanner, self._ranker.progress
            return Facts(
                str(self.index.folder or "an index without a folder"),
                self.index.settings,
                state.count,
                None if kind is None else kind.__name__,
                None if self._ranker.shared is None else self._ranker.shared.digest,
                progress.fitted,
                1 if scanner is None else scanner.lists,
            )

    # --- tables that all shards share ------------------------------------------------------------------------------

    def tables(self) -> Tables:
        """The tables that score its codes; there must be some."""
        if self._ranker.shared is None:
            raise ValueError(f"{self.facts().name} has no tables yet.")
        return self._ranker.shared

    def share(self, tables: Tables, fitted: int) -> None:
        """Scores by tables fitted on so many codes of all shards from now on."""
        with self._database.lock:
            self._ranker.share(tables, fitted)

    def rows(self) -> np.ndarray:
        """All row numbers, int64, ascending."""
        with self._database.reading():
            return self._database.matching(None)

    def codes_of(self, rows: np.ndarray) -> list[bytes]:
        """Packed codes of rows, by ascending row number."""
        with self._database.reading():
            found = self._database.codes_of(rows)
        return [found[row] for row in sorted(found)]

    # --- ids -------------------------------------------------------------------------------------------------------

    def keys(self) -> np.ndarray:
        """A number for each id, int64: different ones belong to different ids, equal ones most likely to equal ids."""
        with self._database.reading():
            ids = [ids for ids, _ in self.index.codes()]
        if not ids:
            return np.empty(0, np.int64)
        joined = np.concatenate(ids)
        if joined.dtype == np.int64:
            return joined
        digests = (hashlib.blake2b(id.encode(), digest_size=8).digest() for id in joined)
        return np.frombuffer(b"".join(digests), np.int64)

    def ids_of_keys(self, keys: np.ndarray) -> list[Id]:
        """The ids of some keys."""
        places = np.flatnonzero(np.isin(self.keys(), keys))
        ids = np.concatenate([ids for ids, _ in self.index.codes()])
        return ids[places].tolist()

    def find(self, ids: Sequence[Id]) -> list[Id]:
        """Those of the ids that are here."""
        with self._database.reading():
            found = self._database.find(ids)
        return [id for id in ids if id in found]

    def get(self, ids: Sequence[Id]) -> list[Document]:
        """Texts and metadata of those of the ids that are here."""
        return self.index.get(ids, missing_ok=True)

    def codes_of_ids(self, ids: Sequence[Id]) -> dict[Id, bytes]:
        """Packed codes of those of the ids that are here."""
        with self._database.reading():
            rows = self._database.find(ids)
            codes = self._database.codes_of(rows.values())
        return {id: codes[row] for id, row in rows.items()}

    # --- searching -------------------------------------------------------------------------------------------------

    def count(self, filter: Filter | None = None, ids: Sequence[Id] | None = None) -> int:
        """How many rows may be found."""
        with self._database.reading() as state:
            allowed = self.index._allowed(filter, ids)
            return state.count if allowed is None else len(allowed)

    def candidates(self, question: Question, ids: Sequence[Id] | None = None) -> Candidates:
        """The rows that rank highest here; of one committed state.

        Args:
            question: What is asked of all shards.
            ids: Consider only these.

        Raises:
            ValueError: If other tables score its codes than those of the question.
        """
        with self._database.reading() as state:
            allowed = self.index._allowed(question.filter, ids)
            if question.everything:
                rows = self._database.matching(None) if allowed is None else allowed
                rows = np.broadcast_to(rows, (len(question.queries), len(rows)))
                scores = np.zeros(rows.shape, np.float32)
            else:
                scanner = self._ranker.refresh(state)
                if scanner.tables.digest != question.tables:
                    raise ValueError(f"{self.facts().name} is scored by other tables by now: open the shards again.")
                total = state.count if allowed is None else len(allowed)
                count = max(1, min(question.shortlist, total))
                scores, rows = scanner.search(question.queries, count, question.nprobe, allowed, question.share)
            known = np.unique(rows)
            known = known[known >= 0]
            entries = self._database.ids_and_codes_of(known)
            names, codes = [entries[row][0] for row in known.tolist()], [entries[row][1] for row in known.tolist()]
            floats = self._database.floats_of(known) if question.floats else {}
            packed = codes_array(codes) if codes else np.empty((0, 0), np.uint8)
            return Candidates(scores, rows, known, names, packed, floats)
