"""Fine-tuning of codebooks that were optimised together, without gradients: least squares that stay near them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..blocks_rqmoe import blocks_of
from ..codes import sizes_of, unpack_codes
from ..modeling_rqmoe import RQMoEModel
from .augmentation import NeighborJitter
from .blocks import TrainedBlock, train_blocks
from .initialization import standardize

ROUNDS = 10
OLDER = 0.7  # weight of all older rounds in the fit to the next


@torch.no_grad()
def adapt(
    model: RQMoEModel,
    embeddings: np.ndarray,
    sample_size: int = 65_536,
    seed: int = 0,
    checkpoint: Path | None = None,
    show_progress_bar: bool = True,
) -> RQMoEModel:
    """Moves an additive quantizer's mean and codebooks towards other embeddings, in place.

    A codeword goes the further the more of the vectors have it. One that none has stays where it is, so a few thousand
    vectors do for a quantizer that was trained on many. The fit is the posterior mean of codewords that are Gaussian
    around what they were; see `prior` of [`train_lsq`].

    Args:
        model: Additive, initialised.
        embeddings: Floating point `(n, hidden_size)`.
        sample_size: Vectors that a round sees, at most.
        seed: Of what the vectors are moved by.
        checkpoint: See [`train_blocks`].
        show_progress_bar: Whether to show one.

    Returns:
        The model.
    """
    config = model.config
    sizes = sizes_of(config.num_codebooks, config.code_sizes)
    packed = model.compress(embeddings, show_progress_bar=show_progress_bar)
    codes = unpack_codes(packed, config.num_codebooks, config.code_sizes)
    model.mean += torch.from_numpy(_mean_error(model, embeddings, packed)).to(model.mean)
    mean, scale = (statistic.float().cpu().numpy() for statistic in (model.mean, model.scale))
    vectors, device = standardize(embeddings, mean, scale), model.codebooks.device
    source = NeighborJitter(vectors, mean / scale, show_progress_bar=show_progress_bar, device=device)
    blocks, prior = blocks_of(config, config.num_codebooks), []
    for block in blocks:
        books = [model.codebooks[step, : sizes[step]].float().cpu().numpy() for step in range(block.start, block.stop)]
        prior.append(TrainedBlock(books, codes[:, block], device))
    settings: dict[str, Any] = {"rounds": 0, "final_rounds": ROUNDS, "keep": (OLDER, OLDER), "batch_size": sample_size}
    settings |= {"device": device, "show_progress_bar": show_progress_bar}
    found = train_blocks(
        vectors, [sizes[block] for block in blocks], source, checkpoint, seed, prior=prior, **settings
    )
    for step, codebook in enumerate(book for block in found for book in block.codebooks):
        model.codebooks[step, : sizes[step]] = torch.from_numpy(codebook)
    return model


def _mean_error(model: RQMoEModel, embeddings: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mean of what the reconstructions leave of embeddings, `(d,)`."""
    total, rows = np.zeros(embeddings.shape[1]), 16_384
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        total += (embeddings[part] - model.decompress(codes[part], show_progress_bar=False)).sum(axis=0)
    return total / len(codes)
