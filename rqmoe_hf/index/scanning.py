"""The first stage of a search: Faiss scans packed codes by look-up tables. Nothing else here knows Faiss.

A code's score is the query's inner product with a sum of table vectors, one per code (see `rqmoe_hf.additive`). What
ranks by cosine or by distance needs the norm of that sum, too. It is one more code, of 8 bits, whose look-up table
says what each norm adds to the score: -|x|^2 / 2 for distances; -c |x| for cosines, so that the codes whose cosine
is above c are exactly those whose score is above 0. If c is the cosine at which the shortlist ends, the shortlist is
therefore the one by cosine; the cosines with a sample of the codes tell where that is, closely enough.

Faiss's inverted lists of additive codes compute a query's look-up tables again for every list, which costs more than
scanning it. Here they are computed once, for many queries in one product, and given to Faiss as the codebooks of a
quantizer of one dimension, in which every query is 1.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from ..additive import faiss_widths
from ..codes import unpack_codes
from ..least_squares import starts_of
from ..modeling_rqmoe import RQMoEModel
from ..saving import write_tensors
from .codewords import exact_codewords, fit_codewords
from .documents import DamagedRowsError

NORM_LEVELS = 256
FIT_ROWS = 32_768
POINTS_PER_LIST = 48
ITERATIONS = 10
PROBES = 1_024
GATHERED_ROWS = 1 << 18  # that are in memory beside the lists while they are added
MARKS = 1 << 30  # row numbers up to which a table tells which rows are wanted
QUERIES = 256  # whose look-up tables are computed at a time


@dataclass
class Tables:
    """What codes are scored by.

    Args:
        codewords: One float32 `(2 ** bits, hidden_size)` per code; the reconstruction's mean is part of the first.
        norms: Norm that each value of the norm's code stands for, float32 `(256,)`; None if norms are not needed.
        centroids: float32 `(lists, hidden_size)` of the inverted lists; one for a flat scan.
        probes: Sums of a sample of codes at norm 1, float32 `(p, hidden_size)`; for "cosine" only.
    """

    codewords: list[np.ndarray]
    norms: np.ndarray | None
    centroids: np.ndarray
    probes: np.ndarray | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all of it: codes scored by equal tables have comparable scores."""
        digest = hashlib.sha256()
        for array in (*self.codewords, self.norms, self.centroids, self.probes):
            digest.update(b"none" if array is None else repr(array.shape).encode() + array.tobytes())
        return digest.hexdigest()


