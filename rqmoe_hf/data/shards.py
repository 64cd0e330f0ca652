"""Long work in parquet shards that survives a kill: what is written is whole, and what is whole is not done again."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..saving import differences

MANIFEST = "rqmoe_job.json"

Report = Callable[[int], object]


class MakeTable(Protocol):
    """Makes the table of the rows start to stop, and may report how many of them are ready."""

    def __call__(self, start: int, stop: int, report: Report | None = None) -> pa.Table:
        """Gives the table."""
        ...


@dataclass(frozen=True)
class Shard:
    """One file of a job: the rows start to stop."""

    file: Path
    start: int
    stop: int


class Engine(Protocol):
    """What does the work of shards, in any order."""

    def run(self, make: MakeTable, shards: list[Shard]) -> Iterator[tuple[Shard, pa.Buffer]]:
        """Gives each shard once, with the content of its file."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """The engine that works here, one shard after the other.

    Args:
        report: Told how many more rows are ready, while a shard is made.
    """

    report: Report

    def run(self, make: MakeTable, shards: list[Shard]) -> Iterator[tuple[Shard, pa.Buffer]]:
        """Gives each shard with the content of its file."""
        for shard in shards:
            yield shard, parquet_file(make(shard.start, shard.stop, self.report))


def write_shards(
    output: str | os.PathLike,
    rows: int,
    shard_size: int,
    settings: dict,
    make: MakeTable,
    description: str,
    engine: Engine | None = None,
) -> list[Path]:
    """Writes `part-00000.parquet` and so on, continuing where an earlier run with the same settings stopped.

    Args:
        output: Folder.
        rows: Rows of the whole job.
        shard_size: Rows per file.
        settings: What the result depends on. It is kept in `rqmoe_job.json`, and a run with other settings is refused.
        make: Gives the table of the rows start to stop.
        description: For the progress bar.
        engine: What does the work, default this process. Only this process writes files, so a worker that dies leaves
            nothing behind.

    Returns:
        The files.

    Raises:
        ValueError: If the folder holds the result of another job.
    """
    output = Path(output)
    if rows < 1 or shard_size < 1:
        raise ValueError(f"Nothing to do: {rows} rows in shards of {shard_size}.")
    new_folder, new_job = not output.exists(), not (output / MANIFEST).exists()
    _claim(output, {**settings, "rows": rows, "shard_size": shard_size})
    starts = range(0, rows, shard_size)
    shards = [
        Shard(output / f"part-{index:05d}.parquet", start, min(start + shard_size, rows))
        for index, start in enumerate(starts)
    ]
    pending = [shard for shard in shards if not shard.file.exists()]
    done = rows - sum(shard.stop - shard.start for shard in pending)
    try:
        with tqdm(total=rows, initial=done, desc=description, unit="row") as bar:
            for shard, content in (engine or OneProcess(bar.update)).run(make, pending) if pending else ():
                _write_whole(shard.file, content)
                done += shard.stop - shard.start
                bar.update(done - bar.n)  # what was not reported before
    except Exception:
        if new_job and not any(shard.file.exists() for shard in shards):  # bad input leaves nothing behind
            _unclaim(output, new_folder)
        raise
    return [shard.file for shard in shards]


def parquet_file(table: pa.Table) -> pa.Buffer:
    """The content of a shard's file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _write_whole(file: Path, content: pa.Buffer) -> None:
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_bytes(content)
    os.replace(scratch, file)


def _claim(output: Path, settings: dict) -> None:
    """Checks that the folder is new, or belongs to this very job; removes what a killed run left half-written."""
    manifest = output / MANIFEST
    if manifest.exists():
        found = json.loads(manifest.read_text("utf-8"))
        if changes := differences(found, settings):
            raise ValueError(
                f"{output} holds the result of another job ({changes}): choose a new folder or delete it."
            )
    elif output.is_dir() and any(file.suffix == ".parquet" for file in output.iterdir()):
        raise ValueError(f"{output} holds parquet files that this command did not write: choose a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink()
    if not manifest.exists():
        _write_whole(manifest, pa.py_buffer((json.dumps(settings, indent=1) + "\n").encode()))


def _unclaim(output: Path, new_folder: bool) -> None:
    """Takes back a claim that led to no file."""
    (output / MANIFEST).unlink(missing_ok=True)
    for leftover in output.glob(".part-*.tmp"):
        leftover.unlink()
    if new_folder and not any(output.iterdir()):
        output.rmdir()


def fixed_size_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """An array `(n, width)` as an Arrow column of fixed-size lists, without a copy where the memory allows it."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def column_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The reverse: a column of fixed-size lists as an array `(n, width)`."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
