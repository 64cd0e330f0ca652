"""Scans by Faiss; also by a few threads, where what surrounds a scan takes longer than the scan itself."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

FEW_THREADS = 4  # more would wait for each other, since Python goes through the lists


@contextmanager
def mapping(threads: int) -> Iterator[Callable[..., Iterable]]:
    """What maps by so many threads: by this one if it is one, since a scan can take less time than starting one."""
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        yield pool.map


def scan(
    index: Any, look_ups: np.ndarray, added: np.ndarray, lists: np.ndarray, scores: np.ndarray, rows: np.ndarray
) -> None:
    """Scans some lists for each query, with what each adds to its scores; fills in scores and rows, best first."""
    import faiss

    codebooks = faiss.rev_swig_ptr(index.rq.codebooks.data(), look_ups.shape[1])
    one = np.ones((1, 1), np.float32)
    index.nprobe = lists.shape[1]
    for place, look_up in enumerate(look_ups):
        codebooks[:] = look_up
        found = index.search_preassigned(one, scores.shape[1], lists[place : place + 1], added[place : place + 1])
        scores[place], rows[place] = found[0][0], found[1][0]


def scan_soon(
    index: Any, look_ups: np.ndarray, added: np.ndarray, lists: np.ndarray, scores: np.ndarray, rows: np.ndarray
) -> None:
    """As [`scan`], and sooner done by few threads where lists add nothing."""
    if index.by_residual:
        scan(index, look_ups, added, lists, scores, rows)
    else:
        scan_lists(index, look_ups, lists, scores, rows)


def scan_lists(index: Any, look_ups: np.ndarray, lists: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
    """Scans some lists for each query; fills in scores and rows, best first.

    Faiss's `search_preassigned` finds the same, to the bit. It copies the look-up tables for every list; this does so
    once for every query.

    Args:
        index: Faiss's, of inverted lists and an additive quantizer of one dimension; not by residual.
        look_ups: What every value of every code adds to a score, float32 `(n, values of all codes)`.
        lists: Numbers of the lists to scan, int64 `(n, nprobe)`; negative ones are passed over.
        scores: float32 `(n, k)`, contiguous.
        rows: int64 `(n, k)`, contiguous; -1 where there are no more.
    """
    import faiss

    codebooks, one = faiss.rev_swig_ptr(index.rq.codebooks.data(), look_ups.shape[1]), np.ones(1, np.float32)
    best: Any = faiss.float_minheap_array_t()
    best.nh, best.k, best.val, best.ids = *scores.shape, faiss.swig_ptr(scores), faiss.swig_ptr(rows)
    best.heapify()
    scanner, inside = index.get_InvertedListScanner(False, None, None), index.invlists
    try:
        for place, look_up in enumerate(look_ups):
            codebooks[:] = look_up
            scanner.set_query(faiss.swig_ptr(one))
            scanner.set_list(0, 0.0)  # copies the tables; which list it is does not matter
            kept = best.get_val(place), best.get_ids(place), best.k
            for number in lists[place].tolist():
                if number >= 0 and (size := inside.list_size(number)):
                    scanner.scan_codes(size, inside.get_codes(number), inside.get_ids(number), *kept)
    finally:  # Python does not free it; an object of Python that owns it would spoil what SWIG knows of its classes
        type(scanner).__swig_destroy__(scanner)
    best.reorder()


def workers_for(queries: int) -> int:
    """Threads that share some queries: as many as Faiss would use, where there is enough for each."""
    import faiss

    return max(1, min(faiss.omp_get_max_threads(), queries // 8))
