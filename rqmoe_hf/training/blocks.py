"""Codebooks that are trained block by block, each block on what the earlier ones leave of the vectors."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ..local_search_rqmoe import PairTables, build_pair_tables, local_search
from .augmentation import NeighborJitter
from .lsq import BATCH, batch_rows, train_lsq

SEARCH_ROUNDS = 2  # for vectors that were moved a little, from the codes that they had before
ITERATIONS = 25  # of k-means
POINTS_PER_CENTROID = 256  # that k-means looks at, at most


@dataclass
class TrainedBlock:
    """Codebooks that are finished.

    Args:
        codebooks: float32 `(K_m, d)` each.
        codes: Of the training vectors, `(n, m)`.
        device: Where vectors are quantized with them.
    """

    codebooks: list[np.ndarray]
    codes: np.ndarray
    device: torch.device | str = "cpu"

    @cached_property
    def checksum(self) -> int:
        """Differs for different codebooks, so that a checkpoint is not continued on others."""
        return zlib.crc32(b"".join(book.tobytes() for book in self.codebooks))

    @cached_property
    def _books(self) -> list[torch.Tensor]:
        return [torch.from_numpy(codebook).to(self.device) for codebook in self.codebooks]

    @cached_property
    def _pairs(self) -> PairTables | None:
        """What the search needs; large, and of the last block never asked for."""
        return build_pair_tables(self._books) if len(self._books) > 1 else None

    def leave(self, rows: np.ndarray, vectors: torch.Tensor, number: int) -> torch.Tensor:
        """What the block leaves of training vectors, or of vectors near them, float32 `(k, d)`.

        Args:
            rows: Which training vectors, `(k,)`.
            vectors: Themselves or near ones, float32 `(k, d)`, on the device.
            number: Of the round; it decides how the local search goes about.
        """
        left, size = torch.empty_like(vectors), batch_rows(vectors.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            target = vectors[part]
            if self._pairs is None:
                restored = self._books[0][_nearest(target, self._books[0])]  # found anew: that is quick
            else:
                before = torch.from_numpy(self.codes[rows[part]].astype(np.int64)).to(vectors.device)
                restored = local_search(
                    target, before, self._pairs, SEARCH_ROUNDS, batch_invariant=False, first_round=number
                )[1]
            left[part] = target - restored
        return left


@dataclass
class Earlier:
    """The blocks before the one that is trained."""

    blocks: list[TrainedBlock]

    def leave(self, rows: np.ndarray, vectors: torch.Tensor, number: int) -> torch.Tensor:
        """See [`TrainedBlock.leave`]."""
        for block in self.blocks:
            vectors = block.leave(rows, vectors, number)
        return vectors

    @property
    def checksum(self) -> int:
        """Differs for different codebooks, so that a checkpoint is not continued on others."""
        return zlib.crc32(b"".join(block.checksum.to_bytes(4, "little") for block in self.blocks))


def train_blocks(
    vectors: np.ndarray,
    blocks: Sequence[Sequence[int]],
    source: NeighborJitter,
    checkpoint: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    prior: Sequence[TrainedBlock] | None = None,
    **settings: Any,
) -> list[TrainedBlock]:
    """Trains blocks of codebooks, one after the other.

    A block of several codebooks is trained by [`train_lsq`], one of a single codebook by k-means.

    Args:
        vectors: float32 `(n, d)`, centred.
        blocks: Codewords of each codebook of each block.
        source: Of vectors near them.
        checkpoint: File that each block's state is kept in, with the block's number in its name, and continued from.
            The caller deletes them (see [`checkpoints`]).
        seed: See [`train_lsq`].
        device: Where blocks are trained; k-means always is on the processor.
        prior: What each block is fine-tuned from; see [`train_lsq`]. A block of one codebook stays as it is.
        settings: Of [`train_lsq`].
    """
    done: list[TrainedBlock] = []
    for number, sizes in enumerate(blocks):
        earlier = Earlier(done)
        if len(sizes) == 1 and prior is not None:
            done.append(prior[number])
            continue
        if len(sizes) == 1:
            left = earlier.leave(np.arange(len(vectors)), torch.from_numpy(vectors).to(device), 0)
            done.append(_kmeans(left.cpu().numpy(), sizes[0], seed + number, device))
            continue
        file = None if checkpoint is None else checkpoint.with_stem(f"{checkpoint.stem}-{number}")
        known = settings | {"source": source, "earlier": earlier, "checkpoint": file, "device": device}
        known |= {"prior": None if prior is None else prior[number]}
        found = train_lsq(vectors, sizes, seed=seed + number, **known)
        done.append(TrainedBlock(*found, device))
    return done


def _kmeans(vectors: np.ndarray, size: int, seed: int, device: torch.device | str) -> TrainedBlock:
    settings = {"max_points_per_centroid": POINTS_PER_CENTROID, "min_points_per_centroid": 1}
    kmeans = faiss.Kmeans(vectors.shape[1], size, niter=ITERATIONS, seed=seed + 1, **settings)
    kmeans.train(vectors)
    codebook = np.asarray(kmeans.centroids).reshape(size, -1)
    parts = torch.from_numpy(vectors).split(BATCH)
    codes = torch.cat([_nearest(part, torch.from_numpy(codebook)) for part in parts]).numpy()
    return TrainedBlock([codebook], codes[:, None].astype(np.uint16), device)


def _nearest(target: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.addmm(codebook.square().sum(-1), target, codebook.T, alpha=-2).argmin(dim=1)


def checkpoints(checkpoint: Path) -> list[Path]:
    """The files that [`train_blocks`] has written."""
    return sorted(checkpoint.parent.glob(f"{checkpoint.stem}-*{checkpoint.suffix}"))
