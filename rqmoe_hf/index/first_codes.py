"""Inverted lists by first code: the list that a code is in tells its first code, which is then not stored again.

It suits quantizers whose first codebook is searched by itself (`search_blocks` of their config starts with 1): there
the first code is the nearest codeword, as the number of a list is its nearest centroid.
"""

import numpy as np

from ..codes import sizes_of
from ..configuration_rqmoe import RQMoEConfig


def first_lists(config: RQMoEConfig, steps: int) -> int | None:
    """How many lists the first codes make; None where lists are not to be made of them.

    Args:
        config: Of the quantizer.
        steps: Codes per vector; a single one would leave nothing to scan.
    """
    blocks = config.search_blocks
    if not blocks or blocks[0] != 1 or steps < 2:
        return None
    return sizes_of(1, config.code_sizes)[0]


def first_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The first codes, of 1 to 16 bits, of packed codes, uint8 `(n, bytes)`: int32 `(n,)`."""
    first = packed[:, 0].astype(np.int32)
    if packed.shape[1] > 1:
        first |= packed[:, 1].astype(np.int32) << 8
    return first & ((1 << bits) - 1)


def other_codes(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Takes the first code off packed codes.

    As `pack_codes` of all but the first of what `unpack_codes` gives, which takes seventy times as long.

    Args:
        packed: uint8 `(n, bytes)`.
        bits: Of the first code, 1 to 16.
        width: Bytes of what follows it.

    Returns:
        The others, packed, uint8 `(n, width)`.
    """
    skipped, shift = divmod(bits, 8)
    stream = np.zeros((len(packed), max(packed.shape[1], skipped + width + 1)), np.uint16)
    stream[:, : packed.shape[1]] = packed
    low, high = stream[:, skipped : skipped + width], stream[:, skipped + 1 : skipped + width + 1]
    return (low >> shift | high << (8 - shift)).astype(np.uint8)


def joined_codes(rest: np.ndarray, first: np.ndarray, bits: int) -> np.ndarray:
    """Puts first codes `(n,)` of so many bits behind the others, at a whole byte: uint8 `(n, bytes)`."""
    tail = first.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.hstack([rest, tail[:, : -(-bits // 8)]])
