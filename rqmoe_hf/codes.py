"""Packed codes: integer codes to bytes and back, in Faiss's bit order.

Where a function takes `codebook_size`, it is one number for all steps, or a sequence with the size of each step's
codebook (`RQMoEConfig.code_sizes` is either).
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

PACKING_BATCH = 1 << 20  # codes expanded to bits at a time


def bits_per_code(codebook_size: int) -> int:
    """Bits of one packed code: log2(codebook_size), rounded up to a whole bit."""
    if not 2 <= codebook_size <= 65536:
        raise ValueError(f"codebook_size must lie between 2 and 65536, got {codebook_size}.")
    return (codebook_size - 1).bit_length()


def sizes_of(num_codebooks: int, codebook_size: int | Sequence[int]) -> list[int]:
    """Codebook size of each of the first `num_codebooks` steps."""
    if isinstance(codebook_size, (int, np.integer)):
        return [int(codebook_size)] * num_codebooks
    if num_codebooks > len(codebook_size):
        raise ValueError(f"There are codebook sizes for {len(codebook_size)} steps, but {num_codebooks} codes.")
    return list(codebook_size[:num_codebooks])


def sizes_for_bytes(size: int, bits: int = 10) -> list[int]:
    """Codebook sizes that use every bit of `size` bytes: as many codes of `bits` bits as fit, and one of the rest.

    Larger codebooks give lower errors for the same bytes, and take more memory, time and training vectors.
    """
    if size < 1 or not 1 <= bits <= 16:
        raise ValueError(f"Expected at least 1 byte and 1 to 16 bits per code, got {size} bytes and {bits} bits.")
    count, rest = divmod(8 * size, bits)
    return [1 << bits] * count + ([1 << rest] if rest else [])


def describe_sizes(num_codebooks: int, codebook_size: int | Sequence[int]) -> str:
    """In words: "12 x 1,024 codewords", or "6 x 1,024 + 1 x 16 codewords"."""
    groups = [(size, len(list(steps))) for size, steps in groupby(sizes_of(num_codebooks, codebook_size))]
    return " + ".join(f"{count} x {size:,}" for size, count in groups) + " codewords"


def bytes_per_vector(num_codebooks: int, codebook_size: int | Sequence[int]) -> int:
    """Bytes of one packed vector."""
    return -(-sum(bits_per_code(size) for size in sizes_of(num_codebooks, codebook_size)) // 8)


def check_codes(codes, num_codebooks: int, codebook_size: int | Sequence[int]) -> None:
    """Raises ValueError unless `codes` (tensor or array) is an integer `(n, m)`, 1 <= m <= num_codebooks, in range."""
    if codes.ndim != 2 or not 1 <= codes.shape[1] <= num_codebooks or not codes.shape[0]:
        raise ValueError(
            f"Expected codes of shape (n, {num_codebooks}), n >= 1, or a prefix of them, got {tuple(codes.shape)}. "
            "Packed codes are unpacked with rqmoe_hf.unpack_codes first."
        )
    kind = str(codes.dtype).removeprefix("torch.")
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"Expected integer codes, got {kind}.")
    # torch has no min and max for its unsigned types.
    wide = codes.astype(np.int64) if isinstance(codes, np.ndarray) else codes.long()
    sizes = sizes_of(codes.shape[1], codebook_size)
    columns = [wide] if len(set(sizes)) == 1 else [wide[:, step] for step in range(codes.shape[1])]
    for column, size in zip(columns, sizes, strict=False):
        low, high = int(column.min()), int(column.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"Codes must lie between 0 and {size - 1} (codebook_size - 1), got {low} to {high}: "
                "they belong to another quantizer, or are packed bytes that need rqmoe_hf.unpack_codes."
            )


def pack_codes(codes: np.ndarray, codebook_size: int | Sequence[int]) -> np.ndarray:
    """Packs integer codes into bytes.

    Args:
        codes: Integers `(n, m)` between 0 and codebook_size - 1.
        codebook_size: Codewords per codebook, 2 to 65,536.

    Returns:
        uint8 `(n, ceil(bits / 8))`. The codes follow each other bit by bit, least significant first: the layout of
        `faiss.pack_bitstrings` and of Faiss's additive quantizers. With 256 codewords a byte is a code.

    Raises:
        ValueError: If the codes are no integers `(n, m)` in range.
    """
    codes = np.asarray(codes)
    check_codes(codes, codes.shape[-1] if codes.ndim else 1, codebook_size)
    bits = [bits_per_code(size) for size in sizes_of(codes.shape[1], codebook_size)]
    if set(bits) <= {8} or set(bits) <= {16}:
        return np.ascontiguousarray(codes.astype("<u2" if bits[0] == 16 else "u1")).view(np.uint8)
    # For every bit of the packed vector: which code it is of, and which bit of that.
    owner = np.repeat(np.arange(len(bits)), bits)
    shifts = np.concatenate([np.arange(width, dtype=np.uint16) for width in bits])
    packed = np.empty((len(codes), -(-sum(bits) // 8)), dtype=np.uint8)
    rows = max(1, PACKING_BATCH // codes.shape[1])
    for start in range(0, len(codes), rows):
        stream = ((codes[start : start + rows].astype(np.uint16)[:, owner] >> shifts) & 1).astype(np.uint8)
        packed[start : start + rows] = np.packbits(stream, axis=1, bitorder="little")
    return packed


def unpack_codes(packed: np.ndarray, num_codebooks: int, codebook_size: int | Sequence[int]) -> np.ndarray:
    """Unpacks bytes into integer codes: the inverse of [`pack_codes`].

    Args:
        packed: uint8 `(n, bytes)`.
        num_codebooks: Codes per vector (or of the prefix that `packed` holds).
        codebook_size: Codewords per codebook.

    Returns:
        int64 `(n, num_codebooks)`.

    Raises:
        ValueError: If the bytes do not fit, or hold a code that the codebooks lack.
    """
    packed = np.asarray(packed)
    sizes = sizes_of(num_codebooks, codebook_size)
    bits, size = [bits_per_code(codewords) for codewords in sizes], bytes_per_vector(num_codebooks, codebook_size)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != size:
        shown = bits[0] if len(set(bits)) == 1 else bits
        raise ValueError(
            f"{num_codebooks} codes of {shown} bits are packed as uint8 (n, {size}), got {packed.dtype} "
            f"{packed.shape}."
        )
    codes = np.empty((len(packed), num_codebooks), dtype=np.int64)
    if set(bits) <= {8} or set(bits) <= {16}:
        codes[:] = np.ascontiguousarray(packed).view("<u2" if bits[0] == 16 else "u1")
    else:
        begins = np.cumsum([0, *bits[:-1]])
        first, shifts, masks = begins // 8, begins % 8, (1 << np.array(bits)) - 1
        rows = max(1, PACKING_BATCH // num_codebooks)
        for start in range(0, len(packed), rows):  # a code of up to 16 bits lies within three bytes
            part = np.pad(packed[start : start + rows], ((0, 0), (0, 2))).astype(np.int32)
            window = part[:, first] | part[:, first + 1] << 8 | part[:, first + 2] << 16
            codes[start : start + rows] = window >> shifts & masks
    if len(codes) and any(codewords < 1 << width for codewords, width in zip(sizes, bits, strict=True)):
        check_codes(codes, num_codebooks, codebook_size)
    return codes


def truncate_codes(
    packed: np.ndarray, num_codebooks: int, kept: int, codebook_size: int | Sequence[int]
) -> np.ndarray:
    """Keeps the first codes of packed vectors: a coarser vector in fewer bytes, without encoding again.

    Args:
        packed: uint8 `(n, bytes)`, of `num_codebooks` codes.
        num_codebooks: Codes per vector in `packed`.
        kept: Codes per vector in the result.
        codebook_size: Codewords per codebook.

    Returns:
        uint8 `(n, bytes)`, those of `kept` codes.
    """
    if not 1 <= kept <= num_codebooks:
        raise ValueError(f"kept must lie between 1 and num_codebooks = {num_codebooks}, got {kept}.")
    return pack_codes(unpack_codes(packed, num_codebooks, codebook_size)[:, :kept], codebook_size)
