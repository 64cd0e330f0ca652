"""Whole collections: texts to embeddings, embeddings to codes and back, as resumable parquet shards."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..codes import bytes_per_vector
from ..modeling_rqmoe import RQMoEModel
from ..saving import check_record, maker_record, weights_checksum
from .batches import CompressBatch, EmbedBatch
from .parquet import ParquetFiles, is_url
from .shards import Report, column_array, fixed_size_column, write_shards
from .sources import as_array, load_embeddings, load_table

if TYPE_CHECKING:
    from .ray_engine import RayEngine

CODES_METADATA = b"rqmoe"
# Rows that are done and reported at a time: texts take long, and vectors need company on a GPU.
TEXTS_AT_A_TIME, VECTORS_AT_A_TIME = 4_096, 8_192


@dataclass
class MakeBlock:
    """What one block of a job becomes. Picklable where `rows` is, so that other processes can do it.

    Args:
        rows: The source.
        column: The column of texts or embeddings.
        steps: What turns it into the result: callables of `rqmoe_hf.data.batches`.
        result: The column that is kept, beside `id` if there is one.
        metadata: Of the schema of the result.
    """

    rows: Dataset | ParquetFiles
    column: str
    steps: list[CompressBatch | EmbedBatch]
    result: str
    metadata: dict[bytes, bytes] | None = None

    def __call__(self, start: int, stop: int, report: Report | None = None) -> pa.Table:
        """The result for the rows start to stop."""
        names = [name for name in dict.fromkeys(("id", self.column)) if name in self.rows.column_names]
        block = select_rows(self.rows, range(start, stop), names)
        texts = isinstance(self.steps[0], EmbedBatch)
        values = block[self.column][:] if texts else as_array(load_embeddings(block, self.column))
        results, size = [], TEXTS_AT_A_TIME if texts else VECTORS_AT_A_TIME
        for first in range(0, len(values), size):
            piece = values[first : first + size]
            if not texts:
                _check_finite(piece, start + first)
            batch = {self.column: piece}
            for step in self.steps:
                batch = step(batch)
            results.append(batch[self.result])
            if report is not None:
                report(len(piece))
        ids = {"id": block["id"][:]} if "id" in names else {}
        table = pa.table(ids | {self.result: fixed_size_column(np.concatenate(results))})
        return table.replace_schema_metadata(self.metadata)


def _check_finite(vectors: np.ndarray, first: int) -> None:
    """Names a bad row by its number in the whole source, of which a quantizer sees only a piece."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        row = first + int(bad.argmax())
        raise ValueError(f"Embeddings must be finite, but row {row} of the source holds NaN or infinity: drop it.")


def embed_texts(
    source: str | os.PathLike | Dataset,
    output: str | os.PathLike,
    encoder: str,
    text_column: str = "text",
    split: str = "train",
    dtype: str = "float32",
    batch_size: int = 64,
    shard_size: int = 16_384,
    device: str | None = None,
    quantizer: RQMoEModel | None = None,
    engine: "RayEngine | None" = None,
) -> list[Path]:
    """Embeds texts with a sentence-transformers encoder.

    Args:
        source: Table of texts; see `rqmoe_hf.data.load_table`. For Ray: parquet, see `rqmoe_hf.data.ParquetFiles`.
        output: Folder for the shards; each has the column `embeddings`, and `id` if the source has one.
        encoder: Hub id or folder of the encoder.
        text_column: Column that holds the texts.
        split: Split of a Hub data set.
        dtype: Of the encoder's arithmetic; "bfloat16" is about twice as fast where the processor has it. The
            embeddings are float32; those of encoders that normalise are normalised again.
        batch_size: Texts per forward pass, sorted by their numbers of tokens among 4,096.
        shard_size: Texts per file.
        device: Where to run, default the best there is.
        quantizer: Compresses the embeddings in the same pass: the shards then are those of [`compress_shards`].
        engine: Ray's workers; default this process.

    Returns:
        The parquet files.
    """
    rows = open_rows(source, split, engine)
    if text_column not in rows.column_names:
        raise ValueError(f"There is no column {text_column!r}; the columns are {', '.join(rows.column_names)}.")
    settings: dict[str, Any] = {"job": "embed", "encoder": str(encoder), "dtype": dtype, "text_column": text_column}
    embed = EmbedBatch(encoder, text_column, "embeddings", dtype, batch_size, device)
    make = MakeBlock(rows, text_column, [embed], "embeddings")
    if quantizer is not None:
        info = maker_record(quantizer, quantizer.config.num_codebooks)
        settings |= {"quantizer": info}
        make = MakeBlock(rows, text_column, [embed, CompressBatch(quantizer)], "codes", codes_metadata(info))
    settings |= {"source": fingerprint(rows)}
    return write_shards(output, len(rows), shard_size, settings, make, "embed", engine)


