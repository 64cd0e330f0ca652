"""Embeddings from where users keep them, as `datasets` with one float32 column named `embeddings`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from faiss.contrib.vecs_io import bvecs_mmap, fvecs_mmap
from transformers import default_data_collator

from .batches import as_matrix
from .parquet import BATCH_ROWS, READ_AT_ONCE, is_url, parquet_urls
from .sampling import MANY_ROWS, sample_rows

FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_table(source: str | os.PathLike, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Opens a table: a file, a folder of parquet files, a folder of `save_to_disk`, or a data set id on the Hub.

    Args:
        source: Path ending in .parquet, .arrow, .jsonl, .json, .csv or .txt (one text per line), a folder, an id, or
            the URL of a parquet file or of a folder of them, such as `hf://datasets/org/name/folder`.
        split: Split of a Hub data set or of a saved DatasetDict.
        streaming: Read rows as they come, without a copy in the cache.

    Raises:
        ValueError: If there is no such source, or it has no such split.
    """
    if is_url(source):
        return _built("parquet", parquet_urls(str(source)), streaming)
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _saved(path, split)
        files = sorted(str(file) for file in path.glob("*.parquet"))
        if not files:
            raise ValueError(f"No parquet files in the folder {path}.")
        return _built("parquet", files, streaming)
    if path.is_file():
        builder = "text" if path.suffix == ".txt" else FILE_BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(f"Cannot read {path}: expected one of .txt, {', '.join(FILE_BUILDERS)} or a folder.")
        return _built(builder, str(path), streaming)
    if path.suffix in (*FILE_BUILDERS, ".txt", ".npy", ".fvecs", ".bvecs") or str(source).count("/") > 1:
        raise ValueError(f"There is no file or folder {source}.")
    return load_dataset(str(source), split=split, streaming=streaming)


def _saved(path: Path, split: str) -> Dataset:
    """What `save_to_disk` wrote; of a DatasetDict the split."""
    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"There is no split {split!r} in {path}; the splits are {', '.join(loaded)}: name one.")
    return loaded[split]


def _built(builder: str, files: str | list[str], streaming: bool) -> Dataset | IterableDataset:
    """A table of files, whose damage comes to light as a ValueError that names them."""
    options = parquet_options() if builder == "parquet" else {}
    try:
        return load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)
    except (DatasetGenerationError, pa.ArrowException, OSError, UnicodeError, ImportError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{files if isinstance(files, str) else files[0]} cannot be read: {reason}") from error


def parquet_options() -> dict[str, Any]:
    """How `datasets` is to read parquet.

    Arrow decodes a row group, which can be of any size, as a whole. Without these options what it is decoded from
    would be in memory as a whole, too, and again what is written to the cache.
    """
    options: dict[str, Any] = {"batch_size": BATCH_ROWS}
    if hasattr(ParquetConfig, "fragment_scan_options"):  # since datasets 4.2
        options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(
            use_buffered_stream=True, buffer_size=READ_AT_ONCE, pre_buffer=False
        )
    return options


def load_embeddings(
    source: str | os.PathLike | np.ndarray | Dataset | IterableDataset,
    column: str = "embeddings",
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Opens embeddings for training, evaluation or compression.

    Args:
        source: An array `(n, d)`; a .npy, .fvecs or .bvecs file; anything that [`load_table`] opens; or a data set.
        column: Column that holds the embeddings.
        split: Split of a Hub data set.
        streaming: Return an IterableDataset.

    Returns:
        A data set whose column `embeddings` gives float32 tensors `(d,)`. Other columns are dropped.

    Raises:
        ValueError: If the source or the column does not exist, or the rows are no vectors of one length.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    suffix = None if path is None or is_url(str(source)) else path.suffix
    if path is not None and suffix in (".npy", ".fvecs", ".bvecs") and not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path is not None and suffix == ".npy":
        source = np.load(path, mmap_mode="r", allow_pickle=False)
    elif suffix in (".fvecs", ".bvecs"):
        source = (fvecs_mmap if suffix == ".fvecs" else bvecs_mmap)(str(source)).astype(np.float32)
    if isinstance(source, np.ndarray):
        dataset = dataset_from_array(source)
    else:
        dataset = load_table(source, split, streaming) if isinstance(source, (str, os.PathLike)) else source
        dataset = _single_column(dataset, column)
    return dataset.with_format("torch")


def dataset_from_array(embeddings: np.ndarray) -> Dataset:
    """A data set over the array's memory, `(n, d)` floats; only a float32 array in row order is not copied."""
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating) or not embeddings.size:
        raise ValueError(f"Expected floats of shape (n, d), got {embeddings.dtype} {embeddings.shape}.")
    values = np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1)
    buffer = pa.Array.from_buffers(pa.float32(), len(values), [None, pa.py_buffer(values)])
    return Dataset(pa.table({"embeddings": pa.FixedSizeListArray.from_arrays(buffer, embeddings.shape[1])}))