class Scanner:
    """Codes in inverted lists, by row number.

    Args:
        tables: What they are scored by.
        code_bytes: Bytes of a packed code.
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
        by_distance = metric == "l2"
        self._coarse = faiss.IndexFlat(
            self._codewords.shape[1], faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        )
        self._coarse.add(np.ascontiguousarray(tables.centroids))
        self._index = self._made(len(tables.centroids))
        self._mapped: Any = None  # lists in a memory map

    def _made(self, lists: int) -> Any:
        """An empty Faiss index whose look-up tables are its codebooks."""
        import faiss

        bits, unused = self._bits, 8 * self.code_bytes - sum(self._bits)
        if self.tables.norms is not None:  # the norm's code begins at a whole byte
            bits = [*bits, *([unused] if unused else []), 8]
        inner, nonorm = faiss.METRIC_INNER_PRODUCT, faiss.AdditiveQuantizer.ST_LUT_nonorm
        unit = faiss.IndexFlatIP(1)
        index: Any = faiss.IndexIVFResidualQuantizer(unit, 1, lists, faiss_widths(bits), inner, nonorm)
        index.referenced_objects = [unit]
        index.by_residual = False
        faiss.copy_array_to_vector(np.zeros(sum(1 << width for width in bits), np.float32), index.rq.codebooks)
        index.rq.is_trained = index.is_trained = True
        return index

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def lists(self) -> int:
        """Inverted lists; 1 is a flat scan."""
        return self._index.nlist

    @property
    def bytes_per_vector(self) -> int:
        """Bytes in memory for each vector: its code, the code of its norm and its row number."""
        return self._index.code_size + 8

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self._codewords.shape[1]

    def sums(self, codes: np.ndarray) -> np.ndarray:
        """What the tables restore of packed codes, float32 `(n, hidden_size)`."""
        sizes = [1 << bits for bits in self._bits]
        rows = torch.from_numpy(unpack_codes(codes, len(sizes), sizes) + starts_of(sizes))
        return F.embedding_bag(rows, torch.from_numpy(self._codewords), mode="sum").numpy()

    def add(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds rows, int64 `(n,)`, and their packed codes, uint8 `(n, bytes)`, batch by batch.

        The first time through it is found out how long the lists will be, so that they get their place at once: a
        list that outgrows its place is copied, and what it takes then is up to twice what it needs. Beside the lists,
        what is kept for each vector meanwhile are its list and the code of its norm, 3 bytes.

        Args:
            batches: Gives the same batches each time that it is gone through. If it fails the second time, some may
                be in.

        Raises:
            ValueError: If it can be gone through only once.
        """
        if iter(batches) is batches:
            raise ValueError("The batches are gone through twice, got an iterator: give a list of them.")
        assigned = [self._assigned(codes) for _, codes in batches]
        if not assigned:
            return
        self._own()
        counts = np.zeros(self.lists, np.int64)
        for lists, _ in assigned:
            counts += np.bincount(lists, minlength=self.lists)
        self._make_room(counts)
        gathered: list[tuple[np.ndarray, ...]] = []
        for (rows, codes), (lists, levels) in zip(batches, assigned, strict=True):
            gathered.append((rows, codes if levels is None else np.hstack([codes, levels[:, None]]), lists))
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

    def _assigned(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The list that each of the codes belongs to, and the code of its norm, uint8, if norms are needed."""
        if codes.shape[1] != self.code_bytes:  # Faiss would read on behind them
            raise DamagedRowsError(f"its codes have {codes.shape[1]} bytes, not {self.code_bytes}")
        lists, levels = np.zeros(len(codes), np.uint16 if self.lists <= 1 << 16 else np.int32), None
        if self.lists == 1 and self.tables.norms is None:
            return lists, None
        sums = self.sums(codes)
        if self.lists > 1:
            lists[:] = self._coarse.search(sums, 1)[1][:, 0]
        if self.tables.norms is not None:
            low, high = self.tables.norms[[0, -1]]
            levels = (np.linalg.norm(sums, axis=1) - low) / max(high - low, 1e-12) * (NORM_LEVELS - 1)
            levels = np.clip(np.rint(levels), 0, NORM_LEVELS - 1).astype(np.uint8)
        return lists, levels

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
        index, chosen = self._index, np.zeros((len(queries), 1), np.int64)
        if rows is not None:
            index = self._only(rows)
        elif self.lists > 1:
            chosen = self._coarse.search(queries, min(nprobe, self.lists))[1]
        share = count / max(index.ntotal, 1) if share is None else share
        scores = np.empty((len(queries), count + 1), np.float32)  # one more tells whether the last has equals
        found = np.empty((len(queries), count + 1), np.int64)
        with ThreadPoolExecutor(workers := _workers(len(queries))) as pool:
            indexes = [index, *(self._sharing(index) for _ in range(1, workers))]
            for start in range(0, len(queries), QUERIES):
                block = slice(start, start + QUERIES)
                arrays = self._look_ups(queries[block], share), chosen[block], scores[block], found[block]
                parts = zip(*(np.array_split(array, workers) for array in arrays), strict=True)
                list(pool.map(_scan, indexes, *zip(*parts, strict=True)))
                _settle_ties(index, *arrays)
        return scores[:, :count], found[:, :count]

    def _sharing(self, index: Any) -> Any:
        """Another index over the same lists, for look-up tables of its own."""
        other = self._made(index.nlist)
        other.replace_invlists(index.invlists, False)
        other.ntotal = index.ntotal
        return other

    def _look_ups(self, queries: np.ndarray, share: float) -> np.ndarray:
        """What every value of every code adds to the score, `(n, values of all codes)`."""
        parts, norms = [queries @ self._codewords.T], self.tables.norms
        if norms is not None:
            unused = 8 * self.code_bytes - sum(self._bits)
            parts.append(np.zeros((len(queries), 1 << unused if unused else 0), np.float32))
            squares = np.broadcast_to(-0.5 * norms**2, (len(queries), NORM_LEVELS))
            parts.append(squares if self.metric == "l2" else -self.thresholds(queries, share)[:, None] * norms)
        return np.hstack(parts)

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

        index = self._made(1)
        marks = np.zeros(int(rows[-1]) + 1 if len(rows) and rows[-1] < MARKS else 0, bool)
        if len(marks):
            marks[rows] = True
        for number in range(self.lists):
            ids, codes = self._list(number)
            if len(marks):
                inside = (ids >= 0) & (ids < len(marks))
                inside[inside] = marks[ids[inside]]
            else:
                inside = np.isin(ids, rows)
            kept = np.ascontiguousarray(ids[inside]), np.ascontiguousarray(codes[inside])
            if len(kept[0]):
                index.invlists.add_entries(0, len(kept[0]), faiss.swig_ptr(kept[0]), faiss.swig_ptr(kept[1]))
                index.ntotal += len(kept[0])
        return index

    def _list(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and codes of one list, views of Faiss's memory."""
        import faiss

        lists, size = self._index.invlists, self._index.invlists.list_size(number)
        if not size:
            return np.empty(0, np.int64), np.empty((0, self._index.code_size), np.uint8)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * self._index.code_size)
        return ids, codes.reshape(size, -1)

    # --- snapshots -----------------------------------------------------------------------------------------------

    def save(self, file: Path, notes: dict[str, int], with_codewords: bool) -> None:
        """Writes a snapshot: arrays only, of which the lists are laid out as Faiss reads them from a memory map.

        Args:
            file: Where to.
            notes: Integers that [`load`] gives back.
            with_codewords: Store the tables, because the quantizer does not give them.
        """
        lists = self._index.invlists
        sizes = np.array([lists.list_size(number) for number in range(self.lists)], np.int64)
        arrays = {"sizes": sizes, "centroids": self.tables.centroids}
        more = {"norms": self.tables.norms, "probes": self.tables.probes}
        arrays |= {name: array for name, array in more.items() if array is not None}
        if with_codewords:
            arrays["codewords"] = np.concatenate(self.tables.codewords)
        parts = (array for number in range(self.lists) for array in reversed(self._list(number)))
        size = len(self) * (self._index.code_size + 8)
        write_tensors(file, arrays, "lists", size, parts, {name: str(value) for name, value in notes.items()})

    @classmethod
    def load(
        cls, file: Path, codewords: list[np.ndarray] | None, bits: list[int], code_bytes: int, metric: str
    ) -> tuple["Scanner", dict[str, int]]:
        """Opens a snapshot; its lists stay in the file until they are changed.

        Args:
            file: Of [`save`].
            codewords: The tables, if they are not in the file.
            bits: Bits of each code.
            code_bytes: Bytes of a packed code.
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
            _check_arrays(arrays, codewords, bits, metric)
            if codewords is None:
                codewords = np.split(arrays["codewords"], np.cumsum([1 << width for width in bits])[:-1])
            tables = Tables(codewords, arrays.get("norms"), arrays["centroids"], arrays.get("probes"))
            scanner = cls(tables, code_bytes, metric)
            scanner._map(file, arrays["sizes"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{file} is no snapshot of this index: {error}. Delete it; it is made anew.") from error
        return scanner, notes

    def _map(self, file: Path, sizes: np.ndarray) -> None:
        """Lets Faiss read the lists from the file, where they lie one after the other: codes, then row numbers."""
        import faiss

        place, stop = _span(file, "lists")
        width = self._index.code_size + 8
        # As Python's integers, since those of numpy could be made to overflow to the right sum.
        if len(sizes) != self.lists or (sizes < 0).any() or sum(sizes.tolist()) * width != stop - place:
            raise ValueError("its lists have other sizes than they should")
        mapped: Any = faiss.OnDiskInvertedLists()
        mapped.nlist, mapped.code_size, mapped.filename = self.lists, self._index.code_size, str(file)
        mapped.read_only, mapped.totsize, mapped.prefetch_nthread = True, file.stat().st_size, 0
        for size in sizes.tolist():
            one = faiss.OnDiskOneList()
            one.size, one.capacity, one.offset = size, size, place
            mapped.lists.push_back(one)
            place += size * width
        mapped.do_mmap()
        self._index.replace_invlists(mapped, False)
        self._mapped, self._index.ntotal = mapped, int(sizes.sum())

    def _own(self) -> None:
        """Copies lists out of a memory map, before they are changed."""
        import faiss

        if self._mapped is None:
            return
        lists: Any = faiss.ArrayInvertedLists(self.lists, self._index.code_size)
        for number in range(self.lists):
            size = self._mapped.list_size(number)
            if size:
                lists.add_entries(number, size, self._mapped.get_ids(number), self._mapped.get_codes(number))
        lists.this.disown()
        self._index.replace_invlists(lists, True)
        self._mapped = None


def _workers(queries: int) -> int:
    """Threads that share some queries: as many as Faiss would use, where there is enough for each."""
    import faiss

    return max(1, min(faiss.omp_get_max_threads(), queries // 8))


def _scan(index, look_ups: np.ndarray, lists: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
    """Scans some lists for each query; fills in scores and rows, best first."""
    import faiss

    codebooks = faiss.rev_swig_ptr(index.rq.codebooks.data(), look_ups.shape[1])
    one, nothing = np.ones((1, 1), np.float32), np.zeros((1, lists.shape[1]), np.float32)
    index.nprobe = lists.shape[1]
    for place, look_up in enumerate(look_ups):
        codebooks[:] = look_up
        found = index.search_preassigned(one, scores.shape[1], lists[place : place + 1], nothing)
        scores[place], rows[place] = found[0][0], found[1][0]


def _settle_ties(index, look_ups: np.ndarray, lists: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
    """Where the last two scores are equal, keeps the lowest rows of all that have that score.

    Faiss keeps those that its lists happen to hold first, which shards of a collection hold in another order.
    """
    for place in np.flatnonzero((scores[:, -1] == scores[:, -2]) & (rows[:, -1] >= 0)):
        one, width = slice(place, place + 1), scores.shape[1]
        more, found = scores[one], rows[one]
        while width < index.ntotal and found[0, -1] >= 0 and more[0, -1] == scores[place, -1]:
            width = min(4 * width, index.ntotal)
            more, found = np.empty((1, width), np.float32), np.empty((1, width), np.int64)
            _scan(index, look_ups[one], lists[one], more, found)
        order = np.lexsort((found[0], -more[0]))
        order = order[found[0][order] >= 0][: scores.shape[1]]
        scores[place], rows[place] = more[0][order], found[0][order]


def fit_scanner(quantizer: RQMoEModel, sample: np.ndarray, steps: int, metric: str, lists: int) -> Scanner:
    """An empty scanner whose tables, norms and lists suit a sample of codes, uint8 `(n, bytes)`, n >= 1."""
    experts = quantizer.config.has_experts
    codewords = fit_codewords(quantizer, sample[:FIT_ROWS], steps) if experts else exact_codewords(quantizer, steps)
    flat = np.zeros((1, codewords[0].shape[1]), np.float32)
    if lists == 1 and metric == "inner_product":
        return Scanner(Tables(codewords, None, flat), sample.shape[1], metric)
    sums = Scanner(Tables(codewords, None, flat), sample.shape[1], metric).sums(sample)
    lengths = np.linalg.norm(sums, axis=1)
    norms = np.linspace(lengths.min(), lengths.max(), NORM_LEVELS, dtype=np.float32)
    centroids = flat if lists == 1 else find_centroids(sums, lists, spherical=metric != "l2")
    tables = Tables(codewords, None if metric == "inner_product" else norms, centroids)
    if metric == "cosine":
        rows = np.unique(np.linspace(0, len(sums) - 1, PROBES).astype(int))
        tables.probes = sums[rows] / np.maximum(lengths[rows, None], 1e-12)
    return Scanner(tables, sample.shape[1], metric)


def _check_arrays(
    arrays: dict[str, np.ndarray], codewords: list[np.ndarray] | None, bits: list[int], metric: str
) -> None:
    """Raises ValueError unless the arrays of a snapshot have the shapes that Faiss is going to rely on unchecked."""
    floats = {name: array for name, array in arrays.items() if name != "sizes"}
    if any(array.dtype != np.float32 for array in floats.values()) or arrays["sizes"].dtype != np.int64:
        raise ValueError("its arrays are of other types than they should")
    known = arrays["codewords"] if codewords is None else codewords[0]
    width = known.shape[1] if known.ndim == 2 else -1
    fits = codewords is not None or known.shape == (sum(1 << number for number in bits), width)
    fits &= arrays["sizes"].ndim == 1 and arrays["centroids"].shape == (max(len(arrays["sizes"]), 1), width)
    fits &= ("norms" in arrays) == (metric != "inner_product")
    fits &= "norms" not in arrays or arrays["norms"].shape == (NORM_LEVELS,)
    fits &= "probes" not in arrays or arrays["probes"].shape == (max(len(arrays["probes"]), 1), width)
    if not fits:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in sorted(arrays.items()))
        raise ValueError(f"its arrays have other shapes than they should: {shapes}")


def _span(file: Path, name: str) -> tuple[int, int]:
    """Where an array of a safetensors file begins and ends."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    start, stop = header[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def find_centroids(vectors: np.ndarray, lists: int, spherical: bool, seed: int = 0) -> np.ndarray:
    """Centroids of the inverted lists by k-means: float32 `(lists, d)`."""
    import faiss

    kmeans = faiss.Kmeans(vectors.shape[1], lists, niter=ITERATIONS, seed=seed, spherical=spherical,
                          max_points_per_centroid=POINTS_PER_LIST, min_points_per_centroid=1)  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids)
