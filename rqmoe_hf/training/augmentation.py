"""Vectors that could have been in the training set: those that are there, moved as their neighbours differ.

Codebooks learn the noise of the vectors that they are fitted to. Fresh vectors in every round are the cure, and the
difference of two neighbours of a vector is a sample of how vectors differ in its surroundings.
"""

from functools import cached_property

import faiss
import numpy as np
import torch
from tqdm.auto import tqdm

NEIGHBORS = 30
EXHAUSTIVE = 32_768  # vectors up to which all are compared with all
LISTS, PROBES = 2.0, 16  # of an approximate search: lists in square roots of the vectors, and those that are read
POINTS_PER_LIST = 48  # that train the lists
BLOCK = 16_384  # vectors whose neighbours are looked for at a time
DISTANCES = 1 << 28  # computed at a time on a device
SHARE = 0.4  # of a device's free memory that vectors may take; more of them stay where they are
TINY = 1e-30  # what is divided by, at least


class NeighborJitter:
    """Draws vectors near given ones.

    A vector x becomes x + s * (a - b), with two random ones of its neighbours, and keeps its norm: embeddings of norm
    1 stay embeddings of norm 1.

    Args:
        vectors: float32 `(n, d)`, centred.
        center: float32 `(d,)` that was subtracted from the vectors, in their units; norms are those before. Default 0.
        neighbors: Among how many nearest neighbours the two are drawn. With less than two nothing is moved.
        show_progress_bar: Whether to show one while neighbours are looked for.
        device: Where neighbours are looked for and vectors are drawn.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        center: np.ndarray | None = None,
        neighbors: int = NEIGHBORS,
        show_progress_bar: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.device, self.show_progress_bar = torch.device(device), show_progress_bar
        self.vectors = torch.from_numpy(vectors)
        if self.device.type == "cuda" and vectors.nbytes < SHARE * torch.cuda.mem_get_info(self.device)[0]:
            self.vectors = self.vectors.to(self.device)
        center = np.zeros(vectors.shape[1]) if center is None else center
        self.center = torch.from_numpy(center.astype(np.float32)).to(self.device)
        self.count = min(neighbors, len(vectors) - 1)

    @cached_property
    def neighbors(self) -> np.ndarray:
        """Of each vector, int32 `(n, count)`; looked for when they are first needed."""
        if self.vectors.device.type == "cpu":
            return _others(_nearest(self.vectors.numpy(), self.count + 1, self.show_progress_bar))
        return _others(_nearest_on_device(self.vectors, self.count + 1, self.show_progress_bar))

    def draw(self, rows: np.ndarray, energy: float, generator: np.random.Generator) -> torch.Tensor:
        """New vectors near some of the given ones.

        Args:
            rows: Which ones, integers `(k,)`.
            energy: Mean square of how far they are moved, before norms are restored. It decides on s, which is 1 at
                most.
            generator: Of the random numbers.

        Returns:
            float32 `(k, d)` on the device, centred as the given ones.
        """
        given = self._take(rows)
        if self.count < 2 or energy <= 0:
            return given
        places = generator.integers(self.neighbors.shape[1], size=(2, len(rows)))
        first, second = (self._take(self.neighbors[rows, place]) for place in places)
        difference = first.sub_(second)
        largest = max(float(difference.square().sum(dim=1).mean()), TINY)
        given += self.center
        moved = difference.mul_(min(1.0, energy / largest) ** 0.5).add_(given)
        norms, moved_norms = (values.norm(dim=1, keepdim=True) for values in (given, moved))
        return moved.mul_(norms / moved_norms.clamp(min=TINY)).sub_(self.center)

    def _take(self, rows: np.ndarray) -> torch.Tensor:
        """A copy of some of the given vectors, on the device."""
        places = torch.from_numpy(rows.astype(np.int64)).to(self.vectors.device)
        return self.vectors.index_select(0, places).to(self.device)


def _others(found: np.ndarray) -> np.ndarray:
    """The nearest vectors without the vector itself, int32 `(n, count)` of `(n, count + 1)`."""
    own = np.arange(len(found))[:, None]
    # Where many vectors are equal, a vector itself may be missing, or come later; where lists are short, -1 fills up.
    places = np.argsort((found == own) | (found < 0), axis=1, kind="stable")[:, :-1]
    chosen = np.take_along_axis(found, places, axis=1)
    return np.where(chosen < 0, own, chosen).astype(np.int32)


def _nearest_on_device(vectors: torch.Tensor, count: int, show_progress_bar: bool) -> np.ndarray:
    """The nearest vectors of each vector, with itself, the nearest first: int64 `(n, count)`."""
    norms, step = vectors.square().sum(dim=1), max(1, DISTANCES // len(vectors))
    found = np.empty((len(vectors), count), np.int64)
    bar = tqdm(range(0, len(vectors), step), desc="neighbours", unit="block", disable=not show_progress_bar)
    for start in bar:
        part = slice(start, start + step)
        distances = torch.addmm(norms, vectors[part], vectors.T, alpha=-2)
        found[part] = distances.topk(count, largest=False).indices.cpu().numpy()
    return found


def _nearest(vectors: np.ndarray, count: int, show_progress_bar: bool) -> np.ndarray:
    """The nearest vectors of each vector, with itself as a rule, or -1: int64 `(n, count)`."""
    dimension = vectors.shape[1]
    vectors = np.ascontiguousarray(vectors, np.float32)
    if len(vectors) <= EXHAUSTIVE:
        index = faiss.index_factory(dimension, "Flat")
    else:
        lists = round(LISTS * len(vectors) ** 0.5)
        index = faiss.index_factory(dimension, f"IVF{lists},Flat")
        faiss.extract_index_ivf(index).nprobe = PROBES
        index.train(vectors[:: max(1, len(vectors) // (POINTS_PER_LIST * lists))])
    index.add(vectors)
    bar = tqdm(range(0, len(vectors), BLOCK), desc="neighbours", unit="block", disable=not show_progress_bar)
    return np.concatenate([index.search(vectors[start : start + BLOCK], count)[1] for start in bar])
