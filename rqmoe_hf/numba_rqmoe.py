"""Local search on a processor without temporary tensors, compiled by Numba where that is installed.

PyTorch takes some fifteen operations per step. For few vectors their overhead is most of the time, for many the memory
traffic is: a step looks up rows all over a table that no cache holds. Here all rounds of a vector follow each other:
most of its codes stay the same from one to the next, and so their rows stay in the cache. What a step will need of
the rows of new codes is fetched one step ahead.
"""

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

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
TILE = 64  # columns
LINE = 32  # numbers that are fetched at a time
SWEPT_ROWS = 64  # a thread is not worth fewer vectors, of one sweep
FETCH_TO = 2  # the second cache: the first one is too small
FEW = 16  # vectors whose scores are computed here
SCORED_TILES = 512  # tiles times vectors: a thread is not worth fewer


class Layout(NamedTuple):
    """Where what belongs to a column or a codeword is found.

    Args:
        ranks: int32, of each column in its codebook: of equal energies the one of the lowest rank counts.
        places: int32, the inverse: of each rank in a codebook, which column has it.
        bounds: int64 `(M + 1,)`: where each codebook begins among the codewords, and T.
        columns: int64 `(M + 1,)`: where it begins among the columns: multiples of `TILE`.
    """

    ranks: np.ndarray
    places: np.ndarray
    bounds: np.ndarray
    columns: np.ndarray


class Plan(NamedTuple):
    """What happens in the rounds of a search of m codes.

    Args:
        orders: int64 `(rounds, k)`: the steps whose codes are chosen again, in turn.
        shifts: int64 `(rounds, m)`: by how many places each code is moved on before that.
    """

    orders: np.ndarray
    shifts: np.ndarray


def can_sweep(device: torch.device, size: int) -> bool:
    """Whether compiled search works here, for vectors on this device and codebooks of up to this size."""
    return _WORKS and device.type == "cpu" and size <= MAX_CODEWORDS


def sweep_codes(
    rows: torch.Tensor, scores: torch.Tensor, table: torch.Tensor, layout: Layout, order: list[int]
) -> None:
    """Sets each code, in turn, to the best one given the others, in place.

    Gives exactly the codes of `_choose_again` of `local_search_rqmoe` with PyTorch: sums in float32, in the order of
    the steps, are rounded to float16, and of equal energies the one of the lowest rank counts.

    Args:
        rows: int64 `(n, m)`, contiguous: codes, numbered through all of M codebooks.
        scores: float16 `(n, C)`, contiguous, in the columns of at least m codebooks.
        table: float16 `(T, all columns)`, contiguous: products of codewords with codewords.
        layout: Of the table.
        order: The steps, in turn.
    """
    _spread(_sweep, (rows.numpy(), _bits(scores)), (_bits(table), *layout, np.array(order)), SWEPT_ROWS)


def search_codes(
    best: torch.Tensor,
    restored: torch.Tensor,
    error: torch.Tensor,
    target: torch.Tensor,
    scores: torch.Tensor,
    codewords: torch.Tensor,
    table: torch.Tensor,
    layout: Layout,
    plan: Plan,
    begin: bool,
) -> None:
    """All rounds of a search, in place: codes are kept where the sums of their codewords are closer.

    Args:
        best: int64 `(n, m)`, as `rows` of [`sweep_codes`].
        restored: float32 `(n, d)`, sums of the best.
        error: float32 `(n,)`, squared distance of these from the target.
        target: float32 `(n, d)`.
        scores: See [`sweep_codes`].
        codewords: float32 `(T, d)`.
        table: See [`sweep_codes`].
        layout: Of the table.
        plan: Of the rounds.
        begin: Whether to look for codes to begin with, step by step, instead of those given.
    """
    parts = (best.numpy(), restored.numpy(), error.numpy(), target.numpy(), _bits(scores))
    _spread(_search, parts, (codewords.detach().numpy(), _bits(table), *layout, *plan, begin), 1)


