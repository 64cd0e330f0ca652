"""Local search on a processor without temporary tensors, compiled by Numba where that is installed.

PyTorch takes some fifteen operations per step. For few vectors their overhead is most of the time, for many the memory
traffic is: a step looks up rows all over a table that no cache holds. Here the table is cut into tiles of some
columns, small enough for a cache if many vectors are searched with one tile before the next one.
"""

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

try:
    import numba
    from llvmlite import binding, ir
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # an extra
    numba = None

MAX_CODEWORDS = 1 << 16  # of a codebook: a rank takes the lower half of an integer
TILE = 128  # columns
AHEAD = 2  # vectors whose rows are fetched while one is worked on
LINE = 64  # bytes that are fetched at a time
THREAD_ROWS = 64  # a thread is not worth fewer vectors


def can_sweep(device: torch.device, size: int) -> bool:
    """Whether [`sweep_codes`] works here, for vectors on this device and codebooks of up to this size."""
    return _WORKS and device.type == "cpu" and size <= MAX_CODEWORDS


def sweep_codes(
    rows: torch.Tensor,
    scores: torch.Tensor,
    table: torch.Tensor,
    ranks: np.ndarray,
    places: np.ndarray,
    bounds: np.ndarray,
    columns: np.ndarray,
    order: list[int],
) -> None:
    """Sets each code, in turn, to the best one given the others, in place.

    Gives exactly the codes of `_choose_again` of `local_search_rqmoe` with PyTorch: sums in float32, in the order of
    the steps, are rounded to float16, and of equal energies the one of the lowest rank counts.

    Args:
        rows: int64 `(n, m)`, contiguous: codes, numbered through all of M codebooks.
        scores: float16 `(n, C)`, contiguous, in the columns of at least m codebooks.
        table: float16, flat: for each step, tile by tile, `(T, TILE)` products with all T codewords.
        ranks: int32, of each column in its codebook.
        places: int32, the inverse: of each rank in a codebook, which column has it.
        bounds: int64 `(M + 1,)`: where each codebook begins among the codewords, and T.
        columns: int64 `(M + 1,)`: where it begins among the columns: multiples of `TILE`.
        order: The steps, in turn.
    """
    own, products = (part.detach().numpy().view(np.uint16) for part in (scores, table))
    _spread(_sweep, (rows.numpy(), own), (products, ranks, places, bounds, columns, np.array(order)))


def keep_better(
    trial: torch.Tensor,
    best: torch.Tensor,
    restored: torch.Tensor,
    error: torch.Tensor,
    target: torch.Tensor,
    codewords: torch.Tensor,
) -> None:
    """Puts codes in the place of the best so far, in place, where the sums of their codewords are closer.

    With PyTorch's operations instead, which use several threads one after the other, threads that wait for the next of
    them would keep the processor busy while [`sweep_codes`] runs.

    Args:
        trial: int64 `(n, m)`, as `rows` of [`sweep_codes`].
        best: int64 `(n, m)`.
        restored: float32 `(n, d)`, sums of the best.
        error: float32 `(n,)`, squared distance of these from the target.
        target: float32 `(n, d)`.
        codewords: float32 `(T, d)`.
    """
    parts = tuple(part.detach().numpy() for part in (trial, best, restored, error, target))
    _spread(_keep_better, parts, (codewords.detach().numpy(),))


