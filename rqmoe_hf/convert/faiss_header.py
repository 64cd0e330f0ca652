"""Looks at the head of a Faiss file before Faiss reads it: Faiss allocates what the head claims."""

import struct
from pathlib import Path
from typing import BinaryIO

from ..limits_rqmoe import LARGEST

ADDITIVE = (b"IxRQ", b"IxRq", b"IxLS")
PRODUCT = (b"IxPQ", b"IxPo", b"IxPq")
ROTATIONS = (b"LTra", b"rrot")
CHAIN = b"IxPT"
INDEX_BYTES = 4 + 8 + 2 * 8 + 1 + 4  # dimension, vectors, two unused numbers, whether it is trained, metric
MAX_BITS = 16
MAX_DENSE_NUMBERS = 1 << 30  # of a product quantizer as whole vectors
TABLE_CODEWORDS = 8_192  # Faiss makes a table of the square of the codewords, however small the file is


def check_header(path: Path) -> None:
    """Raises ValueError unless a file begins like a quantizer that can be converted, and is as long as it claims.

    Args:
        path: File of `faiss.write_index` or `faiss.write_ProductQuantizer`.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            kind = file.read(4)
            if kind not in (*ADDITIVE, *PRODUCT, CHAIN):
                file.seek(0)  # the file of a product quantizer begins with its dimension
                return _check_product(file, size)
            file.seek(INDEX_BYTES, 1)
            if kind == CHAIN:
                kind = _skip_rotation(file, size)
            return _check_product(file, size) if kind in PRODUCT else _check_additive(file, size)
        except struct.error:
            raise ValueError("it is cut off") from None


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _skip_rotation(file: BinaryIO, size: int) -> bytes:
    """Passes over the one transform of a chain; the kind of the index after it."""
    (count,) = _numbers(file, "i")
    kind = file.read(4)
    if count != 1 or kind not in ROTATIONS:
        raise ValueError(f"expected one rotation before the quantizer, got {count} transforms, the first {kind!r}")
    file.seek(1, 1)  # whether there is a bias
    for _ in ("matrix", "bias"):
        (length,) = _numbers(file, "Q")
        if length * 4 > size:
            raise ValueError(f"its rotation claims {length:,} numbers, and the file has {size:,} bytes")
        file.seek(length * 4, 1)
    file.seek(4 + 4 + 1, 1)  # dimensions, whether it is trained
    kind = file.read(4)
    if kind not in (*ADDITIVE, *PRODUCT):
        raise ValueError(f"expected a quantizer after the rotation, got {kind!r}")
    file.seek(INDEX_BYTES, 1)
    return kind


def _check_dimensions(dimension: int, steps: int) -> None:
    if not (1 <= dimension <= LARGEST["hidden_size"] and 1 <= steps <= LARGEST["num_codebooks"]):
        raise ValueError(
            f"it claims {steps:,} codebooks of {dimension:,} dimensions; allowed are 1 to "
            f"{LARGEST['num_codebooks']:,} of 1 to {LARGEST['hidden_size']:,}"
        )


def _check_product(file: BinaryIO, size: int) -> None:
    dimension, steps, bits, length = _numbers(file, "QQQQ")
    _check_dimensions(dimension, steps)
    if not 1 <= bits <= MAX_BITS or dimension % steps:
        raise ValueError(f"it claims {steps} codebooks of {bits} bits in {dimension} dimensions")
    if length not in (0, dimension << bits) or length * 4 > size:
        raise ValueError(f"it claims {length:,} numbers in codebooks, and has {size:,} bytes")
    if (dimension * steps) << bits > MAX_DENSE_NUMBERS:
        raise ValueError(
            f"it would become {(dimension * steps) << bits:,} numbers; at most {MAX_DENSE_NUMBERS:,} are allowed"
        )


def _check_additive(file: BinaryIO, size: int) -> None:
    dimension, steps, count = _numbers(file, "QQQ")
    _check_dimensions(dimension, steps)
    if count != steps:
        raise ValueError(f"it claims {steps} codebooks, and the sizes of {count}")
    bits = _numbers(file, f"{steps}Q")
    if not all(1 <= width <= MAX_BITS for width in bits):
        raise ValueError(f"it claims codebooks of {max(bits)} bits; allowed are 1 to {MAX_BITS}")
    (_, length), codewords = _numbers(file, "?Q"), sum(1 << width for width in bits)
    if length not in (0, codewords * dimension) or length * 4 > size:
        raise ValueError(f"it claims {length:,} numbers in codebooks, and has {size:,} bytes")
    if codewords > max(TABLE_CODEWORDS, 256 * dimension):
        raise ValueError(
            f"Faiss would make a table of {codewords:,}^2 numbers for it; with {dimension} dimensions at most "
            f"{max(TABLE_CODEWORDS, 256 * dimension):,} codewords are allowed"
        )