def score_few(vectors: torch.Tensor, columns: torch.Tensor, norms: torch.Tensor, least: float) -> torch.Tensor:
    """Products of few vectors with columns, plus the columns' norms, and not below `least`.

    They are summed in float64. PyTorch would need the columns in float64 too, and read twice the memory, which takes
    most of the time.

    Args:
        vectors: float32 `(n, d)`.
        columns: float32 `(C, d)`, whole tiles.
        norms: float32 `(C,)`.
        least: Their smallest value.

    Returns:
        float16 `(n, C)`.
    """
    found, tiles = torch.empty(len(vectors), len(columns), dtype=torch.float16), np.arange(len(columns) // TILE)
    known = vectors.double().numpy(), columns.detach().numpy(), norms.numpy(), least, _bits(found)
    _spread(_score_few, (tiles,), known, max(1, SCORED_TILES // len(vectors)))
    return found


def empty_table(rows: int, columns: int) -> torch.Tensor:
    """Room for a table of float16: of NumPy, which asks for large pages, as fit memory that is read here and there."""
    return torch.from_numpy(np.empty((rows, columns), np.float16))


def _bits(values: torch.Tensor) -> np.ndarray:
    return values.detach().numpy().view(np.uint16)


def _spread(work: Callable, rows: tuple[np.ndarray, ...], constant: tuple[Any, ...], least: int) -> None:
    """Divides rows among threads, of which each gets some."""
    parts = max(1, min(torch.get_num_threads(), len(rows[0]) // least))
    if parts == 1:
        work(*rows, *constant)
        return
    jobs = zip(*(np.array_split(part, parts) for part in rows), strict=True)
    with ThreadPoolExecutor(parts) as pool:  # Numba's own threads must not be entered from two threads
        for done in [pool.submit(work, *job, *constant) for job in jobs]:
            done.result()


def _compiled(function: Callable, **options: Any) -> Any:
    """The machine code of a function, kept on disk for the next process where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **options)(function)


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


def _generate(builder: Any, table: Any, width: Any, rows: Any, count: Any, own: Any, ranks: Any) -> Any:
    """LLVM code for [`_lowest`], from addresses: sums, rounds, and packs energy and rank into one integer."""
    half, single, short, whole = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
    halves, singles, wholes = (ir.VectorType(kind, TILE) for kind in (half, single, whole))
    energy = cgutils.alloca_once_value(builder, ir.Constant(singles, None))
    builder.store(ir.Constant(singles, None), energy)
    with cgutils.for_range(builder, count) as loop:
        row = builder.load(builder.gep(rows, [loop.index]))
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
    def _fetch(context, values, place):
        """Asks for a number of an array, and those beside it, before they are needed."""

        def generate(context, builder, signature, given):
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            array = context.make_array(signature.args[0])(context, builder, given[0])
            address = builder.bitcast(builder.gep(array.data, [given[1]]), byte)
            builder.call(prefetch, [address, *(ir.Constant(number, option) for option in (0, FETCH_TO, 1))])
            return context.get_dummy_value()

        return numba.void(values, numba.intp), generate

    @intrinsic
    def _lowest(context, table, width, rows, count, scores, own, ranks, column):
        """The smallest energy of a vector in a tile.

        Args:
            context: Numba's.
            table: uint16 `(T, width)`, the bits of the table.
            width: Columns of the table.
            rows: int64 `(k,)`, of which the first `count` are summed.
            count: How many.
            scores: uint16 `(n, C)`, the bits of all scores.
            own: Where those of the vector in this tile begin.
            ranks: int32, of all columns.
            column: The first one of the tile.

        Returns:
            An int32 that is the smaller the smaller the energy is, and of equal energies the smaller the rank is. The
            lower half is the rank.
        """

        def generate(context, builder, signature, values):
            table, rows, scores, ranks = (
                context.make_array(signature.args[place])(context, builder, values[place]).data
                for place in (0, 2, 4, 6)
            )
            width, count, own, column = (values[place] for place in (1, 3, 5, 7))
            table, scores, ranks = (
                builder.gep(address, [offset]) for address, offset in ((table, column), (scores, own), (ranks, column))
            )
            return _generate(builder, table, width, rows, count, scores, ranks)

        place = numba.intp
        return numba.int32(table, place, rows, place, scores, place, ranks, place), generate

    @intrinsic
    def _round(context, values, found, place):
        """Puts a tile of float32 values into an array of float16 bits."""

        def generate(context, builder, signature, given):
            source, sink = (
                context.make_array(signature.args[number])(context, builder, given[number]).data for number in (0, 1)
            )
            half = ir.VectorType(ir.HalfType(), TILE)
            rounded = builder.fptrunc(_load(builder, source, ir.FloatType(), 4), half)
            address = builder.bitcast(builder.gep(sink, [given[2]]), half.as_pointer())
            builder.store(rounded, address).align = 2
            return context.get_dummy_value()

        return numba.void(values, found, numba.intp), generate

    @_compiled
    def _fetch_row(table, row, begin, end):
        """Asks for the columns of a codeword."""
        start = row * table.shape[1]
        for column in range(begin, end, LINE):
            _fetch(table, start + column)

    @_compiled
    def _choose(codes, others, count, scores, row, table, ranks, places, bounds, columns, step):
        """The best code of a step given `count` of the others."""
        found = 0
        for other in range(count + 1):
            if other != step:
                others[found] = codes[other]
                found += 1
        lowest = np.int32(np.iinfo(np.int32).max)
        for column in range(columns[step], columns[step + 1], TILE):
            own = row * scores.shape[1] + column
            lowest = min(lowest, _lowest(table, table.shape[1], others, found, scores, own, ranks, column))
        place = places[columns[step] + (lowest & 0xFFFF)]
        return bounds[step] + min(place, bounds[step + 1] - bounds[step] - 1)  # what fills up, where nothing is finite

    @_compiled
    def _sweep_one(codes, fresh, others, scores, row, table, ranks, places, bounds, columns, order):
        """Sweeps the codes of one vector. `fresh` says for how many more steps each code is new to the cache."""
        steps = len(codes)
        for number in range(len(order)):
            step, following = order[number], order[min(number + 1, len(order) - 1)]
            begin, end = columns[following], columns[following + 1]
            for other in range(steps):
                if fresh[other] > 0:
                    fresh[other] -= 1
                    _fetch_row(table, codes[other], begin, end)
            code = _choose(codes, others, steps - 1, scores, row, table, ranks, places, bounds, columns, step)
            if code != codes[step]:
                codes[step], fresh[step] = code, steps
                _fetch_row(table, code, begin, end)

    @_compiled
    def _sweep(rows, scores, table, ranks, places, bounds, columns, order):
        steps = rows.shape[1]
        fresh, others = np.empty(steps, np.int64), np.empty(steps, np.int64)
        for row in range(len(rows)):
            fresh[:] = steps
            _sweep_one(rows[row], fresh, others, scores, row, table, ranks, places, bounds, columns, order)

    @_compiled
    def _keep_better(trial, error, best, restored, target, codewords, total):
        """Puts codes in the place of the best so far unless those are as close, and returns the error."""
        total[:] = 0
        for step in range(len(trial)):
            total += codewords[trial[step]]
        found = np.float32(0)
        for place in range(len(total)):
            found += (target[place] - total[place]) ** 2
        if found >= error:
            return error
        best[:], restored[:] = trial, total
        return found

    @_compiled
    def _search(
        best, restored, error, target, scores, codewords, table, ranks, places, bounds, columns, orders, shifts, begin
    ):
        steps = best.shape[1]
        trial, fresh, others = np.empty(steps, np.int64), np.empty(steps, np.int64), np.empty(steps, np.int64)
        total = np.empty(target.shape[1], np.float32)
        for row in range(len(best)):
            known = best[row], restored[row], target[row], codewords, total
            if begin:
                for step in range(steps):
                    trial[step] = _choose(
                        trial, others, step, scores, row, table, ranks, places, bounds, columns, step
                    )
                error[row] = _keep_better(trial, np.float32(np.nan), *known)  # nothing is as close as that
            fresh[:] = steps
            for number in range(len(orders)):
                trial[:] = best[row]
                for step in range(steps):
                    if shifts[number, step]:
                        place = trial[step] - bounds[step] + shifts[number, step]
                        trial[step] = bounds[step] + place % (bounds[step + 1] - bounds[step])
                        fresh[step] = steps
                _sweep_one(trial, fresh, others, scores, row, table, ranks, places, bounds, columns, orders[number])
                error[row] = _keep_better(trial, error[row], *known)

    @partial(_compiled, fastmath={"reassoc", "contract"})  # the order of float64 sums is of no account
    def _score_few(tiles, vectors, columns, norms, least, found):
        scores = np.empty(TILE, np.float32)
        for tile in tiles:
            start = tile * TILE
            some, squared = columns[start : start + TILE], norms[start : start + TILE]
            for row in range(len(vectors)):
                for place in range(TILE):
                    total = 0.0
                    for dimension in range(columns.shape[1]):
                        total += vectors[row, dimension] * some[place, dimension]
                    scores[place] = max(squared[place] + total, least)
                _round(scores, found, row * len(columns) + start)
