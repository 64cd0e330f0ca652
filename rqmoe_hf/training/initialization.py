"""Gives a new model its statistics and codebooks: those of an additive quantizer trained on a sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch

from ..additive import faiss_widths
from ..blocks_rqmoe import blocks_of
from ..codes import bits_per_code, sizes_for_bytes, sizes_of
from ..configuration_rqmoe import RQMoEConfig
from ..limits_rqmoe import MAX_PAIRS
from ..modeling_rqmoe import RQMoEModel
from .augmentation import NeighborJitter
from .blocks import train_blocks
from .lsq import TEMPERATURE

MIN_VECTORS_PER_CODEWORD = 4
# Per codeword of all codebooks. A codeword costs what a coefficient of least squares costs: accuracy on other vectors,
# in proportion to codewords per vector. With fewer than nine vectors each, larger codebooks lose what they gain.
ENOUGH_VECTORS = 9
CODE_BITS = (8, 11)
BLOCK_BYTES = 16
METHODS = {"rq": "Faiss RQ", "lsq": "LSQ"}
BLOCK = 16_384  # vectors of which there is a copy in float64
NORM_TOLERANCE = 0.01  # mean distance of squared norms from 1, up to which all are taken for 1


def initialize(
    model: RQMoEModel,
    embeddings: np.ndarray,
    method: Literal["rq", "lsq"] = "rq",
    sample_size: int = 65_536,
    beam_size: int = 5,
    seed: int = 0,
    checkpoint: Path | None = None,
    rounds: int = 50,
    show_progress_bar: bool = True,
    temperature: float = TEMPERATURE,
) -> RQMoEModel:
    """Initialises a model from data, in place.

    Mean and scale (one number: the root of the mean variance per dimension) are measured on all embeddings. The
    codebooks are those of an additive quantizer; the experts start at zero, so the model begins as exactly this one.
    The instructions start as the codewords themselves (projected if `instruction_size` is smaller), so that the first
    instruction streams are the additive reconstructions. LSQ runs where the model is if that is a CUDA device, many
    times as fast as on a processor.

    Args:
        model: A new model; its weights are overwritten.
        embeddings: Floating point `(n, hidden_size)`.
        method: `"rq"`: Faiss's residual quantizer, any size. `"lsq"`: codebooks optimised together, block
            by block if the config has `search_blocks` ([`train_blocks`]), better and slower; its tables grow with the
            square of a block's codewords.
        sample_size: Vectors that the residual quantizer trains on, or that a round of LSQ sees.
        beam_size: Beam of the residual quantizer in its training.
        seed: For the sample and the training.
        checkpoint: File that LSQ keeps its state in while it runs, and continues from.
        rounds: Rounds of LSQ's annealing. More are slower and better.
        show_progress_bar: Whether LSQ shows one.
        temperature: Of LSQ's annealing; see [`train_lsq`].

    Returns:
        The model.

    Raises:
        ValueError: If there are too few vectors, there is no such method, or it cannot do this codebook size.
    """
    check_method(method)
    config = model.config
    _check_embeddings(embeddings, config)
    mean, variance, deviation = _moments(embeddings)
    if not np.isfinite(variance) or variance <= 0:
        raise ValueError(f"The embeddings' variance is {variance}: they are constant, or hold NaN or infinity.")
    if method == "lsq":
        settings = {"rounds": rounds, "batch_size": sample_size, "temperature": temperature}
        settings |= {"show_progress_bar": show_progress_bar}
        codebooks = _lsq_codebooks(embeddings, mean, np.sqrt(variance), model, checkpoint, seed, settings)
    else:
        rows = np.random.default_rng(seed).permutation(len(embeddings))[:sample_size]
        sample = standardize(embeddings[np.sort(rows)], mean, np.sqrt(variance))
        codebooks = _rq_codebooks(sample, model, beam_size, seed)
    config.unit_norm = bool(deviation < NORM_TOLERANCE)
    with torch.no_grad():
        model.mean.copy_(torch.from_numpy(mean))
        model.scale.fill_(float(np.sqrt(variance)))
        model.codebooks.copy_(torch.from_numpy(codebooks))
        if model.instructions is not None:
            projection = _projection(config.hidden_size, config.condition_size, seed)
            model.instructions.copy_(model.codebooks[:-1] @ projection.to(model.codebooks.device))
    return model


def _check_embeddings(embeddings: np.ndarray, config: RQMoEConfig) -> None:
    """Refuses what a quantizer of this configuration cannot be trained on."""
    if embeddings.ndim != 2 or embeddings.shape[1] != config.hidden_size:
        raise ValueError(f"Expected embeddings of shape (n, {config.hidden_size}), got {embeddings.shape}.")
    needed = MIN_VECTORS_PER_CODEWORD * config.codebook_size
    if len(embeddings) < needed:
        raise ValueError(
            f"Codebooks of {config.codebook_size} codewords need at least {needed} vectors, got {len(embeddings)}: "
            "give more, or choose a smaller codebook_size."
        )


def check_method(method: str) -> None:
    """Raises ValueError for what is no way to begin."""
    if method not in METHODS:
        raise ValueError(f"init_method must be one of {', '.join(METHODS)}, got {method!r}.")


def _moments(embeddings: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean, float64 `(d,)`, mean variance per dimension, and how far squared norms are from 1 in the mean.

    With no copy of all embeddings in float64.
    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    squares, deviation = np.zeros_like(mean), 0.0
    for start in range(0, len(embeddings), BLOCK):
        block = embeddings[start : start + BLOCK]
        squares += np.square(block - mean).sum(axis=0)
        deviation += np.abs(np.square(block, dtype=np.float64).sum(axis=1) - 1).sum()
    return mean, (squares / len(embeddings)).mean(), deviation / len(embeddings)


def standardize(embeddings: np.ndarray, mean: np.ndarray, scale: np.ndarray | np.floating) -> np.ndarray:
    """Embeddings less their mean, over their scale, float32 `(n, d)`."""
    result = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(embeddings), BLOCK):
        result[start : start + BLOCK] = (embeddings[start : start + BLOCK] - mean) / scale
    return result


def suitable_sizes(size: int, vectors: int) -> list[int]:
    """Sizes of the additive codebooks that suit a number of training vectors.

    Large codebooks are closer to the vectors that they were trained on, and to others only if there were enough.

    Args:
        size: Bytes per vector.
        vectors: Training vectors.

    Returns:
        The largest codebooks, of 256 to 2,048 codewords, that have nine vectors for each codeword; those of 256 if
        none have. Every bit is used.
    """
    smallest, largest = CODE_BITS
    for bits in range(largest, smallest, -1):
        sizes = sizes_for_bytes(size, bits)
        if ENOUGH_VECTORS * sum(sizes) <= vectors:
            return sizes
    return sizes_for_bytes(size, smallest)


def suitable_blocks(size: int, vectors: int) -> list[list[int]]:
    """Sizes of additive codebooks in the blocks of [`block_bytes`].

    Args:
        size: Bytes per vector.
        vectors: Training vectors.

    Returns:
        For each block what [`suitable_sizes`] says of its bytes.
    """
    return [suitable_sizes(share, vectors) for share in block_bytes(size)]


def block_bytes(size: int) -> list[int]:
    """Divides bytes into blocks of 16 at most, about equal: local search is weak in larger ones."""
    count = -(-size // BLOCK_BYTES)
    share, more = divmod(size, count)
    return [share + (number < more) for number in range(count)]


def _projection(size: int, target: int, seed: int) -> torch.Tensor:
    """The identity if the sizes agree, else random columns that keep the mean squared norm per dimension."""
    if size == target:
        return torch.eye(size)
    return torch.randn(size, target, generator=torch.Generator().manual_seed(seed)) / size**0.5


def _pad(codebooks: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Stacks codebooks; smaller ones are filled up with zeros, which the engine never uses."""
    padded = np.zeros((len(codebooks), size, codebooks[0].shape[1]), np.float32)
    for target, codebook in zip(padded, codebooks, strict=True):
        target[: len(codebook)] = codebook
    return padded


