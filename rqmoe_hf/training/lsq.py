"""Additive codebooks optimised together: LSQ++ (Martinez et al., ECCV 2018), for many codewords and many vectors.

Two steps alternate: given the codes, the codebooks are a least-squares fit; given the codebooks, the codes are
improved by local search. By itself this stops in an optimum that is some percent worse than it need be. So the
codebooks are perturbed before the codes are chosen, less from round to round, as in simulated annealing (their SR-D).

Two things differ from Faiss's LSQ. The fit is regularised by what a codeword of its energy is worth, so that large
codebooks do not learn the noise of their few vectors. And the annealing, which needs rounds but not vectors, runs on a
sample; only the last rounds see all vectors.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..additive import improve_codewords, solve_codewords, starts_of
from ..local_search_rqmoe import build_pair_tables, local_search

BATCH = 2048
# Of the start of the annealing, for codebooks of up to 256 codewords and for larger ones, whose codewords lie closer.
# Measured with 256, on 16,384 vectors, and 1,024, on 65,536 to 100,000 (benchmarks/LEVERS.md).
TEMPERATURE, LARGE_TEMPERATURE = 1.5, 1.0
VECTORS_PER_CODEWORD = 16  # of one codebook, at least, in the sample of the annealing
SOLVED_COLUMNS = 4096  # codewords that are solved for exactly


def train_lsq(
    vectors: np.ndarray,
    sizes: Sequence[int],
    rounds: int = 25,
    final_rounds: int = 6,
    search_rounds: int = 3,
    sample_size: int = 65_536,
    seed: int = 0,
    checkpoint: Path | None = None,
    show_progress_bar: bool = True,
    temperature: float | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Trains codebooks whose sums approximate the vectors.

    Args:
        vectors: float32 `(n, d)`, centred.
        sizes: Codewords of each codebook; the square of their sum must fit into memory.
        rounds: Rounds of annealing, on a sample.
        final_rounds: Rounds without perturbation, on all vectors.
        search_rounds: Rounds of local search for each vector in each of them.
        sample_size: Vectors for the annealing. Large codebooks take more, 16 for each of their codewords.
        seed: Of the sample, the first codes and the perturbations.
        checkpoint: File that is written after each round and continued from, if it is of the same run. The caller
            deletes it when the result is safe.
        show_progress_bar: Whether to show one.
        temperature: Of the annealing's start: deviation of the perturbation of a codeword, in units of the data's
            over M. Default: 1.5 for codebooks of up to 256 codewords, 1 for larger ones.

    Returns:
        Codebooks, float32 `(K_m, d)` each, and the codes of the vectors that the last fit saw, int64 `(n, M)`.
    """
    sizes = list(sizes)
    if temperature is None:
        temperature = LARGE_TEMPERATURE if max(sizes) > 256 else TEMPERATURE
    count = max(sample_size, VECTORS_PER_CODEWORD * max(sizes))
    sample = vectors[np.sort(np.random.default_rng(seed).permutation(len(vectors))[:count])]
    run = [len(vectors), rounds, final_rounds, search_rounds, len(sample), seed, temperature, *sizes]
    done, codes, codewords = _restart(checkpoint, run, sizes, sample)
    bar = tqdm(total=rounds + final_rounds, initial=done, desc="LSQ", unit="round", disable=not show_progress_bar)
    for number in range(done, rounds + final_rounds):
        data = sample if number < rounds else vectors
        if len(codes) == len(data):
            codewords = _fit(codes, data, codewords, sizes)
        else:  # from the sample to all vectors
            codewords = _fit(codes, sample, codewords, sizes)
            codes = _greedy_codes(data, _split(codewords, sizes))
        perturbed = _perturb(codewords, sample, temperature * _cooling(number, rounds) / len(sizes), [seed, number])
        codes, error = _improve(codes, data, _split(perturbed, sizes), search_rounds, number)
        _keep(checkpoint, run, number + 1, codes, codewords)
        bar.set_postfix(error=f"{error:.4g}")
        bar.update()
    bar.close()
    codewords = _fit(codes, vectors if final_rounds else sample, codewords, sizes)
    return [part.numpy() for part in _split(codewords, sizes)], codes


