"""Inverted lists that stay in a file: one list after the other, of each its codes, then its row numbers."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

ROW_BYTES = 8


class MappedLists:
    """Lets Faiss read lists from a memory map.

    Args:
        file: Where they are.
        start: Where in it they begin.
        stop: Where they end.
        sizes: Entries of each list, int64 `(lists,)`.
        code_size: Bytes of a code.

    Raises:
        ValueError: If there is not the place for lists of these sizes.
    """

    def __init__(self, file: Path, start: int, stop: int, sizes: np.ndarray, code_size: int):
        import faiss

        width = code_size + ROW_BYTES
        # As Python's integers, since those of numpy could be made to overflow to the right sum.
        if (sizes < 0).any() or sum(sizes.tolist()) * width != stop - start:
            raise ValueError("its lists have other sizes than they should")
        self.lists: Any = faiss.OnDiskInvertedLists()
        self.lists.nlist, self.lists.code_size, self.lists.filename = len(sizes), code_size, str(file)
        self.lists.read_only, self.lists.totsize, self.lists.prefetch_nthread = True, file.stat().st_size, 0
        made: Any = self.lists.lists
        self._sizes, self._starts = sizes, (np.cumsum(sizes) - sizes) * width
        for size, place in zip(sizes.tolist(), (self._starts + start).tolist(), strict=True):
            one = faiss.OnDiskOneList()
            one.size, one.capacity, one.offset = size, size, place
            made.push_back(one)
        self.lists.do_mmap()
        self._bytes = faiss.rev_swig_ptr(self.lists.get_codes(0), stop - start) if stop > start else None

    def entries_at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As [`rqmoe_hf.index.scans.entries_at`], for all places at once."""
        code_size, there = self.lists.code_size, places >= 0
        rows, codes = np.full(places.shape, -1, np.int64), np.zeros((*places.shape, code_size), np.uint8)
        if self._bytes is not None:
            numbers, inside = places[there] >> 32, places[there] & 0xFFFFFFFF
            starts = self._starts[numbers]
            codes[there] = sliding_window_view(self._bytes, code_size)[starts + inside * code_size]
            behind = starts + self._sizes[numbers] * code_size
            found = sliding_window_view(self._bytes, ROW_BYTES)[behind + inside * ROW_BYTES]
            rows[there] = found.view(np.int64)[:, 0]
        return rows, codes

    def copied(self) -> Any:
        """Lists in memory with the same entries."""
        import faiss

        lists: Any = faiss.ArrayInvertedLists(self.lists.nlist, self.lists.code_size)
        for number in np.flatnonzero(self._sizes).tolist():
            size = self.lists.list_size(number)
            lists.add_entries(number, size, self.lists.get_ids(number), self.lists.get_codes(number))
        return lists