def _lsq_codebooks(
    embeddings: np.ndarray,
    mean: np.ndarray,
    scale: np.floating,
    model: RQMoEModel,
    checkpoint: Path | None,
    seed: int,
    settings: dict[str, Any],
) -> np.ndarray:
    """Codebooks of [`train_blocks`], which takes the settings, those of a block in order of what they explain."""
    config = model.config
    sizes = sizes_of(config.num_codebooks, config.code_sizes)
    blocks = [sizes[block] for block in blocks_of(config, config.num_codebooks)]
    for block in blocks:
        _check_lsq(block)
    standardised = standardize(embeddings, mean.astype(np.float32), np.float32(scale))
    device = model.codebooks.device if model.codebooks.is_cuda else torch.device("cpu")  # MPS has no float64
    shown = settings["show_progress_bar"]
    source = NeighborJitter(standardised, mean / scale, show_progress_bar=shown, device=device)
    trained = train_blocks(standardised, blocks, source, checkpoint, seed, device=device, **settings)
    ordered = [book for block in trained for book in sort_by_energy(block.codebooks, block.codes)[0]]
    return _pad(ordered, config.codebook_size)


def _rq_codebooks(sample: np.ndarray, model: RQMoEModel, beam_size: int, seed: int) -> np.ndarray:
    config = model.config
    sizes = sizes_of(config.num_codebooks, config.code_sizes)
    bits = [bits_per_code(size) for size in sizes]
    powers_of_two = all(size == 1 << width for size, width in zip(sizes, bits, strict=True))
    if not powers_of_two or len(sample) <= config.hidden_size:  # Faiss's own training can do neither
        return _pad(_residual_kmeans(sample, sizes, seed), config.codebook_size)
    quantizer = faiss.ResidualQuantizer(config.hidden_size, faiss_widths(bits))
    quantizer.max_beam_size = beam_size
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1  # the warning about few points has no place here: training follows
    quantizer.train(sample)
    rows = faiss.vector_to_array(quantizer.codebooks).reshape(-1, config.hidden_size)
    return _pad(np.split(rows, np.cumsum(sizes)[:-1]), config.codebook_size)


