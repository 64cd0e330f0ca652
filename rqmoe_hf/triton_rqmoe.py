"""One step of local search in one pass over its tables, where PyTorch takes five: for CUDA devices, with Triton."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for processors comes without
    triton = None

MAX_CODEWORDS = 1 << 14  # of a codebook that one block of threads holds the energies of


def can_choose(rows: torch.Tensor, size: int) -> bool:
    """Whether [`choose_codes`] works for these codes and a codebook of this size."""
    return triton is not None and rows.is_cuda and size <= MAX_CODEWORDS


def choose_codes(
    rows: torch.Tensor, scores: torch.Tensor, products: torch.Tensor, step: int, columns: slice, width: int
) -> None:
    """Sets the codes of a step to the best ones given the others, in place.

    Exactly what `_choose_again` of `local_search_rqmoe` does with PyTorch: sums in float32 are rounded to float16, and
    of equal energies that one counts that is first, column by column, when all are laid out in `width` columns.

    Args:
        rows: int64 `(n, m)`, contiguous.
        scores: float16 `(n, T)`.
        products: float16 `(T, K)`, contiguous.
        step: Which step.
        columns: Of `scores`, that belong to it.
        width: A divisor of K.
    """
    size = products.shape[1]
    block = triton.next_power_of_2(size)
    warps = min(8, max(1, block // 256))
    with torch.cuda.device_of(rows):
        _choose[(len(rows),)](
            rows, scores, products, scores.stride(0), step, columns.start, size, width,
            STEPS=rows.shape[1], BLOCK=block, num_warps=warps,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _choose(rows, scores, products, stride, step, start, size, width, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        inside = place < size
        energy = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(STEPS):  # without branches, so that many loads are under way at a time
            code = tl.load(rows + row * STEPS + other)
            wanted = inside & (other != step)
            energy += tl.load(products + code * size + place, mask=wanted, other=0.0).to(tl.float32)
        own = tl.load(scores + row * stride + start + place, mask=inside, other=0.0)
        energy = tl.where(inside, (energy.to(tl.float16) + own).to(tl.float32), float("inf"))
        height = size // width
        rank = (place % width) * height + place // width
        rank = tl.where(energy == tl.min(energy, axis=0), rank, size)
        first = tl.min(tl.where(inside, rank, size), axis=0)
        best = (first % height) * width + first // height
        tl.store(rows + row * STEPS + step, (best + start).to(tl.int64))
