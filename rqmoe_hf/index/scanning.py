"""The first stage of a search: Faiss scans packed codes by look-up tables. Nothing else here knows Faiss.

A code's score is the query's inner product with a sum of table vectors, one per code (see `rqmoe_hf.additive`). What
ranks by cosine or by distance needs the norm of that sum, too. It is one more code, of 8 bits, whose look-up table
says what each norm adds to the score: -|x|^2 / 2 for distances; -c |x| for cosines, so that the codes whose cosine
is above c are exactly those whose score is above 0. If c is the cosine at which the shortlist ends, the shortlist is
therefore the one by cosine; the cosines with a sample of the codes tell where that is, closely enough.

Faiss's inverted lists of additive codes compute a query's look-up tables again for every list, which costs more than
scanning it. Here they are computed once, for many queries in one product, and given to Faiss as the codebooks of a
quantizer in which every query is 1 (see `scans`).

Where the inverted lists are the first codes (see `first_codes`), Faiss adds to the scores of a list what its first
code adds: the query's inner product with the list's centroid. Which lists are scanned is decided as ever: by distance
for "l2", by cosine for "cosine".
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from ..codes import unpack_codes
from ..least_squares import starts_of
from ..saving import write_tensors
from .approximate import ApproximateDecoder
from .documents import DamagedRowsError
from .first_codes import first_codes, joined_codes, other_codes
from .mapped import MappedLists
from .scans import (
    empty_index,
    entries_at,
    entry_of,
    mapping,
    scan,
    scan_soon,
    scans_bytes,
    settle_ties,
    summable,
    workers_for,
)
from .snapshots import check_arrays, span_of, taken

NORM_LEVELS = 256
SPOOLED_BYTES = 1 << 20  # of list numbers that stay in memory
GATHERED_ROWS = 1 << 18  # that are in memory beside the lists while they are added
MARKS = 1 << 30  # row numbers up to which a table tells which rows are wanted
QUERIES = 256  # whose look-up tables are in memory at a time
LEAST_QUERIES = 16  # that are worth a product of their own
DECODER = "decoder."  # begins the names of its arrays in a snapshot


@dataclass
class Tables:
    """What codes are scored by.

    Args:
        codewords: One float32 `(2 ** bits, hidden_size)` per code; the reconstruction's mean is part of the first.
        norms: Norm that each value of the norm's code stands for, float32 `(256,)`; None if norms are not needed.
        centroids: float32 `(lists, hidden_size)` of the inverted lists; one for a flat scan.
        probes: Sums of a sample of codes at norm 1, float32 `(p, hidden_size)`; for "cosine" only.
        by_first_code: The inverted lists are the first codes, and `centroids` what the first of `codewords` says.
        decoder: Restores more than their sums; None if there is none.
    """

    codewords: list[np.ndarray]
    norms: np.ndarray | None
    centroids: np.ndarray
    probes: np.ndarray | None = None
    by_first_code: bool = False
    decoder: ApproximateDecoder | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all of it: codes scored by equal tables have comparable scores."""
        digest = hashlib.sha256(b"by first code" if self.by_first_code else b"")
        weights = () if self.decoder is None else self.decoder.arrays().values()
        for array in (*self.codewords, self.norms, self.centroids, self.probes, *weights):
            digest.update(b"none" if array is None else repr(array.shape).encode() + array.tobytes())
        return digest.hexdigest()