def _spread(work: Callable, rows: tuple[np.ndarray, ...], constant: tuple[Any, ...]) -> None:
    """Divides rows among threads."""
    parts = max(1, min(torch.get_num_threads(), len(rows[0]) // THREAD_ROWS))
    if parts == 1:
        work(*rows, *constant)
        return
    jobs = zip(*(np.array_split(part, parts) for part in rows), strict=True)
    with ThreadPoolExecutor(parts) as pool:  # Numba's own threads must not be entered from two threads
        for done in [pool.submit(work, *job, *constant) for job in jobs]:
            done.result()


def _compiled(function: Callable) -> Any:
    """The machine code of a function, kept on disk for the next process where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


def _works() -> bool:
    """Whether functions can be compiled, for a processor that converts float16."""
    if numba is None or numba.config.DISABLE_JIT:
        return False
    return platform.machine() in {"aarch64", "arm64"} or binding.get_host_cpu_features().get("f16c", False)


def _load(builder: Any, address: Any, kind: Any, number: Any) -> Any:
    """A tile of numbers."""
    value = builder.load(builder.bitcast(address, ir.VectorType(kind, TILE).as_pointer()))
    value.align = number
    return value


def _constant(kind: Any, value: int) -> Any:
    return ir.Constant(ir.VectorType(kind, TILE), [value] * TILE)


def _fetch(builder: Any, address: Any) -> None:
    """Asks for a tile's row before it is needed."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, all_levels, data = (ir.Constant(number, option) for option in (0, 3, 1))
    for start in range(0, 2 * TILE, LINE):
        line = builder.gep(builder.bitcast(address, byte), [ir.Constant(ir.IntType(64), start)])
        builder.call(prefetch, [line, read, all_levels, data])


def _generate(builder: Any, table: Any, rows: Any, following: Any, count: Any, own: Any, ranks: Any) -> Any:
    """LLVM code for [`_lowest`], from addresses: sums, rounds, and packs energy and rank into one integer."""
    half, single, short, whole = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
    halves, singles, wholes = (ir.VectorType(kind, TILE) for kind in (half, single, whole))
    width = ir.Constant(ir.IntType(64), TILE)
    energy = cgutils.alloca_once_value(builder, ir.Constant(singles, None))
    with cgutils.for_range(builder, count) as loop:
        row, later = (builder.load(builder.gep(of, [loop.index])) for of in (rows, following))
        _fetch(builder, builder.gep(table, [builder.mul(later, width)]))
        products = _load(builder, builder.gep(table, [builder.mul(row, width)]), half, 2)
        builder.store(builder.fadd(builder.load(energy), builder.fpext(products, singles)), energy)
    others = builder.fpext(builder.fptrunc(builder.load(energy), halves), singles)
    total = builder.fadd(others, builder.fpext(_load(builder, own, half, 2), singles))
    bits = builder.bitcast(builder.fptrunc(total, halves), ir.VectorType(short, TILE))
    minus_zero = builder.icmp_signed("==", bits, _constant(short, -(1 << 15)))
    bits = builder.select(minus_zero, _constant(short, 0), bits)
    negative = builder.ashr(bits, _constant(short, 15))  # all bits of negative numbers, none of others
    bits = builder.xor(bits, builder.and_(negative, _constant(short, (1 << 15) - 1)))  # ordered as the numbers are
    upper = builder.shl(builder.sext(bits, wholes), _constant(whole, 16))
    kind, name = ir.FunctionType(whole, [wholes]), f"llvm.vector.reduce.smin.v{TILE}i32"
    smallest = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(smallest, [builder.or_(upper, _load(builder, ranks, whole, 4))])


_WORKS = _works()
if _WORKS:

    @intrinsic
    def _lowest(context, table, tile, rows, following, scores, own, ranks, column):
        """The smallest energy of a vector in the columns of a tile.

        Args:
            context: Numba's.
            table: uint16, the bits of all tables.
            tile: Where the tile begins.
            rows: int64 `(k,)`, of the tile, to sum.
            following: int64 `(k,)`, to fetch for later.
            scores: uint16 `(n, C)`, the bits of all scores.
            own: Where those of the vector in these columns begin.
            ranks: int32, of all columns.
            column: The first one.

        Returns:
            An int32 that is the smaller the smaller the energy is, and of equal energies the smaller the rank is. The
            lower half is the rank.
        """

        def generate(context, builder, signature, values):
            arrays = {
                place: context.make_array(signature.args[place])(context, builder, values[place])
                for place, kind in enumerate(signature.args)
                if isinstance(kind, numba.types.Array)
            }
            address = {place: array.data for place, array in arrays.items()}
            for array, offset in ((0, 1), (4, 5), (6, 7)):
                address[array] = builder.gep(address[array], [values[offset]])
            (count,) = cgutils.unpack_tuple(builder, arrays[2].shape)
            return _generate(builder, address[0], address[2], address[3], count, address[4], address[6])

        place = numba.intp
        return numba.int32(table, place, rows, following, scores, place, ranks, place), generate

    @_compiled
    def _sweep(rows, scores, table, ranks, places, bounds, columns, order):
        count, steps = rows.shape
        total, width = bounds[-1], scores.shape[1]
        others, best = np.empty((count, steps - 1), np.int64), np.empty(count, np.int32)
        for step in order:
            for row in range(count):
                others[row, :step] = rows[row, :step]
                others[row, step:] = rows[row, step + 1 :]
            best[:] = np.iinfo(np.int32).max
            for column in range(columns[step], columns[step + 1], TILE):
                for row in range(count):
                    following, own = others[min(row + AHEAD, count - 1)], row * width + column
                    found = _lowest(table, column * total, others[row], following, scores, own, ranks, column)
                    best[row] = min(best[row], found)
            for row in range(count):
                rows[row, step] = bounds[step] + places[columns[step] + (best[row] & 0xFFFF)]

    @_compiled
    def _keep_better(trial, best, restored, error, target, codewords):
        count, steps = trial.shape
        total = np.empty(target.shape[1], np.float32)
        for row in range(count):
            total[:] = 0
            for step in range(steps):
                total += codewords[trial[row, step]]
            found = np.float32(0)
            for place in range(len(total)):
                found += (target[row, place] - total[place]) ** 2
            if found < error[row]:
                best[row], restored[row], error[row] = trial[row], total, found
