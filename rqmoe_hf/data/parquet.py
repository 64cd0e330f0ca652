"""Rows of many parquet files, on a local disk or in remote storage, read only where they are needed."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from datasets import Dataset

READ_AT_ONCE = 8 << 20  # bytes per request; whole row groups could be larger than a worker's memory
BATCH_ROWS = 8_192


class ParquetFiles:
    """The rows of parquet files, in the order of the files' names. Picklable: a copy reads in another process.

    It has what jobs need of a `datasets.Dataset`, but neither copies the files to a cache nor holds their content.

    Args:
        source: A .parquet file or a folder of them: a path, or a URL such as `s3://bucket/folder`,
            `hf://datasets/org/name/folder` or `gs://bucket/file.parquet`.

    Raises:
        ValueError: If there are no parquet files, or they do not have the same columns.
    """

    def __init__(self, source: str | os.PathLike):
        self.filesystem, self.files = _find(source)
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, self.files))
        self.schema = footers[0][1]
        for file, (_, schema) in zip(self.files, footers, strict=True):
            if not schema.equals(self.schema):
                raise ValueError(
                    f"{file} has other columns or types than {self.files[0]}: rewrite it, or keep it elsewhere."
                )
        self.bounds = np.cumsum([0, *(count for count, _ in footers)]).tolist()

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self.schema.names

    def select(self, rows: Sequence[int] | np.ndarray, columns: list[str] | None = None) -> Dataset:
        """Reads rows.

        Args:
            rows: Numbers of the rows, ascending.
            columns: Names of the columns to read, default all.
        """
        numbers = np.asarray(rows)
        tables = []
        for file, begin, end in zip(self.files, self.bounds, self.bounds[1:], strict=False):
            wanted = _between(numbers, begin, end) - begin
            if len(wanted):
                tables += self._read_file(file, wanted, columns)
        return Dataset(pa.concat_tables(tables))

    def _read_file(self, file: str, rows: np.ndarray, columns: list[str] | None) -> list[pa.Table]:
        """Rows of one file; of the rest of its row groups only a part is in memory at any time."""
        tables, position = [], 0
        with self._open(file) as opened:
            for group in range(opened.num_row_groups):
                following = position + opened.metadata.row_group(group).num_rows
                if len(_between(rows, position, following)):
                    for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                        wanted = _between(rows, position, position + len(batch)) - position
                        if len(wanted):
                            table = pa.Table.from_batches([batch])
                            tables.append(table if len(wanted) == len(batch) else table.take(pa.array(wanted)))
                        position += len(batch)
                        if position > rows[-1]:
                            break
                position = following
        return tables

    def _footer(self, file: str) -> tuple[int, pa.Schema]:
        with self._open(file) as opened:
            return opened.metadata.num_rows, opened.schema_arrow

    def _open(self, file: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file, filesystem=self.filesystem, pre_buffer=False, buffer_size=READ_AT_ONCE)
        except pa.ArrowException as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _between(numbers: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Those of ascending numbers that are at least start and below stop."""
    return numbers[slice(*np.searchsorted(numbers, [start, stop]))]


def is_url(source: str | os.PathLike) -> bool:
    """Whether a source is named by a URL such as `hf://datasets/org/name`, not by a path."""
    return "://" in str(source)


def parquet_urls(source: str) -> list[str]:
    """The URLs of the parquet files at a URL of a file or folder.

    Raises:
        ValueError: If there are none.
    """
    scheme = source.partition("://")[0]
    return [f"{scheme}://{file}" for file in _find(source)[1]]


def _find(source: str | os.PathLike) -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The file system of a source and the paths of its parquet files, sorted."""
    filesystem, path = _resolve(source)
    info = filesystem.get_file_info(path)
    if info.type == pyarrow.fs.FileType.File:
        if not path.endswith(".parquet"):
            raise ValueError(f"Cannot read {source}: expected a .parquet file or a folder of them.")
        return filesystem, [path]
    if info.type == pyarrow.fs.FileType.NotFound:
        raise ValueError(f"There is no file or folder {source}.")
    entries = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    files = sorted(entry.path for entry in entries if entry.is_file and entry.base_name.endswith(".parquet"))
    if not files:
        raise ValueError(f"No parquet files in the folder {source}.")
    return filesystem, files


def _resolve(source: str | os.PathLike) -> tuple[pyarrow.fs.FileSystem, str]:
    if not is_url(source):
        return pyarrow.fs.LocalFileSystem(), str(Path(source).absolute())
    url = str(source).rstrip("/")
    try:
        return pyarrow.fs.FileSystem.from_uri(url)  # s3, gs, hdfs, file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"Cannot open {source}: {error}") from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path
