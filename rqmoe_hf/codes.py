"""Packed codes: integer codes to bytes and back, in Faiss's bit order."""

import numpy as np

PACKING_BATCH = 1 << 20  # codes expanded to bits at a time


def bits_per_code(codebook_size: int) -> int:
    """Bits of one packed code: log2(codebook_size), rounded up to a whole bit."""
    if not 2 <= codebook_size <= 65536:
        raise ValueError(f"codebook_size must lie between 2 and 65536, got {codebook_size}.")
    return (codebook_size - 1).bit_length()


def bytes_per_vector(num_codebooks: int, codebook_size: int) -> int:
    """Bytes of one packed vector."""
    return -(-num_codebooks * bits_per_code(codebook_size) // 8)


def check_codes(codes, num_codebooks: int, codebook_size: int) -> None:
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
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"Codes must lie between 0 and {codebook_size - 1} (codebook_size - 1), got {low} to {high}: "
            "they belong to another quantizer, or are packed bytes that need rqmoe_hf.unpack_codes."
        )


def pack_codes(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Packs integer codes into bytes.

    Args:
        codes: Integers `(n, m)` between 0 and codebook_size - 1.
        codebook_size: Codewords per codebook, 2 to 65,536.

    Returns:
        uint8 `(n, ceil(m * bits / 8))`. Code j occupies the bits from j * bits on, least significant first: the layout
        of `faiss.pack_bitstrings` and of Faiss's additive quantizers. With 256 codewords a byte is a code.

    Raises:
        ValueError: If the codes are no integers `(n, m)` in range.
    """
    codes = np.asarray(codes)
    bits = bits_per_code(codebook_size)
    check_codes(codes, codes.shape[-1] if codes.ndim else 1, codebook_size)
    if bits in (8, 16):
        return np.ascontiguousarray(codes.astype("<u2" if bits == 16 else "u1")).view(np.uint8)
    shifts = np.arange(bits, dtype=np.uint16)
    packed = np.empty((len(codes), bytes_per_vector(codes.shape[1], codebook_size)), dtype=np.uint8)
    rows = max(1, PACKING_BATCH // codes.shape[1])
    for start in range(0, len(codes), rows):
        batch = codes[start : start + rows].astype(np.uint16)
        stream = ((batch[:, :, None] >> shifts) & 1).astype(np.uint8).reshape(len(batch), -1)
        packed[start : start + rows] = np.packbits(stream, axis=1, bitorder="little")
    return packed


def unpack_codes(packed: np.ndarray, num_codebooks: int, codebook_size: int) -> np.ndarray:
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
    bits, size = bits_per_code(codebook_size), bytes_per_vector(num_codebooks, codebook_size)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != size:
        raise ValueError(
            f"{num_codebooks} codes of {bits} bits are packed as uint8 (n, {size}), got {packed.dtype} {packed.shape}."
        )
    codes = np.empty((len(packed), num_codebooks), dtype=np.int64)
    if bits in (8, 16):
        codes[:] = np.ascontiguousarray(packed).view("<u2" if bits == 16 else "u1")
    else:
        weights = 1 << np.arange(bits, dtype=np.int64)
        rows = max(1, PACKING_BATCH // num_codebooks)
        for start in range(0, len(packed), rows):
            stream = np.unpackbits(packed[start : start + rows], axis=1, count=num_codebooks * bits, bitorder="little")
            codes[start : start + rows] = stream.reshape(-1, num_codebooks, bits) @ weights
    if len(codes) and codebook_size < 1 << bits:
        check_codes(codes, num_codebooks, codebook_size)
    return codes


def truncate_codes(packed: np.ndarray, num_codebooks: int, kept: int, codebook_size: int) -> np.ndarray:
    """Keeps the first codes of packed vectors: a coarser vector in fewer bytes, without encoding again.

    Args:
        packed: uint8 `(n, bytes)`, of `num_codebooks` codes.
        num_codebooks: Codes per vector in `packed`.
        kept: Codes per vector in the result.
        codebook_size: Codewords per codebook.

    Returns:
        uint8 `(n, ceil(kept * bits / 8))`.
    """
    if not 1 <= kept <= num_codebooks:
        raise ValueError(f"kept must lie between 1 and num_codebooks = {num_codebooks}, got {kept}.")
    return pack_codes(unpack_codes(packed, num_codebooks, codebook_size)[:, :kept], codebook_size)