def compress_shards(
    source: str | os.PathLike,
    output: str | os.PathLike,
    model: RQMoEModel,
    column: str = "embeddings",
    split: str = "train",
    num_codebooks: int | None = None,
    num_candidates: int | None = None,
    beam_size: int | None = None,
    local_search: int | None = None,
    shard_size: int = 65_536,
    engine: "RayEngine | None" = None,
) -> list[Path]:
    """Compresses embeddings to parquet shards with the column `codes` (and `id` if the source has one).

    The codes are fixed-size lists of uint8, `bytes_per_vector` long. Which quantizer they belong to stands in the
    files' schema metadata (`codes_info` reads it).

    Args:
        source: Embeddings; see `rqmoe_hf.data.load_embeddings`. For Ray: parquet, see `rqmoe_hf.data.ParquetFiles`.
        output: Folder for the shards.
        model: The quantizer.
        column: Column of the embeddings.
        split: Split of a Hub data set.
        num_codebooks: See `RQMoEModel.compress`.
        num_candidates: See `RQMoEModel.compress`.
        beam_size: See `RQMoEModel.compress`.
        local_search: See `RQMoEModel.compress`.
        shard_size: Vectors per file.
        engine: Ray's workers; default this process.

    Returns:
        The parquet files.
    """
    is_array = engine is None and not is_url(source) and Path(source).suffix in (".npy", ".fvecs", ".bvecs")
    rows = load_embeddings(source) if is_array else open_rows(source, split, engine)
    steps = model.config.num_codebooks if num_codebooks is None else num_codebooks
    search: dict = {"num_codebooks": steps, "num_candidates": num_candidates, "beam_size": beam_size}
    if local_search is not None:  # not among the settings of jobs that were begun without it
        search["local_search"] = local_search
    info = maker_record(model, steps)
    name = "embeddings" if is_array else column
    make = MakeBlock(rows, name, [CompressBatch(model, name, **search)], "codes", codes_metadata(info))
    seen = fingerprint(rows, lambda sample: load_embeddings(sample, name))
    settings = {"job": "compress", "quantizer": info, **search, "column": column, "source": seen}
    return write_shards(output, len(rows), shard_size, settings, make, "compress", engine)


def decompress_shards(
    source: str | os.PathLike, output: str | os.PathLike, model: RQMoEModel, shard_size: int = 16_384
) -> list[Path]:
    """Restores embeddings from what [`compress_shards`] wrote: shards with `embeddings` (and `id`).

    Raises:
        ValueError: If the codes were made by other weights.
    """
    info = codes_info(source)
    check_quantizer(info, model, source)
    dataset = load_table(source)

    def make(start: int, stop: int, report: Report | None = None) -> pa.Table:
        rows = dataset.with_format("arrow")[start:stop]
        restored = model.decompress(column_array(rows["codes"]), info["num_codebooks"], show_progress_bar=False)
        ids = {"id": rows["id"]} if "id" in rows.column_names else {}
        return pa.table(ids | {"embeddings": fixed_size_column(restored)})

    settings = {"job": "decompress", "quantizer": info, "source": fingerprint(dataset)}
    return write_shards(output, len(dataset), shard_size, settings, make, "decompress")


def codes_info(source: str | os.PathLike) -> dict:
    """Which quantizer made the codes of a file or folder: model, revision, weights, num_codebooks, codebook_size.

    Raises:
        ValueError: If there are no codes, or what they say of their quantizer is damaged.
    """
    path = Path(source)
    files = [file for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path]) if file.is_file()]
    found = [_file_info(file) for file in files]
    if not found:
        raise ValueError(f"{source} holds no codes of `rqmoe compress`: a parquet file or folder of it is expected.")
    for file, info in zip(files, found, strict=True):
        if info["weights"] != found[0]["weights"] or info["num_codebooks"] != found[0]["num_codebooks"]:
            raise ValueError(f"{file} holds codes of another quantizer or rate than {files[0]}: keep them apart.")
    return found[0]


