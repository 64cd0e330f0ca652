"""Whole collections: texts to embeddings, embeddings to codes and back, as resumable parquet shards."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ..codes import bytes_per_vector
from ..modeling_rqmoe import RQMoEModel
from ..saving import check_record, maker_record, weights_checksum
from .shards import column_array, fixed_size_column, write_shards
from .sources import as_array, load_embeddings, load_table

CODES_METADATA = b"rqmoe"


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
) -> list[Path]:
    """Embeds texts with a sentence-transformers encoder.

    Args:
        source: Table of texts; see `rqmoe_hf.data.load_table`.
        output: Folder for the shards; each has the column `embeddings`, and `id` if the source has one.
        encoder: Hub id or folder of the encoder.
        text_column: Column that holds the texts.
        split: Split of a Hub data set.
        dtype: Of the encoder's arithmetic; "bfloat16" is about twice as fast where the processor has it. The
            embeddings are float32; those of encoders that normalise are normalised again.
        batch_size: Texts per forward pass, sorted by length within a shard.
        shard_size: Texts per file.
        device: Where to run, default the best there is.

    Returns:
        The parquet files.
    """
    dataset = load_table(source, split) if not isinstance(source, Dataset) else source
    if text_column not in dataset.column_names:
        raise ValueError(f"There is no column {text_column!r}; the columns are {', '.join(dataset.column_names)}.")
    settings = {"job": "embed", "encoder": str(encoder), "dtype": dtype, "text_column": text_column}
    loaded: list = []  # loading the encoder takes seconds: not before it is needed

    def make(start: int, stop: int) -> pa.Table:
        if not loaded:
            loaded.append(load_encoder(encoder, dtype, device))
        rows = dataset[start:stop]
        return pa.table(
            _ids(rows) | {"embeddings": fixed_size_column(encode_batches(loaded[0], rows[text_column], batch_size))}
        )

    settings |= {"source": fingerprint(dataset)}
    return write_shards(output, len(dataset), shard_size, settings, make, "embed")


def load_encoder(encoder: str, dtype: str = "float32", device: str | None = None):
    """Loads a SentenceTransformer whose weights have the dtype named."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(encoder), device=device, model_kwargs={"dtype": getattr(torch, dtype)})


def encode_batches(model, texts: list[str], batch_size: int, show_progress_bar: bool = False) -> np.ndarray:
    """Embeds texts, float32 `(n, d)`; unit norms that bfloat16 has blurred are restored."""
    tensors = model.encode(texts, batch_size=batch_size, show_progress_bar=show_progress_bar, convert_to_tensor=True)
    embeddings = tensors.float()
    norms = embeddings.norm(dim=-1, keepdim=True)
    if bool((norms - 1).abs().max() < 0.02):  # unit norm up to bfloat16's rounding
        embeddings = embeddings / norms
    return embeddings.cpu().numpy()


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
) -> list[Path]:
    """Compresses embeddings to parquet shards with the column `codes` (and `id` if the source has one).

    The codes are fixed-size lists of uint8, `bytes_per_vector` long. Which quantizer they belong to stands in the
    files' schema metadata (`codes_info` reads it).

    Args:
        source: Embeddings; see `rqmoe_hf.data.load_embeddings`.
        output: Folder for the shards.
        model: The quantizer.
        column: Column of the embeddings.
        split: Split of a Hub data set.
        num_codebooks: See `RQMoEModel.compress`.
        num_candidates: See `RQMoEModel.compress`.
        beam_size: See `RQMoEModel.compress`.
        local_search: See `RQMoEModel.compress`.
        shard_size: Vectors per file.

    Returns:
        The parquet files.
    """
    table = None
    if Path(source).suffix not in (".npy", ".fvecs", ".bvecs"):
        table = load_table(source, split)
    dataset = load_embeddings(source if table is None else table, column, split)
    ids = table.select_columns(["id"]) if table is not None and "id" in table.column_names else None
    steps = model.config.num_codebooks if num_codebooks is None else num_codebooks
    search: dict = {"num_codebooks": steps, "num_candidates": num_candidates, "beam_size": beam_size}
    if local_search is not None:  # not among the settings of jobs that were begun without it
        search["local_search"] = local_search
    info = maker_record(model, steps)

    def make(start: int, stop: int) -> pa.Table:
        codes = model.compress(as_array(dataset, np.arange(start, stop)), **search, show_progress_bar=False)
        made = pa.table(({} if ids is None else _ids(ids[start:stop])) | {"codes": fixed_size_column(codes)})
        return made.replace_schema_metadata({CODES_METADATA: json.dumps(info).encode()})

    settings = {"job": "compress", "quantizer": info, **search, "column": column, "source": fingerprint(dataset)}
    return write_shards(output, len(dataset), shard_size, settings, make, "compress")


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

    def make(start: int, stop: int) -> pa.Table:
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


def _ids(rows: dict) -> dict:
    return {"id": rows["id"]} if "id" in rows else {}


def fingerprint(dataset: Dataset) -> str:
    """Changes with the content of the data set, not with where its copy in the cache lies."""
    digest = hashlib.sha256(f"{len(dataset)} {dataset.column_names}".encode())
    rows = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))
    for column in dataset.select(rows).with_format("arrow")[:].columns:
        digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:16]
