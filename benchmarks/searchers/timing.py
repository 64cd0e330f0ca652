"""How searches are timed, and how memory is measured."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from .interface import Searcher

REPEATS = 5
SECONDS = 20.0  # after which there are three repeats, and after three times that no more
SINGLES, SINGLE_SECONDS = 200, 10.0
WARM_UP = 10
ASKED = 200  # queries before memory is measured: they touch what searches use


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Lets all threads of this process run on so many cores only, and libraries start no more threads than that.

    Raises:
        ValueError: If there are fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise ValueError(f"This process may use {len(cores)} cores; {count} threads cannot be measured on them.")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        with threadpool_limits(count):
            torch.set_num_threads(count)
            faiss.omp_set_num_threads(count)
            _pin(cores[:count])
            yield
    finally:
        _pin(cores)
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _pin(cores: list[int]) -> None:
    """Pools of threads that were started before are bound, too: some libraries have no other switch."""
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cores)
        except ProcessLookupError:  # it has ended meanwhile
            continue


def rate(search: Callable[[], np.ndarray], queries: int) -> tuple[np.ndarray, float, int]:
    """What a search of all queries finds, its queries per second (median of several repeats), and the repeats."""
    found, seconds = search(), []  # the first one warms up
    while len(seconds) < REPEATS and sum(seconds) < (SECONDS if len(seconds) >= 3 else 3 * SECONDS):
        start = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - start)
    return found, queries / float(np.median(seconds)), len(seconds)


def latency(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> dict[str, float]:
    """Milliseconds of queries that come one by one: the median and what 95 of 100 stay below."""
    for query in queries[:WARM_UP]:
        search(query[None])
    seconds: list[float] = []
    for query in queries[:SINGLES]:
        start = time.perf_counter()
        search(query[None])
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > SINGLE_SECONDS:
            break
    return {
        "latency_ms": round(1e3 * float(np.median(seconds)), 3),
        "latency_95_ms": round(1e3 * float(np.quantile(seconds, 0.95)), 3),
    }


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, and those that are no pages of files."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("all", "VmRSS"), ("anonymous", "RssAnon"))}


def memory(searcher: Searcher, folder: Path, queries: np.ndarray, count: int) -> dict[str, float]:
    """Resident bytes per vector, ids included, of an index that a new process opens and asks.

    Args:
        searcher: Not opened yet.
        folder: Where the index is.
        queries: float32 `(q, d)`.
        count: Vectors in the index.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, searcher, folder, queries[:ASKED]), daemon=True)
    process.start()
    sender.close()
    try:
        grown = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"The process that measures the memory of {searcher.name} has failed.") from error
    finally:
        process.join()
    return {f"resident_bytes_{name}": round(value / count, 2) for name, value in grown.items()}


def _measure(sender, searcher: Searcher, folder: Path, queries: np.ndarray) -> None:
    searcher.warm()
    before = resident()
    searcher.open(folder)
    searcher.search(queries, **searcher.settings()[-1])
    after = resident()
    sender.send({name: after[name] - before[name] for name in before})