def _file_info(file: Path) -> dict:
    """What one parquet file says of its quantizer; its column of codes must agree."""
    try:
        schema = pq.read_schema(file)
        kind: Any = schema.field("codes").type if schema.names.count("codes") == 1 else pa.null()
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(
            f"{file} holds no codes of `rqmoe compress`: it is no parquet file, or damaged: {error}"
        ) from error
    if CODES_METADATA not in (schema.metadata or {}):
        raise ValueError(f"{file} holds no codes of `rqmoe compress`: it does not say which quantizer made them.")
    try:
        record = json.loads(schema.metadata[CODES_METADATA])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: its note on the quantizer is no JSON ({error}).") from error
    info = check_record(record, file)
    width = bytes_per_vector(info["num_codebooks"], info["codebook_size"])
    if not pa.types.is_fixed_size_list(kind) or (kind.value_type, kind.list_size) != (pa.uint8(), width):
        raise ValueError(f"{file} is damaged: the column codes should hold {width} bytes each, it is {kind}.")
    return info


def check_quantizer(info: dict, quantizer: RQMoEModel, origin: object) -> None:
    """Raises a ValueError if codes at `origin`, of which `codes_info` says `info`, are not those of a quantizer."""
    weights = weights_checksum(quantizer)
    if info["weights"] != weights:
        at = f" at revision {info['revision']}" if info.get("revision") else ""
        raise ValueError(
            f"{origin}: These codes were made by {info['model']}{at} (weights {info['weights']}), not by "
            f"{quantizer.name_or_path or 'this quantizer'} (weights {weights}): load that quantizer."
        )
    config = quantizer.config
    expected = (config.code_sizes, config.hidden_size)
    if (info["codebook_size"], info["hidden_size"]) != expected or info["num_codebooks"] > config.num_codebooks:
        raise ValueError(
            f"{origin} names the weights of the quantizer given, but other sizes than its {config.num_codebooks} "
            f"codebooks of {config.code_sizes} codewords and {config.hidden_size} dimensions: their note is damaged."
        )


def codes_metadata(info: dict) -> dict[bytes, bytes]:
    """What the schema of a file of codes says of their quantizer."""
    return {CODES_METADATA: json.dumps(info).encode()}


def open_rows(
    source: str | os.PathLike | Dataset, split: str = "train", engine: "RayEngine | None" = None
) -> Dataset | ParquetFiles:
    """Opens the source of a job: as a `datasets.Dataset` for this process, in place for the workers of an engine."""
    if engine is None:
        return source if isinstance(source, Dataset) else load_table(source, split)
    if isinstance(source, Dataset):
        raise ValueError("Workers cannot read a data set of this process: give the folder or URL of parquet files.")
    if not is_url(source) and not Path(source).exists():
        raise ValueError(
            f"There is no file or folder {source}. Ray's workers read parquet files in place: a path or a URL such as "
            "s3://bucket/folder; a data set on the Hub is hf://datasets/org/name/folder."
        )
    return ParquetFiles(source)


def select_rows(rows: Dataset | ParquetFiles, wanted: range | np.ndarray, columns: list[str]) -> Dataset:
    """Some rows and columns of a source."""
    if isinstance(rows, ParquetFiles):
        return rows.select(wanted, columns)
    return rows.select_columns(columns).select(wanted)


def fingerprint(rows: Dataset | ParquetFiles, view: Callable[[Dataset], Dataset] = lambda sample: sample) -> str:
    """Changes with the content of the data set, not with where its copy in the cache lies.

    Args:
        rows: The data set.
        view: Gives the part of it that counts.
    """
    wanted = np.unique(np.linspace(0, len(rows) - 1, 64).astype(int))
    sample = view(rows.select(wanted))
    digest = hashlib.sha256(f"{len(rows)} {sample.column_names}".encode())
    for column in sample.with_format("arrow")[:].columns:
        digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:16]
