"""Jobs on Ray: workers that hold the model read, compress and pack whole blocks; this process writes them.

A block is what one output file holds. It is written under a temporary name and renamed by the process that started the
job, and by no other: a worker that dies has written nothing, and Ray gives its block to another one.
"""

import importlib.util
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from .batches import limit_threads
from .jobs import MakeBlock
from .shards import MakeTable, Shard, parquet_file

ATTEMPTS = 10  # Ray would give a block that kills every worker, for want of memory say, to new ones for ever


@dataclass
class RayEngine:
    """Workers of Ray Data for `rqmoe_hf.data.compress_shards` and `embed_texts`.

    Ray is started on this machine, without its usage statistics, unless it runs already.

    Args:
        workers: Processes that each hold the model; default as many as the cluster has CPUs (GPUs, if it has any) for.
        cpus_per_worker: CPUs, and threads, of each.
        gpus_per_worker: GPUs of each; default one if the cluster has any.
        address: Of a running cluster, for example "auto" or "host:6379"; default the one in `RAY_ADDRESS`, if any.

    Attributes:
        peak_memory: Largest resident memory of each process that has worked, bytes by host and process id.
    """

    workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None
    peak_memory: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self):
        if importlib.util.find_spec("ray") is None:
            raise ValueError('The engine ray needs Ray: pip install "rqmoe-hf[ray]".')
        for name in ("workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker must not be negative, got {self.gpus_per_worker}.")

    def run(self, make: MakeTable, shards: list[Shard]) -> Iterator[tuple[Shard, pa.Buffer]]:
        """Gives each shard once, as they become ready, with the content of its file.

        Raises:
            ValueError: If the cluster is too small for the workers, or a block cannot be made.
        """
        with started_ray(self.address) as ray:
            workers, gpus = self._pool(ray.cluster_resources(), len(shards))
            blocks = [{"index": index, "start": shard.start, "stop": shard.stop} for index, shard in enumerate(shards)]
            attempts = ray.remote(num_cpus=0)(attempts_class()).remote(ATTEMPTS)
            made = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
                Worker,
                fn_constructor_args=[make, attempts, self.cpus_per_worker, "cuda" if gpus else "cpu"],
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=self.cpus_per_worker,
                num_gpus=gpus,
            )
            for batch in made.iter_batches(batch_size=1, prefetch_batches=0, batch_format="pyarrow"):
                yield self._received(batch, shards)

    def _received(self, batch: pa.Table, shards: list[Shard]) -> tuple[Shard, pa.Buffer]:
        block = {name: batch[name][0] for name in batch.column_names}
        if block["error"].as_py():
            raise ValueError(block["error"].as_py())
        process, memory = block["process"].as_py(), block["peak_memory"].as_py()
        self.peak_memory[process] = max(memory, self.peak_memory.get(process, 0))
        return shards[block["index"].as_py()], block["content"].as_buffer()

    def _pool(self, resources: dict[str, float], blocks: int) -> tuple[int, float]:
        """How many workers there will be, and GPUs for each."""
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        share = min(1.0, gpus) if self.gpus_per_worker is None else self.gpus_per_worker
        fitting = int(cpus // self.cpus_per_worker)
        if share:
            fitting = min(fitting, int(gpus / share))
        if fitting < (self.workers or 1):
            raise ValueError(
                f"{self.workers or 1} workers of {self.cpus_per_worker} CPUs and {share:g} GPUs do not fit into a "
                f"cluster of {cpus:g} CPUs and {gpus:g} GPUs: ask for fewer."
            )
        return min(self.workers or fitting, blocks), share


def attempts_class() -> type:
    """A class that counts how often each block was begun.

    It is made here so that Ray takes it along whole: a process that had to import it from this package would import
    torch, too.
    """

    class Attempts:
        def __init__(self, limit: int):
            self.limit, self.begun = limit, Counter[int]()

        def begin(self, index: int) -> bool:
            self.begun[index] += 1
            return self.begun[index] <= self.limit

    return Attempts


class Worker:
    """A process that makes blocks.

    Args:
        make: Gives the table of the rows start to stop.
        attempts: An actor of [`attempts_class`].
        threads: Of torch and Faiss.
        device: Where the models run that do not say it.
    """

    def __init__(self, make: MakeTable, attempts: Any, threads: int, device: str):
        self.make, self.attempts = make, attempts
        limit_threads(threads)
        for step in make.steps if isinstance(make, MakeBlock) else ():
            step.device = step.device or device

    def __call__(self, block: dict[str, Any]) -> pa.Table:
        """Makes one block; what the user can mend comes back as text, since Ray would wrap it into a traceback."""
        index, start, stop = (int(block[name][0]) for name in ("index", "start", "stop"))
        content, error = pa.py_buffer(b""), ""
        try:
            self._begin(index, start, stop)
            content = parquet_file(self.make(start, stop))
        except (ValueError, OSError) as reason:
            error = str(reason) or repr(reason)
        offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
        return pa.table(
            {
                "index": pa.array([index]),
                "content": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content]),  # without a copy
                "error": pa.array([error]),
                "process": pa.array([f"{platform.node()}:{os.getpid()}"]),
                "peak_memory": pa.array([peak_memory()]),
            }
        )

    def _begin(self, index: int, start: int, stop: int) -> None:
        import ray

        if not ray.get(self.attempts.begin.remote(index)):
            raise ValueError(
                f"The workers died over the rows {start} to {stop}, each time they were begun: if it was for want of "
                "memory, ask for a smaller shard_size or fewer workers."
            )


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def connect_ray(address: str | None = None, logging_level: int = logging.ERROR) -> bool:
    """Joins the cluster at an address or at `RAY_ADDRESS`, or else starts Ray here; whether it did either.

    Ray's usage statistics are off, unless it was imported before and the environment says otherwise.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without a warning that this will be the default
    import ray

    if ray.is_initialized():
        return False
    local: dict[str, Any] = {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(address, logging_level=logging_level, log_to_driver=False, **local)
    return True


@contextmanager
def started_ray(address: str | None = None):
    """Ray with a cluster behind it, for as long as it is needed if this started it; its chatter is silenced."""
    starts = connect_ray(address)
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    kept = context.enable_progress_bars
    level = logging.getLogger("ray.data").level
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        context.enable_progress_bars = kept
        logging.getLogger("ray.data").setLevel(level)
        if starts:
            ray.shutdown()