def as_array(dataset: Dataset, rows: np.ndarray | None = None) -> np.ndarray:
    """The embeddings of a data set (or of some of its rows), float32 `(n, d)`.

    Raises:
        ValueError: If the rows are no vectors of floats, all of one length.
    """
    if rows is not None:
        dataset = dataset.select(rows)
    return _vectors_of(dataset.with_format("arrow")[:])


def _vectors_of(table: pa.Table) -> np.ndarray:
    """The column `embeddings` of a table, float32 `(n, d)`."""
    column = table["embeddings"].combine_chunks()
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise ValueError(
            f"Expected embeddings as lists of floating point numbers, got a column of {kind}. Name another column, or "
            "convert it to float32, in the units of the training embeddings; int8-quantized ones must be rescaled."
        )
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if column.null_count or flat.size % len(column) or _uneven(column):
        raise ValueError("The embeddings are not all vectors of one length: drop missing and cut rows first.")
    return flat.reshape(len(column), -1)


class EmbeddingRows(torch.utils.data.Dataset):
    """The embeddings of a data set for a DataLoader, a batch at a time.

    A DataLoader takes a data set's rows one by one and joins them again, which keeps a GPU waiting: this gives all
    rows of a batch as one matrix. [`collate_rows`] takes them.

    Args:
        dataset: With an `embeddings` column.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> list[np.ndarray]:
        return [_vectors_of(self.dataset[rows])]


def collate_rows(batch: list[Any]) -> dict[str, torch.Tensor]:
    """Makes a batch for the model of what [`EmbeddingRows`] gives, or of rows of a stream as dictionaries."""
    if isinstance(batch[0], np.ndarray):
        return {"embeddings": torch.tensor(batch[0])}  # a copy: Arrow's memory is not to be written to
    return default_data_collator(batch)


def sample_array(dataset: Dataset | IterableDataset, count: int, seed: int) -> np.ndarray:
    """Up to `count` random rows (of a stream: its first rows), float32 `(count, d)`."""
    if isinstance(dataset, IterableDataset):
        return _first_rows(dataset, count)
    if len(dataset) <= count:
        return as_array(dataset)
    return as_array(dataset, sample_rows(len(dataset), count, np.random.default_rng(seed)))


def _first_rows(dataset: IterableDataset, count: int) -> np.ndarray:
    """The first rows of a stream, float32 `(count, d)`, of which nothing else is in memory but a batch."""
    array, filled = np.empty((0, 0), np.float32), 0
    for batch in dataset.take(count).iter(batch_size=min(count, 1_024)):
        rows = as_matrix(batch["embeddings"], "embeddings")
        if not filled:
            array = np.empty((count, rows.shape[1]), np.float32)
        if rows.shape[1] != array.shape[1]:
            raise ValueError("The embeddings are not all vectors of one length: drop missing and cut rows first.")
        array[filled : filled + len(rows)] = rows
        filled += len(rows)
    return array[:filled]


def split_dataset(dataset: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Takes random rows (at most a fifth) out of a data set for evaluation; returns the rest and those."""
    total, count = len(dataset), min(held_out, len(dataset) // 5)
    generator = np.random.default_rng(seed)
    if total <= MANY_ROWS:
        order = generator.permutation(total)
        return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))
    chosen = sample_rows(total, count, generator)
    bounds = zip([0, *(chosen + 1).tolist()], [*chosen.tolist(), total], strict=True)
    between = [dataset.select(range(start, stop)) for start, stop in bounds if stop > start]
    return concatenate_datasets(between), dataset.select(chosen)  # slices, where a list would name all other rows


def _single_column(dataset: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    names = dataset.column_names or list(next(iter(dataset)))
    if column not in names:
        raise ValueError(f"There is no column {column!r}; the columns are {', '.join(names)}. Name it with `column`.")
    dataset = dataset.select_columns([column])
    return dataset if column == "embeddings" else dataset.rename_column(column, "embeddings")


def _uneven(column: pa.Array) -> bool:
    if pa.types.is_fixed_size_list(column.type):
        return False
    lengths = np.diff(column.offsets.to_numpy())
    return bool((lengths != lengths[0]).any())
