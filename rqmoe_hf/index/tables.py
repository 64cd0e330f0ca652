"""Tables of embeddings, texts or codes, read batch by batch for an index."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.jobs import check_quantizer, codes_info, fingerprint
from ..data.shards import column_array
from ..data.sources import as_array, load_embeddings, load_table
from ..modeling_rqmoe import RQMoEModel

ARRAYS = (".npy", ".fvecs", ".bvecs")


class SourceTable:
    """A table of which every row becomes a vector of an index.

    Args:
        source: See `RQMoEIndex.add_from`.
        quantizer: That codes must be of.
        column: Of the embeddings.
        text_column: Of the texts.
        id_column: Of the ids.
        metadata_columns: Become the metadata.
        split: Of a data set on the Hub.

    Raises:
        ValueError: If nothing gives vectors, a column is missing, or codes are of another quantizer.
    """

    def __init__(
        self,
        source: str | os.PathLike | np.ndarray | Dataset,
        quantizer: RQMoEModel,
        column: str,
        text_column: str,
        id_column: str,
        metadata_columns: Sequence[str],
        split: str,
    ):
        is_array = isinstance(source, np.ndarray) or (
            isinstance(source, (str, os.PathLike)) and Path(source).suffix in ARRAYS
        )
        opened: Any = source
        if is_array:
            opened, column = load_embeddings(source), "embeddings"
        elif isinstance(source, (str, os.PathLike)):
            opened = load_table(source, split)
        self._table: Dataset = opened.with_format("arrow")
        names = self._table.column_names
        missing = [name for name in metadata_columns if name not in names]
        if missing:
            raise ValueError(f"There is no column {missing[0]!r}; the columns are {', '.join(names)}.")
        self._embeddings = column if column in names else None
        self._codes = "codes" if self._embeddings is None and "codes" in names else None
        self._texts = text_column if text_column in names else None
        if self._embeddings is None and self._codes is None and self._texts is None:
            raise ValueError(
                f"There are neither embeddings ({column!r}) nor codes nor texts ({text_column!r}) among the columns "
                f"{', '.join(names)}: name the column."
            )
        if self._codes is not None and isinstance(source, (str, os.PathLike)):
            check_quantizer(codes_info(source), quantizer, source)
        self._ids = id_column if id_column in names else None
        self._metadata = list(metadata_columns)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def has_ids(self) -> bool:
        """Whether a column holds the ids."""
        return self._ids is not None

    @property
    def name(self) -> str:
        """Changes with the content and with the columns that are used."""
        columns = (self._embeddings, self._codes, self._texts, self._ids, self._metadata)
        return f"{fingerprint(self._table)} {columns}"

    def batch(self, start: int, stop: int) -> tuple[list | None, Any, list[str] | None, Any, list[dict] | None]:
        """Rows as `RQMoEIndex.add` takes them: ids, embeddings, texts, codes, metadata."""
        values, embeddings = self._table[start:stop], None
        if self._embeddings is not None:
            vectors = load_embeddings(self._table, self._embeddings)
            embeddings = as_array(vectors, np.arange(start, stop))  # type: ignore[arg-type]
        codes = None if self._codes is None else column_array(values[self._codes]).astype(np.uint8)
        texts = None if self._texts is None else values[self._texts].to_pylist()
        ids = None if self._ids is None else values[self._ids].to_pylist()
        metadata = values.select(self._metadata).to_pylist() if self._metadata else None
        return ids, embeddings, texts, codes, metadata
