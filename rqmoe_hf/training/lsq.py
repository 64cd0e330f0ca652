"""Additive codebooks optimised together: LSQ++ (Martinez et al., ECCV 2018), for many codewords and few vectors.

Two steps alternate: given the codes, the codebooks are a least-squares fit; given the codebooks, the codes are
improved by local search. By itself this stops in an optimum that is some percent worse than it need be. So the
codebooks are perturbed before the codes are chosen, less from round to round, as in simulated annealing (their SR-D).

Three things differ from Faiss's LSQ. A round sees some of the vectors, and those moved at random
([`NeighborJitter`]), so that no two rounds see the same. The fit is to all rounds, of which older ones count less
([`RunningFit`]), so that what one round's vectors have by chance does not get into the codebooks. And the fit is
regularised by what a codeword of its energy is worth. What the first two give is in benchmarks/LEVERS.md.
"""

import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..least_squares import MAX_COLUMNS, RecentFit, RunningFit, starts_of
from ..local_search_rqmoe import build_pair_tables, local_search
from .augmentation import NeighborJitter

BATCH, DEVICE_BATCH = 8192, 32_768  # vectors that are searched at a time
BATCH_SIZE = 65_536
FINAL_ROUNDS = 10
TEMPERATURE = 1.0
PRIOR_RIDGE = 6.0  # vectors that a codeword to stay near counts as
JITTER, MAX_JITTER = 3.0, 0.5  # energy of what vectors are moved by, as a share of the error: per codeword and vector
DOUBLE_COLUMNS = 4096  # equations that are solved in double precision
SAVING_SHARE = 0.1  # of the time, at most, goes into writing checkpoints
SUMMED = 1000  # vectors that a checkpoint's data are known by


class EarlierCodebooks(Protocol):
    """What [`train_lsq`] asks of the codebooks before its own."""

    @property
    def checksum(self) -> int:
        """Differs for different codebooks."""
        ...

    def leave(self, rows: np.ndarray, vectors: torch.Tensor, number: int) -> torch.Tensor:
        """What they leave of training vectors `rows`, or of `vectors` near them, in a round."""
        ...


class PriorCodebooks(Protocol):
    """What [`train_lsq`] asks of codebooks that it fine-tunes."""

    codebooks: list[np.ndarray]
    codes: np.ndarray

    @property
    def checksum(self) -> int:
        """Differs for different codebooks."""
        ...