def _split(codewords: np.ndarray, sizes: list[int]) -> list[torch.Tensor]:
    return list(torch.from_numpy(codewords).split(sizes))


def _restart(
    checkpoint: Path | None, run: list[float], sizes: list[int], sample: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """Rounds done, codes and codewords: those of the checkpoint, or random codes."""
    if checkpoint is not None and checkpoint.is_file():
        with np.load(checkpoint, allow_pickle=False) as saved:
            if saved["run"].tolist() == run:
                return int(saved["done"]), saved["codes"].astype(np.int64), saved["codewords"]
    codes = np.random.default_rng(int(run[5])).integers(sizes, size=(len(sample), len(sizes)))
    return 0, codes, np.zeros((sum(sizes), sample.shape[1]), np.float32)


def _keep(checkpoint: Path | None, run: list[float], done: int, codes: np.ndarray, codewords: np.ndarray) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    scratch = checkpoint.with_suffix(".tmp.npz")
    np.savez(scratch, run=run, done=done, codes=codes.astype(np.uint16), codewords=codewords)
    os.replace(scratch, checkpoint)


def _cooling(number: int, rounds: int) -> float:
    """Share of the temperature in a round: the root of the share of rounds to come."""
    return max(0.0, 1 - (number + 1) / rounds) ** 0.5 if rounds else 0.0


def _perturb(codewords: np.ndarray, vectors: np.ndarray, temperature: float, seed: list[int]) -> np.ndarray:
    if not temperature:
        return codewords
    noise = np.random.default_rng(seed).standard_normal(codewords.shape, dtype=np.float32)
    return codewords + noise * (temperature * vectors.std(axis=0))


def _fit(codes: np.ndarray, vectors: np.ndarray, codewords: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Least squares with the ridge that fits the present codewords' energy and the present error.

    It gives the posterior mean of codewords that are Gaussian with this energy, of vectors with Gaussian errors.
    """
    some = slice(0, 8 * BATCH)
    restored = codewords[codes[some] + starts_of(sizes)].sum(axis=1)
    error = np.square(vectors[some] - restored).sum(axis=1).mean()
    energy = np.square(codewords).sum(axis=1).mean()
    ridge = float(np.clip(error / energy, 1e-2, 30)) if energy > 0 else 1.0
    if sum(sizes) <= SOLVED_COLUMNS:
        return solve_codewords(codes, vectors, sizes, ridge)
    return improve_codewords(codewords, codes, vectors, sizes, ridge)


def _improve(
    codes: np.ndarray, vectors: np.ndarray, codebooks: list[torch.Tensor], search_rounds: int, number: int
) -> tuple[np.ndarray, float]:
    """Local search from the given codes; returns the new ones and their mean squared error."""
    pairs = build_pair_tables(codebooks)
    found, total = np.empty_like(codes), 0.0
    for start in range(0, len(codes), BATCH):
        part = slice(start, start + BATCH)
        target = torch.from_numpy(vectors[part])
        better, restored = local_search(
            target, torch.from_numpy(codes[part]), pairs, search_rounds, batch_invariant=False, first_round=number
        )
        found[part] = better.numpy()
        total += float((target - restored).square().sum())
    return found, total / len(codes)


def _greedy_codes(vectors: np.ndarray, codebooks: list[torch.Tensor]) -> np.ndarray:
    """Codes chosen one after the other, where the search starts."""
    codes = np.empty((len(vectors), len(codebooks)), np.int64)
    for start in range(0, len(vectors), BATCH):
        residual = torch.from_numpy(vectors[start : start + BATCH]).clone()
        for step, codebook in enumerate(codebooks):
            best = torch.addmm(codebook.square().sum(-1), residual, codebook.T, alpha=-2).argmin(dim=1)
            residual -= codebook[best]
            codes[start : start + BATCH, step] = best.numpy()
    return codes
