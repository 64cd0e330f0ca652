"""Files of scanners: what is checked of them before Faiss relies on it."""

import json
from pathlib import Path

import numpy as np


def check_arrays(
    arrays: dict[str, np.ndarray], codewords: list[np.ndarray] | None, bits: list[int], metric: str, levels: int
) -> None:
    """Raises ValueError unless the arrays of a snapshot have the shapes that Faiss is going to rely on unchecked."""
    floats = {name: array for name, array in arrays.items() if name != "sizes"}
    if any(array.dtype != np.float32 for array in floats.values()) or arrays["sizes"].dtype != np.int64:
        raise ValueError("its arrays are of other types than they should")
    known = arrays["codewords"] if codewords is None else codewords[0]
    width = known.shape[1] if known.ndim == 2 else -1
    fits = codewords is not None or known.shape == (sum(1 << number for number in bits), width)
    fits &= arrays["sizes"].ndim == 1 and arrays["centroids"].shape == (max(len(arrays["sizes"]), 1), width)
    fits &= ("norms" in arrays) == (metric != "inner_product")
    fits &= "norms" not in arrays or arrays["norms"].shape == (levels,)
    fits &= "probes" not in arrays or arrays["probes"].shape == (max(len(arrays["probes"]), 1), width)
    if not fits:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in sorted(arrays.items()))
        raise ValueError(f"its arrays have other shapes than they should: {shapes}")


def taken(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Takes out the arrays whose names begin with a prefix; their names without it."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def span_of(file: Path, name: str) -> tuple[int, int]:
    """Where an array of a safetensors file begins and ends."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    start, stop = header[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop
