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
from .numba_rqmoe import TILE, can_sweep, keep_better, sweep_codes
from .triton_rqmoe import can_choose, choose_codes

MAX_PAIRS = 1 << 30  # entries of the table of pairs: 2 GiB
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
    table: torch.Tensor  # (C * T,) float16, per step (T, K_m), or (tiles, T, TILE): see `products`

    @cached_property
    def widths(self) -> list[int]:
        """Columns of each step."""
        return [-(-size // TILE) * TILE if self.tiled else size for size in self.sizes]

    @cached_property
    def products(self) -> list[torch.Tensor]:
        """2 * codewords @ codewords of each step, in units: float16 `(tiles, T, width)`, of one tile if not tiled."""
        parts = self.table.split([len(self.codewords) * width for width in self.widths])
        tiles = [TILE if self.tiled else width for width in self.widths]
        return [part.view(-1, len(self.codewords), tile) for part, tile in zip(parts, tiles, strict=True)]

    @cached_property
    def exact(self) -> torch.Tensor:
        """The columns in float64. To make them takes longer than a vector's scores."""
        return self.columns.double()

    @cached_property
    def layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What [`sweep_codes`] wants to know: ranks, places, bounds and columns.

        A rank says where [`_smallest`] looks for a column, of several equal ones.
        """
        ranks, places = [], []
        for size, width in zip(self.sizes, self.widths, strict=True):
            numbers, folded = np.arange(size), _width(size)
            ranks += [numbers % folded * (size // folded) + numbers // folded, np.arange(size, width)]
            places += [np.argsort(ranks[-2]), ranks[-1]]
        ranked, placed = (np.concatenate(part).astype(np.int32) for part in (ranks, places))
        return ranked, placed, np.cumsum([0, *self.sizes]), np.cumsum([0, *self.widths])

    def step(self, number: int) -> slice:
        """Columns of a step."""
        start = sum(self.widths[:number])  # not of `starts`: asking a device for it would wait for the device
        return slice(start, start + self.widths[number])


def refine_codes(
    target: torch.Tensor, codes: torch.Tensor, tables: Tables, rounds: int, batch_invariant: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local search with the tables of a model, in chunks of bounded memory; see [`local_search`]."""
    steps = codes.shape[1]
    decode = None if tables.features is None else lambda trial: decode_codes(trial, tables)
    budget = CPU_CHUNK_BYTES if decode else CPU_SEARCH_BYTES
    budget = budget if target.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, budget // (2 * steps * tables.first.shape[0] + 16 * target.shape[1]))
    refined, restored = torch.empty_like(codes), torch.empty_like(target)
    with torch.autocast(target.device.type, enabled=False):
        if steps not in tables.pairs:
            codebooks = additive_codebooks(tables, steps)
            sizes = tables.sizes or [codebooks.shape[1]] * steps
            parts = [part[:size] for part, size in zip(codebooks, sizes, strict=False)]
            tables.pairs[steps] = build_pair_tables(parts)
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            found = local_search(target[part], codes[part], tables.pairs[steps], rounds, decode, batch_invariant)
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
    if sum(sizes) ** 2 > MAX_PAIRS:
        raise ValueError(
            f"Local search keeps a table of all pairs of codewords, {sum(sizes):,}^2 numbers, more than "
            f"{MAX_PAIRS:,}: set local_search=0, or use smaller codebooks."
        )
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
    table = torch.empty(len(columns) * len(codewords), dtype=torch.float16, device=codewords.device)
    pairs = PairTables(codewords, sizes, starts, unit, tiled, columns, norms, table)
    for part, product in zip(columns.split(pairs.widths), pairs.products, strict=True):
        for rows in range(0, len(codewords), PAIR_ROWS):
            energies = _half(codewords[rows : rows + PAIR_ROWS] @ (2 * unit * part.T), MAX_ENERGY / len(sizes))
            product[:, rows : rows + PAIR_ROWS] = energies.unflatten(1, (-1, product.shape[2])).transpose(0, 1)
    return pairs


def _fill_up(values: torch.Tensor, sizes: list[int], value: float) -> torch.Tensor:
    """Values `(T, ...)` with each codebook's part filled up to whole tiles."""
    parts = [
        F.pad(part, [0, 0] * (part.dim() - 1) + [0, -len(part) % TILE], value=value) for part in values.split(sizes)
    ]
    return torch.cat(parts)


def local_search(
    target: torch.Tensor,
    codes: torch.Tensor,
    pairs: PairTables,
    rounds: int,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch_invariant: bool = True,
    first_round: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improves codes.

    Args:
        target: float32 `(n, d)`, standardised.
        codes: int64 `(n, m)`, where to start; m may be less than the tables' M.
        pairs: Tables of the codebooks, or of an additive approximation of the decoder.
        rounds: Starting points: first the codes themselves, then the best so far with a few of them replaced.
        decode: Decoder of codes `(n, m)` to `(n, d)`. `None`: the sum of the tables' codewords.
        batch_invariant: Compute what is not looked up in float64, so that rounding, which depends on the batch, does
            not choose between codes.
        first_round: Number of the first round; the number decides what is replaced.

    Returns:
        Codes and their reconstructions. No vector ends with a larger error than it began with.
    """
    steps = codes.shape[1]
    starts = pairs.starts[:steps]
    best = (codes + starts).contiguous()  # rows of pairs.codewords
    restored = _sums(best, pairs) if decode is None else decode(codes)
    error = (target - restored).square().sum(-1)
    if steps == 1 or not rounds:
        return codes, restored
    scores = _scores(target, steps, pairs, batch_invariant) if decode is None else target  # with a decoder, per round
    for number in range(rounds):
        if decode is not None:
            scores = _scores(target - restored + _sums(best, pairs), steps, pairs, batch_invariant)
        trial, order = _replace_some(best, pairs, number, first_round)
        _choose_again(trial, scores, order, pairs)
        if pairs.tiled and decode is None:
            keep_better(trial, best, restored, error, target, pairs.codewords)
            continue
        trial_restored = _sums(trial, pairs) if decode is None else decode(trial - starts)
        trial_error = (target - trial_restored).square().sum(-1)
        better = (trial_error < error)[:, None]
        best, restored = torch.where(better, trial, best), torch.where(better, trial_restored, restored)
        error = torch.minimum(error, trial_error)
    return best - starts, restored


def _sums(rows: torch.Tensor, pairs: PairTables) -> torch.Tensor:
    return F.embedding_bag(rows, pairs.codewords, mode="sum")


def _scores(target: torch.Tensor, steps: int, pairs: PairTables, exact: bool) -> torch.Tensor:
    """What each codeword of `steps` steps adds to the squared error by itself, |c|^2 - 2 x.c, in units, float16."""
    count = sum(pairs.widths[:steps])
    columns = (pairs.exact if exact else pairs.columns)[:count].T
    norms, factor = pairs.norms[:count].to(columns.dtype), -2 * pairs.unit
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


def _choose_again(rows: torch.Tensor, scores: torch.Tensor, order: list[int], pairs: PairTables) -> None:
    """Sets each code, in turn, to the best one given the others, and all once more. In place."""
    if pairs.tiled:
        sweep_codes(rows, scores, pairs.table, *pairs.layout, SWEEPS * order)
        return
    for step in SWEEPS * order:
        columns, products = pairs.step(step), pairs.products[step][0]
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
