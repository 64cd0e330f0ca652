"""Scans by Faiss; also by one thread, where what surrounds a scan takes longer than the scan itself.

Codes that are bytes are given to Faiss as those of a product quantizer of one dimension per code, in which every query
is 1: its scan takes a third of the time of the one for additive quantizers, which reads codes of any bits.

A place is what Faiss calls a pair: the number of a list, and in the lower 32 bits which of its entries it is.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ..additive import faiss_widths

ROOM = 1.001  # for what rounding adds to a sum
LEAST_SUM = 1e-30  # smaller ones are rounded like this one, since their step would be no normal number


_LIMITED = threading.Lock()


@cache
def _libraries() -> ThreadpoolController:
    """Those that are loaded; looking for them takes milliseconds."""
    return ThreadpoolController()


@contextmanager
def single_threaded_products() -> Iterator[None]:
    """Matrix products take one thread each meanwhile, unless another thread that is in here leaves before.

    OpenBLAS's own threads stay busy for a while after a product, and would take the cores from those that scan. Their
    number is one for the whole process: who sets it while another does would later put back what the other has set.
    """
    if not _LIMITED.acquire(blocking=False):
        yield
        return
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        _LIMITED.release()


@contextmanager
def mapping(threads: int) -> Iterator[Callable[..., Iterable]]:
    """What maps by so many threads: by this one if it is one, since a scan can take less time than starting one."""
    if threads == 1:
        yield map
        return
    with single_threaded_products(), ThreadPoolExecutor(threads) as pool:
        yield pool.map


def empty_index(bits: list[int], lists: int, by_list: bool) -> Any:
    """An empty Faiss index whose look-up tables are its codebooks.

    Args:
        bits: Of each code.
        lists: Inverted lists.
        by_list: Scores count from what is given for a list.
    """
    import faiss

    inner, size = faiss.METRIC_INNER_PRODUCT, 1
    if set(bits) == {8} and not by_list:
        size = len(bits)
        unit = faiss.IndexFlatIP(size)
        index: Any = faiss.IndexIVFPQ(unit, size, lists, size, 8, inner)
    else:
        unit, nonorm = faiss.IndexFlatIP(size), faiss.AdditiveQuantizer.ST_LUT_nonorm
        index = faiss.IndexIVFResidualQuantizer(unit, size, lists, faiss_widths(bits), inner, nonorm)
        faiss.copy_array_to_vector(np.zeros(sum(1 << width for width in bits), np.float32), index.rq.codebooks)
        index.rq.is_trained = True
    index.referenced_objects = [unit]
    index.by_residual, index.is_trained = by_list, True
    return index


def scans_bytes(index: Any) -> bool:
    """Whether the codes in the lists of an [`empty_index`] are bytes."""
    return hasattr(index, "pq")


def summable(look_ups: np.ndarray) -> np.ndarray:
    """Look-up tables of bytes, float32 `(n, codes * 256)`, rounded in place so that no sum of theirs is rounded.

    Faiss sums a product quantizer's scores in different code for four vectors at once, for single ones, and for each
    kind of processor. Equal codes are to have equal scores all the same, wherever they are in a list or shard. What is
    added up here are multiples of a power of two, of which float32 holds all up to the largest sum.
    """
    tables = np.abs(look_ups).reshape(len(look_ups), -1, 256)
    largest = tables.max(axis=2).sum(axis=1, dtype=np.float64, keepdims=True) * ROOM
    step = np.exp2(np.ceil(np.log2(np.maximum(largest, LEAST_SUM))) - 24).astype(np.float32)
    np.divide(look_ups, step, out=look_ups)
    np.rint(look_ups, out=look_ups)
    return np.multiply(look_ups, step, out=look_ups)


def _opened(index: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory of an index's look-up tables, float32 `(width,)`, and the query to ask it with, `(1, size)`."""
    import faiss

    held = index.pq.centroids if scans_bytes(index) else index.rq.codebooks
    return faiss.rev_swig_ptr(held.data(), width), np.ones((1, index.d), np.float32)


def scan(
    index: Any, look_ups: np.ndarray, added: np.ndarray, lists: np.ndarray, scores: np.ndarray, places: np.ndarray
) -> None:
    """Scans some lists for each query, with what each adds to its scores; fills in scores and places, best first."""
    import faiss

    (codebooks, one), pointer = _opened(index, look_ups.shape[1]), faiss.swig_ptr
    asked, index.nprobe, count = pointer(one), lists.shape[1], scores.shape[1]
    lists = np.ascontiguousarray(lists, np.int64)
    for look_up, chosen, add, best, found in zip(look_ups, lists, added, scores, places, strict=True):
        codebooks[:] = look_up
        # Without what faiss wraps around it, which takes as long as scanning a short list.
        index.search_preassigned_c(1, asked, count, *map(pointer, (chosen, add, best, found)), True)