def train_lsq(
    vectors: np.ndarray,
    sizes: Sequence[int],
    rounds: int = 50,
    final_rounds: int | None = None,
    search_rounds: int = 3,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    checkpoint: Path | None = None,
    show_progress_bar: bool = True,
    temperature: float = TEMPERATURE,
    jitter: float | None = None,
    keep: tuple[float, float] = (0.6, 0.9),
    source: NeighborJitter | None = None,
    earlier: EarlierCodebooks | None = None,
    prior: PriorCodebooks | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[np.ndarray], np.ndarray]:
    """Trains codebooks whose sums approximate the vectors.

    Args:
        vectors: float32 `(n, d)`, centred.
        sizes: Codewords of each codebook; the square of their sum must fit into memory.
        rounds: Rounds of annealing.
        final_rounds: Rounds without perturbation. Default: 10, or as many as it takes to see all vectors.
        search_rounds: Rounds of local search for each vector in each of them.
        batch_size: Vectors of a round, at most; all are seen in turn.
        seed: Of the first codes, the batches and the perturbations.
        checkpoint: File that is written from time to time and continued from, if it is of the same run. The caller
            deletes it when the result is safe.
        show_progress_bar: Whether to show one.
        temperature: Of the annealing's start: deviation of the perturbation of a codeword, in units of the data's
            over M.
        jitter: Energy of what vectors are moved by at random, as a share of the present error; 0 for none. Default:
            three times the codewords of all codebooks per vector, up to .5.
        keep: Weight of all older rounds in the fit to the next, during the annealing and in the final rounds.
        source: Of the moved vectors; default one of these vectors, as if nothing had been subtracted from them.
        earlier: Codebooks that come before these. What they leave of the vectors is what these are trained on.
        prior: Codebooks to begin with and to stay near, and codes of the vectors in them: fine-tuning. The fit is the
            posterior mean of codewords that are Gaussian around these.
        device: Where to train. The codebooks differ between devices, and on GPUs a little between runs.

    Returns:
        Codebooks, float32 `(K_m, d)` each, and codes of the vectors, int64 `(n, M)`, of the last round that saw them.
    """
    sizes, size = list(sizes), min(batch_size, len(vectors))
    final_rounds = max(FINAL_ROUNDS, -(-len(vectors) // size)) if final_rounds is None else final_rounds
    jitter = min(MAX_JITTER, JITTER * sum(sizes) / len(vectors)) if jitter is None else jitter
    run = [*vectors.shape, rounds, final_rounds, search_rounds, size, seed, temperature, jitter, *keep, *sizes]
    run += [known.checksum for known in (earlier, prior) if known is not None]
    run.append(zlib.crc32(vectors[:: max(1, len(vectors) // SUMMED)].tobytes()))
    state = _State(sizes, vectors.shape, seed, torch.device(device), prior)
    state.restore(checkpoint, run)
    source = source or NeighborJitter(vectors, show_progress_bar=show_progress_bar, device=device)
    total = rounds + final_rounds
    bar = tqdm(total=total, initial=state.done, desc="LSQ", unit="round", disable=not show_progress_bar)
    for number in range(state.done, total):
        rows = _batch(number, size, len(vectors), seed)
        batch = source.draw(rows, jitter * state.error, np.random.default_rng([seed, number, 0]))
        if earlier is not None:
            batch = earlier.leave(rows, batch, number)
        before = state.codes_of(rows)
        if not number and prior is None:
            state.deviation = batch.std(dim=0, correction=0)
            state.fit.add(before, batch)
            state.codewords = state.fit.solve(1.0)
        noise = temperature * _cooling(number, rounds) / len(sizes) * state.deviation
        perturbed = _perturb(state.codewords, noise, [seed, number, 1])
        codes = _improve(before, batch, perturbed.split(sizes), search_rounds, number)
        state.codes[rows] = codes.cpu().numpy()
        state.error = _error(codes, batch, state.codewords, sizes)
        state.take_in(codes, batch, keep[number >= rounds])
        state.done += 1
        state.keep(checkpoint, run, state.done == total)
        bar.set_postfix(error=f"{state.error:.4g}")
        bar.update()
    bar.close()
    return [part.numpy() for part in state.codewords.cpu().split(sizes)], state.codes.astype(np.int64)


def batch_rows(device: torch.device) -> int:
    """Vectors that are searched at a time on a device."""
    return BATCH if device.type == "cpu" else DEVICE_BATCH


class _State:
    """What a run is after some rounds: codes, codewords, and the fit that they come from."""

    def __init__(
        self,
        sizes: list[int],
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        prior: PriorCodebooks | None = None,
    ):
        self.sizes, self.prior = sizes, None
        self.done, self.error, total = 0, 0.0, sum(sizes)
        self.codes = np.random.default_rng(seed).integers(sizes, size=(shape[0], len(sizes))).astype(np.uint16)
        self.codewords = torch.zeros(total, shape[1], device=device)
        self.deviation = torch.zeros(shape[1], device=device)  # of what is quantized, before it is
        kind = torch.float64 if total <= DOUBLE_COLUMNS else torch.float32
        solvable = total <= MAX_COLUMNS
        self.fit = RunningFit(sizes, shape[1], kind, device) if solvable else RecentFit(sizes, shape[1], device)
        self.saved, self.saving = time.perf_counter(), 0.0  # when a checkpoint was written, and how long it took
        if prior is not None:
            self.codes = prior.codes.astype(np.uint16)
            self.prior = self.codewords = torch.from_numpy(np.concatenate(prior.codebooks)).to(device)

    def take_in(self, codes: torch.Tensor, vectors: torch.Tensor, keep: float) -> None:
        """Adds a round to the fit, and solves it."""
        if self.prior is None:
            self.fit.add(codes, vectors, keep)
            self.codewords = self.fit.solve(_ridge(self.error, self.codewords))
        else:  # the fit is of what is added to the codewords, and that is small
            self.fit.add(codes, vectors - _sums(codes, self.prior, self.sizes), keep)
            self.codewords = self.prior + self.fit.solve(PRIOR_RIDGE)

    def codes_of(self, rows: np.ndarray) -> torch.Tensor:
        """Codes of some vectors, int64 `(k, M)` on the device."""
        return torch.from_numpy(self.codes[rows].astype(np.int64)).to(self.codewords.device)

    def restore(self, file: Path | None, run: list[float]) -> None:
        """Continues from a file, if there is one of this run."""
        if file is None or not file.is_file():
            return
        with np.load(file, allow_pickle=False) as saved:
            if saved["run"].tolist() == run:
                self.done, self.error, self.codes = int(saved["done"]), float(saved["error"]), saved["codes"]
                self.codewords = torch.from_numpy(saved["codewords"]).to(self.codewords.device)
                self.deviation = torch.from_numpy(saved["deviation"]).to(self.codewords.device)
                self.fit.restore({name[4:]: saved[name] for name in saved.files if name.startswith("fit_")})

    def keep(self, file: Path | None, run: list[float], last: bool) -> None:
        """Writes the file, unless that would take too much of the time; the last one always."""
        start = time.perf_counter()
        if file is None or (not last and start - self.saved < self.saving / SAVING_SHARE):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".tmp.npz")
        fit = {f"fit_{name}": value for name, value in self.fit.state().items()}
        parts: dict[str, Any] = {"run": run, "done": self.done, "error": self.error, **fit}
        parts |= {"codewords": self.codewords.cpu().numpy(), "deviation": self.deviation.cpu().numpy()}
        np.savez(scratch, codes=self.codes, **parts)
        os.replace(scratch, file)
        self.saved = time.perf_counter()
        self.saving = self.saved - start


def _batch(number: int, size: int, count: int, seed: int) -> np.ndarray:
    """Rows of a round, in ascending order: the next ones of a random order, which is drawn anew when it ends."""
    start, parts = number * size, []
    while size:
        epoch, place = divmod(start, count)
        part = np.random.default_rng([seed, epoch, 2]).permutation(count)[place : place + size]
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return np.sort(np.concatenate(parts))


def _cooling(number: int, rounds: int) -> float:
    """Share of the temperature in a round: the root of the share of rounds to come."""
    return max(0.0, 1 - (number + 1) / rounds) ** 0.5 if rounds else 0.0


def _perturb(codewords: torch.Tensor, deviation: torch.Tensor, seed: list[int]) -> torch.Tensor:
    if not deviation.any():
        return codewords
    generator = np.random.default_rng(seed)
    if codewords.device.type == "cpu":
        normal = torch.from_numpy(generator.standard_normal(codewords.shape, dtype=np.float32))
    else:  # which draws them much faster
        drawn = torch.Generator(codewords.device).manual_seed(int(generator.integers(1 << 62)))
        normal = torch.randn(codewords.shape, generator=drawn, device=codewords.device)
    return torch.addcmul(codewords, normal, deviation)


def _error(codes: torch.Tensor, vectors: torch.Tensor, codewords: torch.Tensor, sizes: list[int]) -> float:
    """Mean squared error of some of the vectors, by codewords that are not perturbed."""
    some = slice(0, 2 * BATCH)
    return float((vectors[some] - _sums(codes[some], codewords, sizes)).square().sum(dim=1).mean())


def _sums(codes: torch.Tensor, codewords: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return F.embedding_bag(codes + torch.from_numpy(starts_of(sizes)).to(codes.device), codewords, mode="sum")


def _ridge(error: float, codewords: torch.Tensor) -> float:
    """The ridge that fits the present codewords' energy and the present error.

    With it the fit is the posterior mean of codewords that are Gaussian with this energy, of vectors with Gaussian
    errors.
    """
    energy = float(codewords.square().sum(dim=1).mean())
    return min(max(error / energy, 1e-2), 30.0) if energy > 0 else 1.0


def _improve(
    codes: torch.Tensor, vectors: torch.Tensor, codebooks: Sequence[torch.Tensor], search_rounds: int, number: int
) -> torch.Tensor:
    """Local search from the given codes."""
    pairs, size = build_pair_tables(codebooks), batch_rows(vectors.device)
    found = [
        local_search(target, before, pairs, search_rounds, batch_invariant=False, first_round=number)[0]
        for target, before in zip(vectors.split(size), codes.split(size), strict=True)
    ]
    return torch.cat(found)
