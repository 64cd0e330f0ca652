"""Writing a checkpoint so that it is whole or not there, and telling its weights from others."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .limits_rqmoe import LARGEST
from .modeling_rqmoe import RQMoEModel


def round_weights(model: RQMoEModel) -> None:
    """Rounds all weights to bfloat16 values, in place. The model stays float32, but fits into half the bytes."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)


def save_whole(
    model: RQMoEModel, folder: str | os.PathLike, files: dict[str, str] | None = None, half_size: bool = False
) -> None:
    """Saves a model, and text files beside it, through a temporary folder; config.json appears last.

    Args:
        model: The model.
        folder: Where to; existing files of the same names are replaced.
        files: Further files, path in the folder to text.
        half_size: Store the weights as bfloat16 (see [`round_weights`]). Loading gives float32, as config.json says.
    """
    stored = None
    if half_size:
        parameters = dict(model.named_parameters())
        stored = {name: tensor.to(torch.bfloat16) if name in parameters else tensor
                  for name, tensor in model.state_dict().items()}  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        model.save_pretrained(scratch, state_dict=stored)
        for name, text in (files or {}).items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            (Path(scratch) / name).write_text(text, "utf-8")
        files_written = [file for file in Path(scratch).rglob("*") if file.is_file()]
        for file in sorted(files_written, key=lambda file: file.name == "config.json"):
            target = folder / file.relative_to(scratch)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between the settings of a job that was begun and those of the present one, for a message."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in names)


def write_text(file: Path, text: str) -> None:
    """Writes a text file so that it is whole or not there."""
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_text(text, "utf-8")
    os.replace(scratch, file)


def weights_checksum(model: RQMoEModel) -> str:
    """Sixteen hexadecimal digits that change with any weight: tells whether codes belong to a quantizer.

    Of weights that [`load_quantizer`] has rounded while loading they are those of the stored ones: codes that were
    made in bfloat16 belong to the same quantizer.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    checksum = digest.hexdigest()[:16]
    rounded, stored = model.cast_from or (None, None)
    return stored if stored is not None and checksum == rounded else checksum


def write_tensors(
    file: Path, arrays: dict[str, np.ndarray], last: str, size: int, parts: Iterable[np.ndarray], notes: dict[str, str]
) -> None:
    """Writes a safetensors file whose last array is made while it is written, so that it is never whole in memory.

    Args:
        file: Where to.
        arrays: float32 and int64, by name; those of int64 come first, so that all are aligned.
        last: Name of the last array, uint8 `(size,)`.
        size: Its bytes.
        parts: What it consists of, contiguous arrays of any type, one after the other.
        notes: The file's metadata.

    Raises:
        ValueError: If the parts have another size.
    """
    header: dict[str, Any] = {"__metadata__": notes}
    place, kinds = 0, {"int64": "I64", "float32": "F32"}
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    for name, array in ordered.items():
        offsets = [place, place := place + array.nbytes]
        header[name] = {"dtype": kinds[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
    header[last] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for array in ordered.values():
            opened.write(np.ascontiguousarray(array).data)
        start = opened.tell()
        for part in parts:
            opened.write(part.data)
        written = opened.tell() - start
    if written != size:
        raise ValueError(f"{file}: the array {last} should have {size} bytes, its parts have {written}.")


def maker_record(model: RQMoEModel, num_codebooks: int) -> dict[str, Any]:
    """What is kept beside codes: which quantizer made them, and how many codes of which sizes a vector has."""
    return {
        "model": model.name_or_path,
        "revision": model.commit_hash,
        "weights": weights_checksum(model),
        "num_codebooks": num_codebooks,
        "codebook_size": model.config.code_sizes,
        "hidden_size": model.config.hidden_size,
    }


def check_record(record: Any, origin: object) -> dict[str, Any]:
    """What [`maker_record`] wrote, if that is what it is.

    Args:
        record: What was read from a file of a stranger.
        origin: The file, for messages.

    Raises:
        ValueError: If an entry is missing, of another type, or larger than that of any quantizer.
    """
    kinds: dict[str, Any] = {"model": (str, type(None)), "revision": (str, type(None)), "weights": str,
             "num_codebooks": int, "codebook_size": (int, list), "hidden_size": int}  # fmt: skip
    if not isinstance(record, dict):
        raise ValueError(f"{origin} does not say which quantizer made its codes: it says {str(record)[:100]}.")
    for name, kind in kinds.items():
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"The record of the quantizer in {origin} is damaged: {name} is {str(value)[:100]}.")
    sizes = record["codebook_size"]
    counts = {"num_codebooks": [record["num_codebooks"]], "hidden_size": [record["hidden_size"]]}
    counts["codebook_size"] = sizes if isinstance(sizes, list) else [sizes]
    for name, values in counts.items():
        least, largest = (2, 65_536) if name == "codebook_size" else (1, LARGEST[name])
        if not all(type(value) is int and least <= value <= largest for value in values):
            raise ValueError(
                f"The record of the quantizer in {origin} is damaged: {name} must lie between {least} and "
                f"{largest:,}, got {str(record[name])[:100]}."
            )
    if isinstance(sizes, list) and len(sizes) < record["num_codebooks"]:
        raise ValueError(
            f"The record of the quantizer in {origin} is damaged: it names {len(sizes)} codebook sizes for "
            f"{record['num_codebooks']} codes."
        )
    return record
