"""Vectors that could have been in the training set: those that are there, moved as their neighbours differ.

Codebooks learn the noise of the vectors that they are fitted to. Fresh vectors in every round are the cure, and the
difference of two neighbours of a vector is a sample of how vectors differ in its surroundings.
"""

from functools import cached_property

import faiss
import numpy as np
from tqdm.auto import tqdm

NEIGHBORS = 30
EXHAUSTIVE = 32_768  # vectors up to which all are compared with all
LISTS, PROBES = 2.0, 16  # of an approximate search: lists in square roots of the vectors, and those that are read
POINTS_PER_LIST = 48  # that train the lists
BLOCK = 16_384  # vectors whose neighbours are looked for at a time
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
    """

    def __init__(
        self,
        vectors: np.ndarray,
        center: np.ndarray | None = None,
        neighbors: int = NEIGHBORS,
        show_progress_bar: bool = False,
    ):
        self.vectors, self.show_progress_bar = vectors, show_progress_bar
        self.center = np.zeros(vectors.shape[1], np.float32) if center is None else center.astype(np.float32)
        self.count = min(neighbors, len(vectors) - 1)

    @cached_property
    def neighbors(self) -> np.ndarray:
        """Of each vector, int32 `(n, count)`; looked for when they are first needed."""
        return _nearest(self.vectors, self.count, self.show_progress_bar)

    def draw(self, rows: np.ndarray, energy: float, generator: np.random.Generator) -> np.ndarray:
        """New vectors near some of the given ones.

        Args:
            rows: Which ones, integers `(k,)`.
            energy: Mean square of how far they are moved, before norms are restored. It decides on s, which is 1 at
                most.
            generator: Of the random numbers.

        Returns:
            float32 `(k, d)`, centred as the given ones.
        """
        given = self.vectors[rows]
        if self.count < 2 or energy <= 0:
            return given
        places = generator.integers(self.neighbors.shape[1], size=(2, len(rows)))
        first, second = (self.vectors[self.neighbors[rows, place]] for place in places)
        difference = first - second
        largest = max(float(np.square(difference).sum(axis=1).mean()), TINY)
        given = given + self.center
        moved = given + np.float32(min(1.0, energy / largest) ** 0.5) * difference
        norms, moved_norms = (np.linalg.norm(array, axis=1, keepdims=True) for array in (given, moved))
        return moved * (norms / np.maximum(moved_norms, TINY)) - self.center


def _nearest(vectors: np.ndarray, count: int, show_progress_bar: bool) -> np.ndarray:
    """Neighbours of each vector, the nearest first, without itself: int32 `(n, count)`."""
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
    found = np.concatenate([index.search(vectors[start : start + BLOCK], count + 1)[1] for start in bar])
    own = np.arange(len(vectors))[:, None]
    # Where many vectors are equal, a vector itself may be missing, or come later; where lists are short, -1 fills up.
    others = np.argsort((found == own) | (found < 0), axis=1, kind="stable")[:, :count]
    chosen = np.take_along_axis(found, others, axis=1)
    return np.where(chosen < 0, own, chosen).astype(np.int32)
