"""Gives a new model its statistics and codebooks: those of an additive quantizer trained on a sample."""

from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch

from ..additive import MAX_COLUMNS
from ..modeling_rqmoe import RQMoEModel
from .lsq import train_lsq

MIN_VECTORS_PER_CODEWORD = 4


def initialize(
    model: RQMoEModel,
    embeddings: np.ndarray,
    method: Literal["rq", "lsq"] = "rq",
    sample_size: int = 65_536,
    beam_size: int = 5,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> RQMoEModel:
    """Initialises a model from data, in place.

    Mean and scale (one number: the root of the mean variance per dimension) are measured on all embeddings. The
    codebooks are those of an additive quantizer; the experts start at zero, so the model begins as exactly this one.
    The instructions start as the codewords themselves (projected if `instruction_size` is smaller), so that the first
    instruction streams are the additive reconstructions.

    Args:
        model: A new model; its weights are overwritten.
        embeddings: Floating point `(n, hidden_size)`.
        method: `"rq"`: Faiss's residual quantizer, any size. `"lsq"`: codebooks optimised together ([`train_lsq`]),
            better and slower; its tables grow with the square of num_codebooks * codebook_size.
        sample_size: Vectors that the residual quantizer trains on; LSQ takes them for its annealing, then all.
        beam_size: Beam of the residual quantizer in its training.
        seed: For the sample and the training.
        checkpoint: File that LSQ keeps its state in while it runs, and continues from.

    Returns:
        The model.

    Raises:
        ValueError: If there are too few vectors or the method cannot do this codebook size.
    """
    config = model.config
    needed = MIN_VECTORS_PER_CODEWORD * config.codebook_size
    if embeddings.ndim != 2 or embeddings.shape[1] != config.hidden_size:
        raise ValueError(f"Expected embeddings of shape (n, {config.hidden_size}), got {embeddings.shape}.")
    if len(embeddings) < needed:
        raise ValueError(
            f"Codebooks of {config.codebook_size} codewords need at least {needed} vectors, got {len(embeddings)}: "
            "give more, or choose a smaller codebook_size."
        )
    mean = embeddings.mean(axis=0, dtype=np.float64)
    variance = embeddings.var(axis=0, dtype=np.float64).mean()
    if not np.isfinite(variance) or variance <= 0:
        raise ValueError(f"The embeddings' variance is {variance}: they are constant, or hold NaN or infinity.")
    if method == "lsq":
        _check_lsq(config.num_codebooks, config.codebook_size)
        standardised = ((embeddings - mean.astype(np.float32)) / np.float32(np.sqrt(variance))).astype(np.float32)
        size = (config.num_codebooks, config.codebook_size)
        codebooks, codes = train_lsq(standardised, *size, sample_size=sample_size, seed=seed, checkpoint=checkpoint)
        codebooks = sort_by_energy(codebooks, codes)[0]
    else:
        rows = np.random.default_rng(seed).permutation(len(embeddings))[:sample_size]
        sample = ((embeddings[np.sort(rows)] - mean) / np.sqrt(variance)).astype(np.float32)
        codebooks = _rq_codebooks(sample, model, beam_size, seed)
    with torch.no_grad():
        model.mean.copy_(torch.from_numpy(mean))
        model.scale.fill_(float(np.sqrt(variance)))
        model.codebooks.copy_(torch.from_numpy(codebooks))
        if model.instructions is not None:
            model.instructions.copy_(
                model.codebooks[:-1] @ _projection(config.hidden_size, config.condition_size, seed)
            )
    return model


def _projection(size: int, target: int, seed: int) -> torch.Tensor:
    """The identity if the sizes agree, else random columns that keep the mean squared norm per dimension."""
    if size == target:
        return torch.eye(size)
    return torch.randn(size, target, generator=torch.Generator().manual_seed(seed)) / size**0.5


def _rq_codebooks(sample: np.ndarray, model: RQMoEModel, beam_size: int, seed: int) -> np.ndarray:
    config = model.config
    shape = (config.num_codebooks, config.codebook_size, config.hidden_size)
    power_of_two = config.codebook_size == 1 << config.bits_per_code
    if not power_of_two or len(sample) <= config.hidden_size:  # Faiss's own training can do neither
        return _residual_kmeans(sample, shape, seed)
    quantizer = faiss.ResidualQuantizer(config.hidden_size, config.num_codebooks, config.bits_per_code)
    quantizer.max_beam_size = beam_size
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1  # the warning about few points has no place here: training follows
    quantizer.train(sample)
    return faiss.vector_to_array(quantizer.codebooks).reshape(shape)


def _residual_kmeans(sample: np.ndarray, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    codebooks, residual = [], sample.copy()
    for step in range(shape[0]):
        kmeans = faiss.Kmeans(shape[2], shape[1], niter=20, seed=seed + step + 1, min_points_per_centroid=1)
        kmeans.train(residual)
        nearest = kmeans.index.search(residual, 1)[1][:, 0]
        centroids = np.asarray(kmeans.centroids)
        residual -= centroids[nearest]
        codebooks.append(centroids)
    return np.stack(codebooks)


def _check_lsq(steps: int, size: int) -> None:
    if steps * size > MAX_COLUMNS:
        raise ValueError(
            f"method='lsq' solves for num_codebooks * codebook_size = {steps} * {size} codewords together, more than "
            f"{MAX_COLUMNS:,}: use 'rq', or smaller codebooks."
        )


def sort_by_energy(codebooks: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders joint codebooks for sequential encoding and for prefixes.

    LSQ's codebooks have no order. Here the one that explains most variance comes first, and all codebooks but the
    first get mean zero over the codes (the first takes the sum of the means), so that a prefix is a sensible vector.
    The sum of the codewords, that is the reconstruction, stays the same.

    Args:
        codebooks: `(M, K, d)`.
        codes: `(n, M)`, codes of typical vectors.

    Returns:
        The new codebooks, and the order: `new_codes = codes[:, order]`.
    """
    counts = np.stack([np.bincount(column, minlength=codebooks.shape[1]) for column in codes.T]) / len(codes)
    means = np.einsum("mk,mkd->md", counts, codebooks)
    centred = codebooks - means[:, None]
    order = np.argsort(-np.einsum("mk,mkd->m", counts, centred**2), kind="stable")
    centred = centred[order]
    centred[0] += means.sum(axis=0)
    return centred.astype(np.float32), order
