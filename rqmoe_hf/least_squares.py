"""Codewords by least squares: given codes, the codebooks whose sums are closest to the vectors.

Shapes: n vectors of d dimensions, m codes of each, T codewords in all codebooks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

BATCH = 16_384  # vectors that are converted at a time
COLUMNS = 128  # dimensions that are improved at a time: each takes a number per vector
MAX_COLUMNS = 1 << 14  # equations that are solved: 2 GiB in double precision
WINDOW = 3  # rounds that are remembered where there are more equations


class RunningFit:
    """Least squares over several rounds of codes, of which older ones count less.

    Codes change from round to round, and so may the vectors, if they are drawn anew. A fit to one round learns the
    noise of its vectors; the sums of several rounds, which are all that the equations need, average it.

    Args:
        sizes: Codewords of each codebook.
        dimension: Of the vectors.
        dtype: Of the equations.
        device: Of the equations, and of what is added to them.

    Raises:
        ValueError: If the equations would not fit into memory.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dimension: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        total = sum(sizes)
        if total > MAX_COLUMNS:
            raise ValueError(f"Codebooks of {list(sizes)} make {total} equations, more than {MAX_COLUMNS}.")
        self.sizes, self.starts = list(sizes), starts_of(sizes)
        # How often codewords occur together (the lower triangle), and the sum of the vectors that have a codeword.
        self.gram = torch.zeros(total, total, dtype=dtype, device=device)
        self.sums = torch.zeros(total, dimension, dtype=dtype, device=device)

    def add(self, codes: torch.Tensor, vectors: torch.Tensor, keep: float = 1.0) -> None:
        """Takes a round in.

        Args:
            codes: int64 `(n, m)`.
            vectors: float32 `(n, d)`, centred.
            keep: Weight of all that was added before.
        """
        if keep != 1:
            self.gram *= keep
            self.sums *= keep
        for step, size in enumerate(self.sizes):
            for other in range(step + 1):
                here = slice(self.starts[step], self.starts[step] + size)
                there = slice(self.starts[other], self.starts[other] + self.sizes[other])
                self.gram[here, there] += _counts_of_pairs(codes[:, step], codes[:, other], size, self.sizes[other])
        rows = codes + torch.from_numpy(self.starts).to(codes.device)
        for start in range(0, len(rows), BATCH):
            batch = vectors[start : start + BATCH].to(self.sums.dtype)
            for column in rows[start : start + BATCH].T:
                self.sums.index_add_(0, column, batch)

    def solve(self, ridge: float) -> torch.Tensor:
        """The codewords, float32 `(T, d)`.

        Args:
            ridge: Weight of the squared entries, in units of vectors.
        """
        matrix = self.gram.clone()
        matrix.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(matrix)  # reads the lower triangle only
        del matrix
        return torch.cholesky_solve(self.sums, factor).float()

    def state(self) -> dict[str, np.ndarray]:
        """What it has taken in, to be restored from."""
        return {"gram": self.gram.cpu().numpy(), "sums": self.sums.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from a state."""
        device = self.sums.device
        self.gram, self.sums = (torch.from_numpy(state[name]).to(device) for name in ("gram", "sums"))


class RecentFit:
    """Like [`RunningFit`], for any number of codewords: remembers the last few rounds, and improves codewords.

    Args:
        sizes: Codewords of each codebook.
        dimension: Of the vectors.
        device: Of the codewords, and of what is added.
    """

    def __init__(self, sizes: Sequence[int], dimension: int, device: torch.device | str = "cpu"):
        self.sizes = list(sizes)
        self.codewords = torch.zeros(sum(sizes), dimension, device=device)
        self.rounds: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # codes, vectors and their weight

    def add(self, codes: torch.Tensor, vectors: torch.Tensor, keep: float = 1.0) -> None:
        """See [`RunningFit.add`]."""
        older = [(old, seen, weight * keep) for old, seen, weight in self.rounds[1 - WINDOW :]]
        self.rounds = [*older, (codes, vectors, 1.0)]

    def solve(self, ridge: float) -> torch.Tensor:
        """Codewords that are closer to those of [`RunningFit.solve`] than the last ones were."""
        codes, vectors = self._all()
        weights = torch.cat([torch.full_like(seen[:, 0], weight) for _, seen, weight in self.rounds])
        self.codewords = improve_codewords(self.codewords, codes, vectors, self.sizes, ridge, weights=weights)
        return self.codewords

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([codes for codes, _, _ in self.rounds]), torch.cat([vectors for _, vectors, _ in self.rounds])

    def state(self) -> dict[str, np.ndarray]:
        """See [`RunningFit.state`]."""
        codes, vectors = (part.cpu().numpy() for part in self._all())
        lengths, weights = [len(codes) for codes, *_ in self.rounds], [weight for *_, weight in self.rounds]
        parts = {"codes": codes.astype(np.uint16), "vectors": vectors}
        parts |= {"lengths": np.array(lengths), "weights": np.array(weights)}
        return parts | {"codewords": self.codewords.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See [`RunningFit.restore`]."""
        device, ends = self.codewords.device, np.cumsum(state["lengths"])[:-1]
        codes = [torch.from_numpy(part.astype(np.int64)).to(device) for part in np.split(state["codes"], ends)]
        vectors = [torch.from_numpy(part).to(device) for part in np.split(state["vectors"], ends)]
        self.rounds = list(zip(codes, vectors, state["weights"].tolist(), strict=True))
        self.codewords = torch.from_numpy(state["codewords"]).to(device)


def solve_codewords(codes: np.ndarray, vectors: np.ndarray, sizes: Sequence[int], ridge: float) -> np.ndarray:
    """Least squares for the codewords of all steps, one step after the other: float32 `(T, d)`.

    Args:
        codes: Integers `(n, m)`.
        vectors: float32 `(n, d)`, centred.
        sizes: Codebook size of each step.
        ridge: Weight of the squared entries, in units of vectors.

    Raises:
        ValueError: If the equations would not fit into memory.
    """
    fit = RunningFit(sizes, vectors.shape[1])
    fit.add(torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(vectors))
    return fit.solve(ridge).numpy()


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    """Row at which the codewords of each step begin."""
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def _counts_of_pairs(first: torch.Tensor, second: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """How often two codewords of two steps occur together, int64 `(rows, columns)`."""
    return torch.bincount(first * columns + second, minlength=rows * columns).view(rows, columns)


def improve_codewords(
    codewords: torch.Tensor,
    codes: torch.Tensor,
    vectors: torch.Tensor,
    sizes: Sequence[int],
    ridge: float,
    iterations: int = 12,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Steps towards the codewords of [`solve_codewords`], for codebooks that are too large to solve for.

    Conjugate gradients on the normal equations, preconditioned by how often each codeword occurs. They never form the
    equations: a step costs two passes over the vectors. The dimensions do not depend on each other, so a block of them
    is improved at a time. From codewords that fitted similar codes a dozen steps are enough.

    Args:
        codewords: float32 `(sum of sizes, d)`, where to start.
        codes: int64 `(n, m)`.
        vectors: float32 `(n, d)`, centred.
        sizes: Codebook size of each step.
        ridge: Weight of the squared entries, in units of vectors.
        iterations: Steps.
        weights: float32 `(n,)`, of the vectors; default 1.

    Returns:
        float32 `(sum of sizes, d)`.
    """
    rows = codes + torch.from_numpy(starts_of(sizes)).to(codes.device)
    counts = torch.bincount(rows.flatten(), minlength=len(codewords))
    owners = rows.T.flatten().argsort(stable=True) % len(rows)  # the vectors that have each codeword
    begins = counts.cumsum(0) - counts
    share = torch.ones_like(vectors[:, :1]) if weights is None else weights[:, None]

    def restore(values: torch.Tensor) -> torch.Tensor:  # B values
        return F.embedding_bag(rows, values, mode="sum")

    def collect(values: torch.Tensor) -> torch.Tensor:  # B^T W values
        return F.embedding_bag(owners, share * values, begins, mode="sum")

    scales = collect(torch.ones_like(share)) + ridge
    improved = torch.empty_like(codewords)
    for start in range(0, codewords.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        current, target = (values[:, block].clone() for values in (codewords, vectors))
        residual = collect(target - restore(current)) - ridge * current
        scaled = residual / scales
        direction, size = scaled.clone(), (residual * scaled).sum(dim=0)
        for _ in range(iterations):
            image = collect(restore(direction)) + ridge * direction
            length = size / (direction * image).sum(dim=0).clamp(min=1e-30)
            current += length * direction
            residual -= length * image
            scaled = residual / scales
            before, size = size, (residual * scaled).sum(dim=0)
            direction = scaled + (size / before.clamp(min=1e-30)) * direction
        improved[:, block] = current
    return improved
