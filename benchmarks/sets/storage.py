"""How a set lies on the disk: ``train.npy``, ``test.npy`` and a manifest with their origin and checksums."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rqmoe_hf.saving import write_text

MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes


def file_checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def array_checksum(arrays: Iterable[np.ndarray]) -> str:
    """The sha256 of several float32 arrays, their shapes included: moving a row from one to the next changes it."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def text_checksum(texts: list[str]) -> str:
    """The sha256 of texts, joined by newlines."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as file:
        np.save(file, array)
    os.replace(scratch, path)


def write_set(
    folder: Path,
    train: np.ndarray,
    test: np.ndarray,
    held_out: tuple[int, int],
    sources: list[dict[str, str]],
    command: str,
    libraries: tuple[str, ...] = (),
    **details: Any,
) -> None:
    """Writes a set; the manifest comes last, so that a folder with a manifest is complete.

    Args:
        folder: Where; made if it is not there.
        train: ``(n, d)`` vectors to train on.
        test: ``(m, d)`` others: first those for validation, then the queries, the rest is the database.
        held_out: How many vectors of ``test`` are for validation and how many are queries.
        sources: For each source its ``name``, ``version`` and ``licence``.
        command: What builds the set again.
        libraries: Packages besides NumPy whose version the vectors may depend on.
        details: What else belongs into the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, array in (("train", train), ("test", test)):
        save_array(folder / f"{name}.npy", np.ascontiguousarray(array, np.float32))
    manifest = {
        "dimension": train.shape[1],
        "train": len(train),
        "test": len(test),
        "validation": held_out[0],
        "queries": held_out[1],
        "sha256": {name: file_checksum(folder / name) for name in ("train.npy", "test.npy")},
        "sources": sources,
        "command": command,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("numpy", *libraries)},
        **details,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    print(f"{folder}: {len(train):,} training and {len(test):,} test vectors of {train.shape[1]} dimensions")