def scan_soon(
    index: Any, look_ups: np.ndarray, added: np.ndarray, lists: np.ndarray, scores: np.ndarray, places: np.ndarray
) -> None:
    """As [`scan`], sooner done where Faiss would copy tables for every list; several threads wait for each other."""
    if index.by_residual or scans_bytes(index):
        scan(index, look_ups, added, lists, scores, places)
    else:
        scan_lists(index, look_ups, lists, scores, places)


def scan_lists(index: Any, look_ups: np.ndarray, lists: np.ndarray, scores: np.ndarray, places: np.ndarray) -> None:
    """Scans some lists for each query; fills in scores and places, best first.

    Faiss's `search_preassigned` finds the same, to the bit. It copies the look-up tables for every list; this does so
    once for every query.

    Args:
        index: Faiss's, of inverted lists and an additive quantizer of one dimension; not by residual.
        look_ups: What every value of every code adds to a score, float32 `(n, values of all codes)`.
        lists: Numbers of the lists to scan, int64 `(n, nprobe)`; negative ones are passed over.
        scores: float32 `(n, k)`, contiguous.
        places: int64 `(n, k)`, contiguous; -1 where there are no more.
    """
    import faiss

    codebooks, one = _opened(index, look_ups.shape[1])
    best: Any = faiss.float_minheap_array_t()
    best.nh, best.k, best.val, best.ids = *scores.shape, faiss.swig_ptr(scores), faiss.swig_ptr(places)
    best.heapify()
    scanner, inside = index.get_InvertedListScanner(True, None, None), index.invlists
    try:
        for query, look_up in enumerate(look_ups):
            codebooks[:] = look_up
            scanner.set_query(faiss.swig_ptr(one))
            scanner.set_list(0, 0.0)  # copies the tables; which list it is does not matter
            kept = best.get_val(query), best.get_ids(query), best.k
            for number in lists[query].tolist():
                if number >= 0 and (size := inside.list_size(number)):
                    scanner.list_no = number
                    scanner.scan_codes(size, inside.get_codes(number), inside.get_ids(number), *kept)
    finally:  # Python does not free it; an object of Python that owns it would spoil what SWIG knows of its classes
        type(scanner).__swig_destroy__(scanner)
    best.reorder()


def entry_of(lists: Any, number: int, code_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and codes of one list, views of Faiss's memory."""
    import faiss

    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64), np.empty((0, code_size), np.uint8)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * code_size)
    return faiss.rev_swig_ptr(lists.get_ids(number), size), codes.reshape(size, code_size)


def entries_at(index: Any, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is at places, of any shape `s`: row numbers, int64 `s`, and codes, uint8 `(*s, code size)`.

    Where there is no place, -1, the row is -1 and the code 0.
    """
    numbers, inside = (places >> 32).reshape(-1), (places & 0xFFFFFFFF).reshape(-1)
    rows, codes = np.full(places.size, -1, np.int64), np.zeros((places.size, index.code_size), np.uint8)
    order = np.argsort(numbers, kind="stable")
    order = order[np.searchsorted(numbers[order], 0) :]
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for mine in np.split(order, starts[1:]) if len(order) else ():
        ids, held = entry_of(index.invlists, int(numbers[mine[0]]), index.code_size)
        rows[mine], codes[mine] = ids[inside[mine]], held[inside[mine]]
    return rows.reshape(places.shape), codes.reshape(*places.shape, -1)


def settle_ties(
    index: Any, look_ups: np.ndarray, added: np.ndarray, lists: np.ndarray, scores: np.ndarray, places: np.ndarray
) -> None:
    """Where the last two scores are equal, keeps the lowest rows of all that have that score.

    Faiss keeps those that its lists happen to hold first, which shards of a collection hold in another order.
    """
    for query in np.flatnonzero((scores[:, -1] == scores[:, -2]) & (places[:, -1] >= 0)):
        one, width = slice(query, query + 1), scores.shape[1]
        more, found = scores[one], places[one]
        while width < index.ntotal and found[0, -1] >= 0 and more[0, -1] == scores[query, -1]:
            width = min(4 * width, index.ntotal)
            more, found = np.empty((1, width), np.float32), np.empty((1, width), np.int64)
            scan_soon(index, look_ups[one], added[one], lists[one], more, found)
        order = np.lexsort((entries_at(index, found[0])[0], -more[0]))
        order = order[found[0][order] >= 0][: scores.shape[1]]
        scores[query], places[query] = more[0][order], found[0][order]


def workers_for(queries: int) -> int:
    """Threads that share some queries: as many as Faiss would use, where there is enough for each."""
    import faiss

    return max(1, min(faiss.omp_get_max_threads(), queries // 8))
