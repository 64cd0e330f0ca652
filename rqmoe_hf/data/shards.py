"""Long work in parquet shards that survives a kill: what is written is whole, and what is whole is not done again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

MANIFEST = "rqmoe_job.json"


def write_shards(
    output: str | os.PathLike,
    rows: int,
    shard_size: int,
    settings: dict,
    make: Callable[[int, int], pa.Table],
    description: str,
) -> list[Path]:
    """Writes `part-00000.parquet` and so on, continuing where an earlier run with the same settings stopped.

    Args:
        output: Folder.
        rows: Rows of the whole job.
        shard_size: Rows per file.
        settings: What the result depends on. It is kept in `rqmoe_job.json`, and a run with other settings is refused.
        make: Gives the table of the rows start to stop.
        description: For the progress bar.

    Returns:
        The files.

    Raises:
        ValueError: If the folder holds the result of another job.
    """
    output = Path(output)
    if rows < 1 or shard_size < 1:
        raise ValueError(f"Nothing to do: {rows} rows in shards of {shard_size}.")
    _claim(output, {**settings, "rows": rows, "shard_size": shard_size})
    starts = range(0, rows, shard_size)
    files = [output / f"part-{index:05d}.parquet" for index in range(len(starts))]
    done = sum(file.exists() for file in files)
    with tqdm(total=rows, initial=min(done * shard_size, rows), desc=description, unit="row") as bar:
        for start, file in zip(starts, files, strict=True):
            if file.exists():
                continue
            stop = min(start + shard_size, rows)
            scratch = file.with_name(f".{file.name}.tmp")
            pq.write_table(make(start, stop), scratch, compression="zstd")
            os.replace(scratch, file)
            bar.update(stop - start)
    return files


def _claim(output: Path, settings: dict) -> None:
    """Checks that the folder is new, or belongs to this very job; removes what a killed run left half-written."""
    manifest = output / MANIFEST
    if manifest.exists():
        found = json.loads(manifest.read_text("utf-8"))
        if found != settings:
            names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
            changes = "; ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in names)
            raise ValueError(
                f"{output} holds the result of another job ({changes}): choose a new folder or delete it."
            )
    elif output.is_dir() and any(file.suffix == ".parquet" for file in output.iterdir()):
        raise ValueError(f"{output} holds parquet files that this command did not write: choose a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink()
    if not manifest.exists():
        scratch = output / f".{MANIFEST}.tmp"
        scratch.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        os.replace(scratch, manifest)


def fixed_size_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """An array `(n, width)` as an Arrow column of fixed-size lists, without a copy where the memory allows it."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def column_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The reverse: a column of fixed-size lists as an array `(n, width)`."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