def _residual_kmeans(sample: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    codebooks, residual = [], sample.copy()
    for step, size in enumerate(sizes):
        kmeans = faiss.Kmeans(sample.shape[1], size, niter=20, seed=seed + step + 1, min_points_per_centroid=1)
        kmeans.train(residual)
        nearest = kmeans.index.search(residual, 1)[1][:, 0]
        centroids = np.asarray(kmeans.centroids)
        residual -= centroids[nearest]
        codebooks.append(centroids)
    return codebooks


def _check_lsq(sizes: list[int]) -> None:
    if len(sizes) > 1 and sum(sizes) ** 2 > MAX_PAIRS:  # one alone is found by k-means, without a table
        raise ValueError(
            f"method='lsq' keeps a table of all pairs of the {' + '.join(map(str, sizes))} codewords, more than "
            f"{MAX_PAIRS:,}: use 'rq', or smaller codebooks."
        )


def sort_by_energy(codebooks: Sequence[np.ndarray], codes: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Orders joint codebooks for sequential encoding and for prefixes.

    LSQ's codebooks have no order. Here, of those of one size, the one that explains most variance comes first, and all
    codebooks but the first get mean zero over the codes (the first takes the sum of the means), so that a prefix is a
    sensible vector. The sum of the codewords, that is the reconstruction, stays the same.

    Args:
        codebooks: `(K_m, d)` each.
        codes: `(n, M)`, codes of typical vectors.

    Returns:
        The new codebooks, and the order: `new_codes = codes[:, order]`.
    """
    shares = [
        np.bincount(column, minlength=len(book)) / len(codes) for column, book in zip(codes.T, codebooks, strict=True)
    ]
    means = np.stack([share @ codebook for share, codebook in zip(shares, codebooks, strict=True)])
    centred = [codebook - mean for codebook, mean in zip(codebooks, means, strict=True)]
    energies = np.array(
        [share @ np.square(codebook).sum(axis=1) for share, codebook in zip(shares, centred, strict=True)]
    )
    sizes, order = np.array([len(codebook) for codebook in codebooks]), np.empty(len(codebooks), np.int64)
    for size in set(sizes):
        places = np.flatnonzero(sizes == size)
        order[places] = places[np.argsort(-energies[places], kind="stable")]
    ordered = [centred[place].astype(np.float32) for place in order]
    ordered[0] = (centred[order[0]] + means.sum(axis=0)).astype(np.float32)
    return ordered, order
