"""Iterated local search over codes: better codes for the same codebooks, whatever order they were found in.

A beam search fixes codes from the first to the last. Here every code is chosen again, given all the others, until
nothing changes (iterated conditional modes), from several starting points: the best codes so far with some of them
replaced. This is the encoder of LSQ (Martinez et al., ECCV 2016 and 2018). Sums of codewords make it cheap: the error
is a sum of one number per code and one per pair of codes, all of which are looked up. The tables are float16, for half
the memory traffic: they propose codes, and a proposal is kept where float32 says that it is closer.

With experts a code's contribution depends on the codes before it. The search then runs on an additive approximation
that is exact at the present codes (what separates it from the decoder is taken off the target), and what it proposes
is decoded, and kept where that is closer.

Shapes: n vectors, m codes of each, K_m codewords of step m, T their sum over the steps, d hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from .decoding_rqmoe import decode_codes
from .encoding_rqmoe import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES, Tables
from .limits_rqmoe import MAX_PAIRS, check_pairs
from .numba_rqmoe import FEW, TILE, Layout, Plan, can_sweep, empty_table, score_few, search_codes, sweep_codes
from .triton_rqmoe import can_choose, choose_codes

LOCAL_SEARCH, LOCAL_SEARCH_BEAM = 32, 1  # with which codebooks of LSQ are used: rounds are worth more than a beam
SWEEPS = 2  # times every code is chosen again, per round
PAIR_ROWS = 4096  # of the table, computed at a time
MAX_ENERGY = 6e4  # in units, of the pairs of one code together: float16 ends at 65,504
COLUMNS = 32  # among which the smallest energy is looked for
CPU_SEARCH_BYTES = 256 << 20  # temporary tensors of a chunk: many vectors at a time make good use of caches
SCORED = 256  # vectors at a time, as their scores are float64 before they are float16


@dataclass
class PairTables:
    """What an additive quantizer's errors are looked up in.

    Where local search is compiled, each codebook's columns are filled up to whole tiles: C columns for T codewords.
    """

    codewords: torch.Tensor  # (T, d) float32, step after step
    sizes: list[int]  # K_m
    starts: torch.Tensor  # (M,), where each step's codewords begin
    unit: float  # of energies: squared distances times this stay far from the limits of float16
    tiled: bool
    columns: torch.Tensor  # (C, d) float32: the codewords, and what fills up
    norms: torch.Tensor  # (C,) float32, squared, in units
    table: torch.Tensor  # 2 * codewords @ columns.T, in units, float16: (T, C) if tiled, else flat, step after step

    @cached_property
    def widths(self) -> list[int]:
        """Columns of each step."""
        return [-(-size // TILE) * TILE if self.tiled else size for size in self.sizes]

    @cached_property
    def products(self) -> list[torch.Tensor]:
        """The part of the table of each step: float16 `(T, width)`."""
        rows = len(self.codewords)
        if self.tiled:
            return list(self.table.split(self.widths, dim=1))
        return [part.view(rows, -1) for part in self.table.split([rows * width for width in self.widths])]

    @cached_property
    def exact(self) -> torch.Tensor:
        """The columns in float64. To make them takes longer than a vector's scores."""
        return self.columns.double()

    @cached_property
    def layout(self) -> Layout:
        """What compiled search wants to know. A rank says where [`_smallest`] looks for a column."""
        ranks, places = [], []
        for size, width in zip(self.sizes, self.widths, strict=True):
            numbers, folded = np.arange(size), _width(size)
            ranks += [numbers % folded * (size // folded) + numbers // folded, np.arange(size, width)]
            places += [np.argsort(ranks[-2]), ranks[-1]]
        ranked, placed = (np.concatenate(part).astype(np.int32) for part in (ranks, places))
        return Layout(ranked, placed, np.cumsum([0, *self.sizes]), np.cumsum([0, *self.widths]))

    def step(self, number: int) -> slice:
        """Columns of a step."""
        start = sum(self.widths[:number])  # not of `starts`: asking a device for it would wait for the device
        return slice(start, start + self.widths[number])


def refine_codes(
    target: torch.Tensor,
    codes: torch.Tensor | None,
    tables: Tables,
    steps: int,
    rounds: int,
    batch_invariant: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local search for codes of `steps` steps with the tables of a model, in chunks of bounded memory.

    See [`local_search`]. Without codes, which only an additive quantizer can do, it begins with greedy ones.
    """
    decode = None if tables.features is None else lambda trial: decode_codes(trial, tables)
    budget = CPU_CHUNK_BYTES if decode else CPU_SEARCH_BYTES
    budget = budget if target.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, budget // (2 * steps * tables.first.shape[0] + 16 * target.shape[1]))
    refined = torch.empty(len(target), steps, dtype=torch.long, device=target.device)
    restored = torch.empty_like(target)
    with torch.autocast(target.device.type, enabled=False):
        if steps not in tables.pairs:
            codebooks = additive_codebooks(tables, steps)
            sizes = tables.sizes or [codebooks.shape[1]] * steps
            parts = [part[:size] for part, size in zip(codebooks, sizes, strict=False)]
            tables.pairs[steps] = build_pair_tables(parts)
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            given = steps if codes is None else codes[part]
            found = local_search(target[part], given, tables.pairs[steps], rounds, decode, batch_invariant)
            refined[part], restored[part] = found
    return refined, restored


def additive_codebooks(tables: Tables, steps: int) -> torch.Tensor:
    """Codewords whose sums approximate the decoder on codes of `steps` steps: `(steps, K, d)` float32.

    With experts: the codeword deformed by the mean condition of its step, and what its instruction adds to all later
    steps without passing an activation.
    """
    if tables.features is None:
        return torch.cat([tables.first[None], tables.base[: steps - 1]]).float()
    codebooks = torch.cat([tables.first[None], tables.proxy[: steps - 1].mT / -2]).float()
    if tables.instructions is not None and tables.condition_proj is not None:
        offsets = tables.condition_proj[: steps - 1, :, : codebooks.shape[-1]].float()
        later = offsets.flip(0).cumsum(dim=0).flip(0)
        codebooks[: steps - 1] += tables.instructions[: steps - 1].float() @ later
    return codebooks


def build_pair_tables(codebooks: Sequence[torch.Tensor]) -> PairTables:
    """Computes the tables of codebooks, `(K_m, d)` each.

    Raises:
        ValueError: If they would take more than 2 GiB.
    """
    sizes = [len(codebook) for codebook in codebooks]
    check_pairs([sizes])
    codewords = torch.cat([codebook.float() for codebook in codebooks])
    starts = torch.tensor([0, *sizes[:-1]], device=codewords.device).cumsum(0)
    norms = codewords.square().sum(-1)
    large = norms.kthvalue(1 + 9 * (len(norms) - 1) // 10)[0]  # neither that of codewords far out nor of unused ones
    unit = 1 / (len(sizes) * float(large) or 1.0)
    filled = sum(-(-size // TILE) * TILE for size in sizes)  # of many small codebooks much more than there is
    tiled = can_sweep(codewords.device, max(sizes)) and filled * len(codewords) <= MAX_PAIRS
    columns, norms = codewords, unit * norms
    if tiled:
        columns, norms = _fill_up(codewords, sizes, 0.0), _fill_up(norms, sizes, torch.inf)
        table = empty_table(len(codewords), len(columns))
    else:
        table = torch.empty(len(columns) * len(codewords), dtype=torch.float16, device=codewords.device)
    pairs = PairTables(codewords, sizes, starts, unit, tiled, columns, norms, table)
    for part, products in zip(columns.split(pairs.widths), pairs.products, strict=True):
        for rows in range(0, len(codewords), PAIR_ROWS):
            energies = codewords[rows : rows + PAIR_ROWS] @ (2 * unit * part.T)
            products[rows : rows + PAIR_ROWS] = _half(energies, MAX_ENERGY / len(sizes))
    return pairs


def _fill_up(values: torch.Tensor, sizes: list[int], value: float) -> torch.Tensor:
    """Values `(T, ...)` with each codebook's part filled up to whole tiles."""
    parts = [
        F.pad(part, [0, 0] * (part.dim() - 1) + [0, -len(part) % TILE], value=value) for part in values.split(sizes)
    ]
    return torch.cat(parts)


def local_search(
    target: torch.Tensor,
    codes: torch.Tensor | int,
    pairs: PairTables,
    rounds: int,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch_invariant: bool = True,
    first_round: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improves codes.

    Args:
        target: float32 `(n, d)`, standardised.
        codes: int64 `(n, m)`, where to start; m may be less than the tables' M. Or only m: start with greedy codes,
            each the best one given those before it. That needs an additive quantizer.
        pairs: Tables of the codebooks, or of an additive approximation of the decoder.
        rounds: Starting points: first the codes themselves, then the best so far with a few of them replaced.
        decode: Decoder of codes `(n, m)` to `(n, d)`. `None`: the sum of the tables' codewords.
        batch_invariant: Compute what is not looked up in float64, so that rounding, which depends on the batch, does
            not choose between codes.
        first_round: Number of the first round; the number decides what is replaced.

    Returns:
        Codes and their reconstructions. No vector ends with a larger error than it began with.
    """
    steps = codes if isinstance(codes, int) else codes.shape[1]
    rounds = rounds if steps > 1 else 0
    if decode is not None:
        assert not isinstance(codes, int)
        return _search_around(decode, target, codes, pairs, rounds, batch_invariant, first_round)
    if not rounds and not isinstance(codes, int):
        return codes, _sums(codes + pairs.starts[:steps], pairs)
    scores = _scores(target, steps, pairs, batch_invariant)
    if pairs.tiled:
        return _search_compiled(target, codes, scores, pairs, rounds, first_round)
    best = _greedy(scores, steps, pairs) if isinstance(codes, int) else codes + pairs.starts[:steps]
    restored = _sums(best, pairs)
    error = (target - restored).square().sum(-1)
    for number in range(rounds):
        trial, order = _replace_some(best, pairs, number, first_round)
        _choose_again(trial, scores, order, pairs)
        best, restored, error = _keep_better(target, (trial, _sums(trial, pairs)), (best, restored, error))
    return best - pairs.starts[:steps], restored


def _search_compiled(
    target: torch.Tensor,
    codes: torch.Tensor | int,
    scores: torch.Tensor,
    pairs: PairTables,
    rounds: int,
    first_round: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`local_search`] with [`search_codes`]."""
    begin, target = isinstance(codes, int), target.contiguous()
    if isinstance(codes, int):  # what it begins with it finds itself
        best, restored = torch.empty(len(target), codes, dtype=torch.long), torch.empty_like(target)
        error = torch.empty(len(target))
    else:
        best = codes + pairs.starts[: codes.shape[1]]
        restored = _sums(best, pairs)
        error = (target - restored).square().sum(-1)
    plan = _whole_plan(first_round, rounds, tuple(pairs.sizes[: best.shape[1]]))
    known = best.contiguous(), restored, error, target, scores
    search_codes(*known, pairs.codewords, pairs.table, pairs.layout, plan, begin)
    return known[0] - pairs.starts[: best.shape[1]], restored


def _search_around(
    decode: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    codes: torch.Tensor,
    pairs: PairTables,
    rounds: int,
    batch_invariant: bool,
    first_round: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`local_search`] with a decoder that the tables approximate, around the best codes so far."""
    steps = codes.shape[1]
    starts = pairs.starts[:steps]
    best, restored = codes + starts, decode(codes)
    error = (target - restored).square().sum(-1)
    for number in range(rounds):
        scores = _scores(target - restored + _sums(best, pairs), steps, pairs, batch_invariant)
        trial, order = _replace_some(best, pairs, number, first_round)
        _choose_again(trial, scores, order, pairs)
        best, restored, error = _keep_better(target, (trial, decode(trial - starts)), (best, restored, error))
    return best - starts, restored


def _keep_better(
    target: torch.Tensor, trial: tuple[torch.Tensor, torch.Tensor], best: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of two codes for each vector, with their reconstructions and of the best the error, the one that is closer."""
    error = (target - trial[1]).square().sum(-1)
    better = (error < best[2])[:, None]
    return torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1]), error.minimum(best[2])


def _greedy(scores: torch.Tensor, steps: int, pairs: PairTables) -> torch.Tensor:
    """Rows of the best code of each step given those of the steps before it."""
    rows = torch.empty(len(scores), steps, dtype=torch.long, device=scores.device)
    for step in range(steps):
        energy = scores[:, pairs.step(step)]
        if step:
            energy = energy + F.embedding_bag(rows[:, :step], pairs.products[step], mode="sum")
        rows[:, step] = _smallest(energy) + pairs.starts[step]
    return rows


def _sums(rows: torch.Tensor, pairs: PairTables) -> torch.Tensor:
    return F.embedding_bag(rows, pairs.codewords, mode="sum")


def _scores(target: torch.Tensor, steps: int, pairs: PairTables, exact: bool) -> torch.Tensor:
    """What each codeword of `steps` steps adds to the squared error by itself, |c|^2 - 2 x.c, in units, float16."""
    count = sum(pairs.widths[:steps])
    norms, factor = pairs.norms[:count], -2 * pairs.unit
    if exact and pairs.tiled and len(target) <= FEW:
        return score_few(factor * target, pairs.columns[:count], norms, -MAX_ENERGY)
    columns = (pairs.exact if exact else pairs.columns)[:count].T
    norms = norms.to(columns.dtype)
    scores = torch.empty(len(target), count, dtype=torch.float16, device=target.device)
    rows = SCORED if target.device.type == "cpu" else 16 * SCORED
    for some, part in zip(target.split(rows), scores.split(rows), strict=True):
        part.copy_(torch.addmm(norms, (factor * some).to(columns.dtype), columns).clamp_(min=-MAX_ENERGY))
    return scores


def _half(energies: torch.Tensor, limit: float) -> torch.Tensor:
    """As float16, cut off where sums would be no numbers: only codewords and vectors far out have such energies."""
    return energies.clamp_(-limit, limit).half()


def _replace_some(
    rows: torch.Tensor, pairs: PairTables, number: int, first_round: int
) -> tuple[torch.Tensor, list[int]]:
    """A starting point, and the order in which to choose again: what was replaced comes last.

    The replacement depends on the round and on the codes alone, so a vector gets the same codes in any batch.
    """
    order, shifts = _plan(first_round * 1000 + number, number, tuple(pairs.sizes[: rows.shape[1]]))
    rows = rows.clone(memory_format=torch.contiguous_format)  # the kernels count on it
    for step, shift in shifts:
        size, start = pairs.sizes[step], sum(pairs.sizes[:step])
        rows[:, step] = (rows[:, step] - start + shift) % size + start
    return rows, order


@lru_cache(maxsize=4096)
def _plan(seed: int, number: int, sizes: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """The order of a round, and which codes are replaced by those so many places further on."""
    generator = torch.Generator("cpu").manual_seed(seed)  # a GPU draws other numbers
    order = torch.randperm(len(sizes), generator=generator, device="cpu").tolist()
    replaced = order[-min(len(sizes) - 1, 1 + number % 3) :] if number else []
    draws = [torch.randint(1, sizes[step], (), generator=generator, device="cpu") for step in replaced]
    return order, [(step, int(shift)) for step, shift in zip(replaced, draws, strict=True)]


@lru_cache(maxsize=256)
def _whole_plan(first_round: int, rounds: int, sizes: tuple[int, ...]) -> Plan:
    """All rounds of a search, as [`search_codes`] wants to know them."""
    orders, shifts = [], np.zeros((rounds, len(sizes)), np.int64)
    for number in range(rounds):
        order, moved = _plan(first_round * 1000 + number, number, sizes)
        orders.append(SWEEPS * order)
        for step, shift in moved:
            shifts[number, step] = shift
    return Plan(np.array(orders, np.int64).reshape(rounds, SWEEPS * len(sizes)), shifts)


def _choose_again(rows: torch.Tensor, scores: torch.Tensor, order: list[int], pairs: PairTables) -> None:
    """Sets each code, in turn, to the best one given the others, and all once more. In place."""
    if pairs.tiled:
        sweep_codes(rows, scores, pairs.table, pairs.layout, SWEEPS * order)
        return
    for step in SWEEPS * order:
        columns, products = pairs.step(step), pairs.products[step]
        if can_choose(rows, products.shape[1]):
            choose_codes(rows, scores, products, step, columns, _width(products.shape[1]))
            continue
        others = torch.cat([rows[:, :step], rows[:, step + 1 :]], dim=1)
        energy = F.embedding_bag(others, products, mode="sum")
        energy += scores[:, columns]
        rows[:, step] = _smallest(energy) + pairs.starts[step]


def _width(size: int) -> int:
    """Columns among which the smallest of `size` energies is looked for first."""
    while size > COLUMNS and size % 2 == 0:
        size //= 2
    return size


def _smallest(values: torch.Tensor) -> torch.Tensor:
    """Index of the smallest value in each row of `(n, K)` float16.

    A minimum is found many times faster than its place. So each row is folded to the minima of some columns, and the
    place is looked for among these, and then in one column.
    """
    minima, width = values, _width(values.shape[1])
    while minima.shape[1] > width:
        minima = torch.minimum(*minima.chunk(2, dim=1))
    column = minima.float().argmin(dim=1)
    entries = values.unflatten(1, (-1, width))
    entries = entries.gather(2, column[:, None, None].expand(-1, entries.shape[1], 1))[..., 0]
    return entries.float().argmin(dim=1) * width + column