class Scanner:
    """Codes in inverted lists, by row number.

    Args:
        tables: What they are scored by.
        code_bytes: Bytes of a packed code, as it is added.
        metric: "cosine", "inner_product" or "l2", of the sums of the tables.
    """

    def __init__(self, tables: Tables, code_bytes: int, metric: str):
        import faiss

        self.tables, self.metric, self.code_bytes = tables, metric, code_bytes
        self._bits = [len(table).bit_length() - 1 for table in tables.codewords]
        if code_bytes != -(-sum(self._bits) // 8):  # Faiss would read on behind each code
            raise DamagedRowsError(f"its codes have {code_bytes} bytes, not {-(-sum(self._bits) // 8)}")
        self._codewords = np.concatenate(tables.codewords)
        tables.codewords = np.split(self._codewords, np.cumsum([1 << bits for bits in self._bits])[:-1])
        self._scanned, centroids = self._bits, tables.centroids
        if tables.by_first_code:
            self._scanned, tables.centroids = self._bits[1:], tables.codewords[0][: len(centroids)]
            centroids = F.normalize(torch.from_numpy(centroids)).numpy() if metric == "cosine" else centroids
        self._scanned_bytes = -(-sum(self._scanned) // 8)
        self._unused = 8 * self._scanned_bytes - sum(self._scanned)
        by_distance = metric == "l2"
        self._coarse = faiss.IndexFlat(
            self._codewords.shape[1], faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        )
        self._coarse.add(np.ascontiguousarray(centroids))
        self._index = self._made(len(centroids))
        self._mapped: MappedLists | None = None

    def _made(self, lists: int, with_first: bool = False) -> Any:
        """An empty Faiss index whose look-up tables are its codebooks.

        Args:
            lists: Inverted lists.
            with_first: First codes are not told by the list, but stand behind the others.
        """
        behind = [8] * (self.tables.norms is not None) + self._bits[:1] * with_first
        unused = [self._unused] if behind and self._unused else []  # what is behind the codes begins at a whole byte
        by_list = self.tables.by_first_code and not with_first  # scores count from what is given for a list
        return empty_index([*self._scanned, *unused, *behind], lists, by_list)

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def lists(self) -> int:
        """Inverted lists; 1 is a flat scan."""
        return self._index.nlist

    @property
    def bytes_per_vector(self) -> int:
        """Bytes in memory for each vector: its code, less what the list tells, that of its norm, row number."""
        return self._index.code_size + 8

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self._codewords.shape[1]

    def sums(self, codes: np.ndarray) -> np.ndarray:
        """What the tables restore of packed codes, float32 `(n, hidden_size)`."""
        return F.embedding_bag(self.rows_of(codes), torch.from_numpy(self._codewords), mode="sum").numpy()

    def restored(self, codes: np.ndarray) -> np.ndarray:
        """What the approximate decoder restores, or the tables where there is none, float32 `(n, hidden_size)`."""
        decoder = self.tables.decoder
        return self.sums(codes) if decoder is None else decoder.restored(self.rows_of(codes))

    def rows_of(self, codes: np.ndarray) -> torch.Tensor:
        """Numbers of the codewords that packed codes name, int64 `(n, codes)`."""
        sizes = [1 << bits for bits in self._bits]
        return torch.from_numpy(unpack_codes(codes, len(sizes), sizes) + starts_of(sizes))

    def add(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds rows, int64 `(n,)`, and their packed codes, uint8 `(n, bytes)`, batch by batch.

        The first time through it is found out how long the lists will be, so that they get their place at once: a
        list that outgrows its place is copied, and what it takes then is up to twice what it needs. Which list each
        vector belongs to is kept in a temporary file meanwhile.

        Args:
            batches: Gives the same batches each time that it is gone through. If it fails the second time, some may
                be in.

        Raises:
            ValueError: If it can be gone through only once, or has more rows the second time.
        """
        if iter(batches) is batches:
            raise ValueError("The batches are gone through twice, got an iterator: give a list of them.")
        counts, kind = np.zeros(self.lists, np.int64), np.dtype(np.uint16 if self.lists <= 1 << 16 else np.int32)
        with SpooledTemporaryFile(SPOOLED_BYTES) as assigned:
            for _, codes in batches:
                lists = self._lists_of(codes)
                counts += np.bincount(lists, minlength=self.lists)
                assigned.write(lists.astype(kind).tobytes())
            if not counts.any():
                return
            assigned.seek(0)
            self._own()
            self._make_room(counts)
            self._fill(batches, lambda count: np.frombuffer(assigned.read(count * kind.itemsize), kind))

    def _fill(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], next_lists: Callable[[int], np.ndarray]) -> None:
        """Adds batches whose lists are known and have the place for them."""
        gathered: list[tuple[np.ndarray, ...]] = []
        for rows, codes in batches:
            lists = next_lists(len(codes))
            if len(lists) != len(codes):
                raise ValueError("The batches that are to be added have more rows the second time.")
            gathered.append((rows, self._scannable(codes), lists))
            if sum(len(part[0]) for part in gathered) >= GATHERED_ROWS:
                self._append(gathered)
                gathered.clear()
        if gathered:
            self._append(gathered)

    def _make_room(self, counts: np.ndarray) -> None:
        """Lets each list have the place for so many more: what it has been once, it keeps the place for."""
        lists = self._index.invlists
        for number in np.flatnonzero(counts).tolist():
            size = lists.list_size(number)
            lists.resize(number, size + int(counts[number]))
            lists.resize(number, size)

    def _append(self, parts: list[tuple[np.ndarray, ...]]) -> None:
        """Adds row numbers with the codes that are scanned, and the lists that they belong to."""
        import faiss

        rows, codes, lists = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(lists, kind="stable")
        ends = np.searchsorted(lists[order], np.arange(self.lists + 1))
        for number, (start, stop) in enumerate(pairwise(ends)):
            if stop > start:
                part = rows[order[start:stop]], codes[order[start:stop]]
                self._index.invlists.add_entries(number, len(part[0]), *map(faiss.swig_ptr, part))
        self._index.ntotal += len(rows)

    def _lists_of(self, codes: np.ndarray) -> np.ndarray:
        """The list that each of the codes belongs to."""
        if codes.shape[1] != self.code_bytes:  # Faiss would read on behind them
            raise DamagedRowsError(f"its codes have {codes.shape[1]} bytes, not {self.code_bytes}")
        if self.tables.by_first_code:
            lists = first_codes(codes, self._bits[0])
            if lists.max(initial=0) >= self.lists:  # Faiss would write behind the lists
                raise DamagedRowsError(f"one of its first codes is {lists.max()}, of {self.lists} codewords")
            return lists
        if self.lists == 1:
            return np.zeros(len(codes), np.uint16)
        return self._coarse.search(self.sums(codes), 1)[1][:, 0]

    def _scannable(self, codes: np.ndarray) -> np.ndarray:
        """Codes as the lists hold them: without first codes that the list tells, and with that of the norm, a byte."""
        scanned = codes
        if self.tables.by_first_code:
            scanned = other_codes(codes, self._bits[0], self._scanned_bytes)
        if self.tables.norms is None:
            return scanned
        low, high = self.tables.norms[[0, -1]]
        levels = (np.linalg.norm(self.sums(codes), axis=1) - low) / max(high - low, 1e-12) * (NORM_LEVELS - 1)
        return np.hstack([scanned, np.clip(np.rint(levels), 0, NORM_LEVELS - 1).astype(np.uint8)[:, None]])

    def remove(self, rows: np.ndarray) -> None:
        """Drops rows; those that are not there are passed over."""
        import faiss

        if len(rows):
            self._own()
            self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(rows, np.int64)))

    def search(
        self,
        queries: np.ndarray,
        count: int,
        nprobe: int,
        rows: np.ndarray | None = None,
        share: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of highest score; of those with the last score, the lowest rows.

        Args:
            queries: float32 `(n, hidden_size)`, for "cosine" of norm 1.
            count: Rows per query.
            nprobe: Lists to scan.
            rows: Scan only these, int64, ascending; lists play no part then.
            share: Of all rows, also those of other scanners with these tables, how many `count` are: what cosines are
                measured at. None if there are no others.

        Returns:
            Scores `(n, count)`, highest first, and row numbers; -1 where there are no more.
        """
        scores, index, places = self._scan(queries, count, nprobe, rows, share)
        return scores, self._entries_at(index, places)[0]

    def candidates(
        self, queries: np.ndarray, count: int, nprobe: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows of [`search`], and their packed codes, uint8 `(n, count, bytes)`, if the lists tell them."""
        _, index, places = self._scan(queries, count, nprobe, rows, None)
        found, codes = self._entries_at(index, places)
        return found, None if self.tables.by_first_code else codes[..., : self.code_bytes]

    def _entries_at(self, index: Any, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and codes at places in this scanner's index or in one of [`_only`] some rows."""
        if index is self._index and self._mapped is not None:
            return self._mapped.entries_at(places)
        return entries_at(index, places)

    def _scan(
        self, queries: np.ndarray, count: int, nprobe: int, rows: np.ndarray | None, share: float | None
    ) -> tuple[np.ndarray, Any, np.ndarray]:
        """Scores of [`search`], the index that was scanned, and places in it."""
        index, chosen = self._index, np.zeros((len(queries), 1), np.int64)
        if rows is not None:
            index = self._only(rows)
        elif self.lists > 1:
            chosen = self._coarse.search(queries, min(nprobe, self.lists))[1]
        share = count / max(index.ntotal, 1) if share is None else share
        scores = np.empty((len(queries), count + 1), np.float32)  # one more tells whether the last has equals
        found = np.empty((len(queries), count + 1), np.int64)
        with mapping(workers := workers_for(len(queries))) as each:
            indexes = [index, *(self._sharing(index) for _ in range(1, workers))]
            parts = zip(*(np.array_split(array, workers) for array in (queries, chosen, scores, found)), strict=True)
            work = partial(self._scan_part, share=share, only=rows is not None, workers=workers)
            list(each(work, indexes, *zip(*parts, strict=True)))
        return scores[:, :count], index, found[:, :count]

    def _scan_part(
        self,
        index: Any,
        queries: np.ndarray,
        chosen: np.ndarray,
        scores: np.ndarray,
        found: np.ndarray,
        share: float,
        only: bool,
        workers: int,
    ) -> None:
        """One thread's part of [`_scan`], a few queries at a time; fills in scores and places."""
        height = max(QUERIES // workers, LEAST_QUERIES)
        for start in range(0, len(queries), height):
            block = slice(start, start + height)
            tables = self._look_ups(queries[block], share, chosen[block], only)
            if scans_bytes(index):
                summable(tables[0])
            arrays = *tables, chosen[block], scores[block], found[block]
            (scan_soon if workers == 1 else scan)(index, *arrays)
            settle_ties(index, *arrays)

    def _sharing(self, index: Any) -> Any:
        """Another index over the same lists, for look-up tables of its own."""
        other = self._made(index.nlist, self.tables.by_first_code and not index.by_residual)
        other.replace_invlists(index.invlists, False)
        other.ntotal = index.ntotal
        return other

    def _look_ups(
        self, queries: np.ndarray, share: float, chosen: np.ndarray, only: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """What every value of every code adds to the score, `(n, values of all codes)`, and what the chosen lists add.

        Args:
            queries: float32 `(n, hidden_size)`.
            share: Of all rows that are wanted.
            chosen: Lists to scan, `(n, nprobe)`.
            only: For an index of [`_only`] some rows.
        """
        norms, values = self.tables.norms, len(self._codewords)
        first = len(self.tables.codewords[0]) if self.tables.by_first_code else 0
        levels, again = 0 if norms is None else NORM_LEVELS, first if only else 0
        norm = values + (1 << self._unused if self._unused and levels + again else 0)  # where those of the norm begin
        look_ups = np.zeros((len(queries), norm + levels + again), np.float32)
        np.matmul(queries, self._codewords.T, out=look_ups[:, :values])  # in place: copies take as long as the product
        if norms is not None:
            shares = -0.5 * norms**2 if self.metric == "l2" else -self.thresholds(queries, share)[:, None] * norms
            look_ups[:, norm : norm + levels] = shares
        if again:
            look_ups[:, -again:] = look_ups[:, :again]
        by_list = first and not only
        added = np.take_along_axis(look_ups, chosen, 1) if by_list else np.zeros(chosen.shape, np.float32)
        return look_ups[:, first:], added

    def thresholds(self, queries: np.ndarray, share: float) -> np.ndarray:
        """The cosine that about a share of all codes exceeds, for each query: float32 `(n,)`."""
        probes = self.tables.probes
        if probes is None:
            return np.zeros(len(queries), np.float32)
        rank = min(max(int(np.ceil(share * len(probes))), 1), len(probes))
        return np.partition(queries @ probes.T, -rank, axis=1)[:, -rank]

    def _only(self, rows: np.ndarray):
        """An index of one list with some rows, since Faiss's additive scanners cannot leave rows out."""
        import faiss

        index = self._made(1, self.tables.by_first_code)
        marks = np.zeros(int(rows[-1]) + 1 if len(rows) and rows[-1] < MARKS else 0, bool)
        if len(marks):
            marks[rows] = True
        kept, sizes = [], np.zeros(self.lists, np.int64)
        for number in range(self.lists):
            ids, codes = self._list(number)
            if len(marks):
                inside = (ids >= 0) & (ids < len(marks))
                inside[inside] = marks[ids[inside]]
            else:
                inside = np.isin(ids, rows)
            kept.append((ids[inside], codes[inside]))
            sizes[number] = len(kept[-1][0])
        ids, codes = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        if self.tables.by_first_code:
            codes = joined_codes(codes, np.repeat(np.arange(self.lists), sizes), self._bits[0])
        if len(ids):
            index.invlists.add_entries(0, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
            index.ntotal = len(ids)
        return index

    def _list(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and codes of one list, views of Faiss's memory."""
        return entry_of(self._index.invlists, number, self._index.code_size)

    # --- snapshots -----------------------------------------------------------------------------------------------

    def save(self, file: Path, notes: dict[str, int], with_codewords: bool) -> None:
        """Writes a snapshot: arrays only, of which the lists are laid out as Faiss reads them from a memory map.

        One of lists by first code has no centroids, since the quantizer gives them.

        Args:
            file: Where to.
            notes: Integers that [`load`] gives back.
            with_codewords: Store the tables, because the quantizer does not give them.
        """
        lists = self._index.invlists
        arrays = {"sizes": np.array([lists.list_size(number) for number in range(self.lists)], np.int64)}
        more = {"norms": self.tables.norms, "probes": self.tables.probes}
        more["centroids"] = None if self.tables.by_first_code else self.tables.centroids
        arrays |= {name: array for name, array in more.items() if array is not None}
        if with_codewords:
            arrays["codewords"] = np.concatenate(self.tables.codewords)
        if self.tables.decoder is not None:
            arrays |= {f"{DECODER}{name}": array for name, array in self.tables.decoder.arrays().items()}
        parts = (array for number in range(self.lists) for array in reversed(self._list(number)))
        size = len(self) * (self._index.code_size + 8)
        write_tensors(file, arrays, "lists", size, parts, {name: str(value) for name, value in notes.items()})

    @classmethod
    def load(
        cls, file: Path, codewords: list[np.ndarray] | None, bits: list[int], first: int | None, metric: str
    ) -> tuple["Scanner", dict[str, int]]:
        """Opens a snapshot; its lists stay in the file until they are changed.

        Args:
            file: Of [`save`].
            codewords: The tables, if they are not in the file.
            bits: Bits of each code.
            first: Lists that the first codes make; None where lists are not to be made of them.
            metric: As it was.

        Returns:
            The scanner and the notes.

        Raises:
            ValueError: If the file does not fit.
        """
        try:
            with safe_open(file, "numpy") as opened:
                notes = {name: int(value) for name, value in opened.metadata().items()}
                arrays = {name: opened.get_tensor(name) for name in opened.keys() if name != "lists"}  # noqa: SIM118
            weights = taken(arrays, DECODER)
            by_first = "centroids" not in arrays
            if by_first and first is not None and codewords is not None:
                arrays["centroids"] = codewords[0][:first]
            check_arrays(arrays, codewords, bits, metric, NORM_LEVELS)
            if codewords is None:
                codewords = np.split(arrays["codewords"], np.cumsum([1 << width for width in bits])[:-1])
            shape = sum(map(len, codewords)), codewords[0].shape[1]
            decoder = ApproximateDecoder.of(weights, *shape) if weights else None
            rest = arrays.get("norms"), arrays["centroids"], arrays.get("probes"), by_first, decoder
            tables = Tables(codewords, *rest)
            scanner = cls(tables, -(-sum(bits) // 8), metric)
            scanner._map(file, arrays["sizes"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{file} is no snapshot of this index: {error}. Delete it; it is made anew.") from error
        return scanner, notes

    def _map(self, file: Path, sizes: np.ndarray) -> None:
        """Lets Faiss read the lists from the file."""
        if len(sizes) != self.lists:
            raise ValueError(f"it has {len(sizes)} lists, not {self.lists}")
        self._mapped = MappedLists(file, *span_of(file, "lists"), sizes, self._index.code_size)
        self._index.replace_invlists(self._mapped.lists, False)
        self._index.ntotal = int(sizes.sum())

    def _own(self) -> None:
        """Copies lists out of a memory map, before they are changed."""
        if self._mapped is None:
            return
        lists = self._mapped.copied()
        lists.this.disown()
        self._index.replace_invlists(lists, True)
        self._mapped = None
