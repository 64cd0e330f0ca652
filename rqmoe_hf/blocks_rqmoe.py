"""Codes that are searched block by block: each block of codebooks on what the earlier ones leave.

Local search is the better the fewer codebooks it has to set against each other: with 32 of them it ends in optima that
are far from the best. Two blocks of 13, one after the other, come closer, and the first block's codes are what the
quantizer of the first block alone gives: a prefix of whole blocks loses nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .configuration_rqmoe import RQMoEConfig
from .encoding_rqmoe import Tables, encode_vectors
from .local_search_rqmoe import refine_codes

WITHOUT_FLOAT64 = ("mps",)  # devices whose codes may depend on the batch, where rounding decides between two


def blocks_of(config: RQMoEConfig, num_codebooks: int) -> list[slice]:
    """The codebooks of each block that a code of `num_codebooks` steps has a part in; the last may be cut off."""
    blocks, start = [], 0
    for size in config.search_blocks or [config.num_codebooks]:
        if start < num_codebooks:
            blocks.append(slice(start, min(start + size, num_codebooks)))
        start += size
    return blocks


def cuts_of(config: RQMoEConfig, num_codebooks: int) -> list[int]:
    """Numbers of codes to which codes of `num_codebooks` steps can be cut; the last is all of them.

    Codes that local search found together only make sense together: in whole blocks.
    """
    if config.has_experts or not config.local_search:
        return list(range(1, num_codebooks + 1))
    return [block.stop for block in blocks_of(config, num_codebooks)]


def block_of(codebooks: torch.Tensor, config: RQMoEConfig, start: int | None) -> tuple[torch.Tensor, list[int] | None]:
    """The codebooks `(m, K, d)` of the block that begins at a step, and their sizes; all of them if it is None."""
    sizes = config.codebook_sizes
    if start is None:
        return codebooks, sizes
    block = next(part for part in blocks_of(config, config.num_codebooks) if part.start == start)
    if sizes is None:
        return codebooks[block], None
    return codebooks[block, : max(sizes[block])], sizes[block]


@torch.no_grad()
def find_codes(
    target: torch.Tensor,
    tables_for: Callable[[torch.dtype, int], Tables],
    dtype: torch.dtype,
    blocks: Sequence[slice],
    local_search: int,
    settle_ties: bool,
    **search: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search, then local search, of each block.

    A beam of one is left to the local search of an additive quantizer, which has all distances anyway. Not so a single
    code: its distances are float16 there, and nothing would improve it; so it needs none of local search's tables.

    Args:
        target: Standardised vectors, float32 `(n, d)`.
        tables_for: Gives the tables of a dtype, of the block that begins at a step.
        dtype: Of the experts' arithmetic.
        blocks: See [`blocks_of`].
        local_search: Rounds of local search; 0 for none.
        settle_ties: See [`encode_vectors`].
        search: `num_candidates` and `beam_size` of the beam search.

    Returns:
        int64 codes `(n, m)` and float32 reconstructions `(n, d)`, standardised.
    """
    codes, restored = [], None
    settle_ties = settle_ties and target.device.type not in WITHOUT_FLOAT64
    for block in blocks:
        tables, steps = partial(_tables_of, tables_for, block.start), block.stop - block.start
        left = target if restored is None else target - restored
        rounds = local_search if steps > 1 else 0
        known = tables(dtype)
        if rounds and search["beam_size"] == 1 and known.features is None:
            found, near = refine_codes(left, None, known, steps, rounds, settle_ties)
        else:
            found, near = encode_vectors(left, tables, dtype, num_codebooks=steps, settle_ties=settle_ties, **search)
            if rounds:
                found, near = refine_codes(left, found, known, steps, rounds, settle_ties)
        codes.append(found)
        restored = near if restored is None else restored + near
    assert restored is not None  # there is a block
    return torch.cat(codes, dim=1), restored


def _tables_of(tables_for: Callable[[torch.dtype, int], Tables], start: int, dtype: torch.dtype) -> Tables:
    return tables_for(dtype, start)
