"""Additive codebooks optimised together: LSQ++ (Martinez et al., ECCV 2018), for many codewords and many vectors.

Two steps alternate: given the codes, the codebooks are a least-squares fit; given the codebooks, the codes are
improved by local search. By itself this stops in a poor optimum. So the codebooks are perturbed before the codes are
chosen, less from round to round, as in simulated annealing (their SR-D).

Two things differ from Faiss's LSQ. The fit is regularised by what a codeword of its energy is worth, so that large
codebooks do not learn the noise of their few vectors. And the annealing, which needs rounds but not vectors, runs on a
sample; only the last rounds see all vectors.
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..additive import least_squares_tables
from ..local_search_rqmoe import build_pair_tables, local_search

BATCH = 2048
VECTORS_PER_CODEWORD = 64  # of one codebook, at least, in the sample of the annealing


def train_lsq(
    vectors: np.ndarray,
    num_codebooks: int,
    codebook_size: int,
    rounds: int = 25,
    final_rounds: int = 3,
    search_rounds: int = 3,
    sample_size: int = 65_536,
    seed: int = 0,
    checkpoint: Path | None = None,
    show_progress_bar: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains codebooks whose sums approximate the vectors.

    Args:
        vectors: float32 `(n, d)`, centred.
        num_codebooks: Codebooks (M).
        codebook_size: Codewords of each (K); (M * K)^2 numbers must fit into memory.
        rounds: Rounds of annealing, on a sample.
        final_rounds: Rounds without perturbation, on all vectors.
        search_rounds: Rounds of local search for each vector in each of them.
        sample_size: Vectors for the annealing. Large codebooks take more, 64 for each of their codewords.
        seed: Of the sample, the first codes and the perturbations.
        checkpoint: File that is written after each round and continued from; deleted at the end.
        show_progress_bar: Whether to show one.

    Returns:
        Codebooks, float32 `(M, K, d)`, and the codes of the vectors that the last fit saw, int64 `(n, M)`.
    """
    shape = (num_codebooks, codebook_size, vectors.shape[1])
    size = max(sample_size, VECTORS_PER_CODEWORD * codebook_size)
    sample = vectors[np.sort(np.random.default_rng(seed).permutation(len(vectors))[:size])]
    done, codes, codebooks = _restart(checkpoint, shape, len(sample), seed)
    bar = tqdm(total=rounds + final_rounds, initial=done, desc="LSQ", unit="round", disable=not show_progress_bar)
    for number in range(done, rounds + final_rounds):
        data = sample if number < rounds else vectors
        if len(codes) == len(data):
            codebooks = _fit(codes, data, codebooks)
        else:  # from the sample to all vectors
            codebooks = _fit(codes, sample, codebooks)
            codes = _greedy_codes(data, codebooks)
        codes, error = _improve(codes, data, _perturb(codebooks, sample, number, rounds, seed), search_rounds, number)
        _keep(checkpoint, number + 1, codes, codebooks)
        bar.set_postfix(error=f"{error:.4g}")
        bar.update()
    bar.close()
    codebooks = _fit(codes, vectors if final_rounds else sample, codebooks)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return codebooks, codes


def _restart(checkpoint: Path | None, shape: tuple, vectors: int, seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Rounds done, codes and codebooks: those of the checkpoint, or random codes."""
    if checkpoint is not None and checkpoint.is_file():
        with np.load(checkpoint, allow_pickle=False) as saved:
            if saved["codebooks"].shape == shape:
                return int(saved["done"]), saved["codes"].astype(np.int64), saved["codebooks"]
    codes = np.random.default_rng(seed).integers(shape[1], size=(vectors, shape[0]))
    return 0, codes, np.zeros(shape, np.float32)


def _keep(checkpoint: Path | None, done: int, codes: np.ndarray, codebooks: np.ndarray) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    scratch = checkpoint.with_suffix(".tmp.npz")
    np.savez(scratch, done=done, codes=codes.astype(np.uint16), codebooks=codebooks)
    os.replace(scratch, checkpoint)


def _perturb(codebooks: np.ndarray, vectors: np.ndarray, number: int, rounds: int, seed: int) -> np.ndarray:
    """Adds noise with the data's deviation per dimension over M, times the root of the share of rounds to come."""
    share = max(0.0, 1 - (number + 1) / rounds) ** 0.5 / len(codebooks) if rounds else 0.0
    if not share:
        return codebooks
    noise = np.random.default_rng([seed, number]).standard_normal(codebooks.shape, dtype=np.float32)
    return codebooks + noise * (share * vectors.std(axis=0))


def _fit(codes: np.ndarray, vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Least squares with the ridge that fits the present codewords' energy and the present error.

    It gives the posterior mean of codewords that are Gaussian with this energy, of vectors with Gaussian errors.
    """
    some = slice(0, 8 * BATCH)
    restored = sum(codebook[column] for codebook, column in zip(codebooks, codes[some].T, strict=True))
    error = np.square(vectors[some] - restored).sum(axis=1).mean()
    energy = np.square(codebooks).sum(axis=2).mean()
    ridge = float(np.clip(error / energy, 1e-2, 30)) if energy > 0 else 1.0
    return least_squares_tables(codes, vectors, codebooks.shape[1], ridge)


def _improve(
    codes: np.ndarray, vectors: np.ndarray, codebooks: np.ndarray, search_rounds: int, number: int
) -> tuple[np.ndarray, float]:
    """Local search from the given codes; returns the new ones and their mean squared error."""
    pairs = build_pair_tables(torch.from_numpy(codebooks))
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


def _greedy_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Codes chosen one after the other, where the search starts."""
    steps = [torch.from_numpy(codebook) for codebook in codebooks]
    codes = np.empty((len(vectors), len(steps)), np.int64)
    for start in range(0, len(vectors), BATCH):
        residual = torch.from_numpy(vectors[start : start + BATCH]).clone()
        for step, codebook in enumerate(steps):
            best = torch.addmm(codebook.square().sum(-1), residual, codebook.T, alpha=-2).argmin(dim=1)
            residual -= codebook[best]
            codes[start : start + BATCH, step] = best.numpy()
    return codes
