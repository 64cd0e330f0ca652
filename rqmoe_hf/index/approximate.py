"""A small network that decodes approximately what experts have made, to choose which codes are worth decoding.

Experts decode one step after the other. This network sees all codes of a vector at once, each as a vector of its own,
and takes about a twentieth of the operations. It is fitted to decoded codes, from the additive tables on, of whose
error it leaves about half. QINCo2 (arXiv 2501.03078) has tables for pairs of codes in this place, of which each holds
65,536 vectors for codebooks of 256; benchmarks/LEVERS.md compares them.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

WIDTH = 256
EPOCHS = 8
BATCH = 512
AT_ONCE = 1_024  # rows that are restored
LEARNING_RATE = 3e-3
HELD_OUT = 20  # one row of so many
LEAST_GAIN = 0.1  # of the squared error; otherwise it is not worth its time
MOST_CODEWORDS = 1 << 14  # of all codebooks; more would need more vectors to learn from
MOST_WIDTH = 1 << 12


class ApproximateDecoder(nn.Module):
    """Additive tables, and a network of two layers on the sum of another vector per code.

    Args:
        codewords: Of all codebooks.
        width: Of the hidden layers.
        size: Dimension of the vectors.
    """

    def __init__(self, codewords: int, width: int, size: int):
        super().__init__()
        self.tables = nn.EmbeddingBag(codewords, size, mode="sum")
        self.codes = nn.EmbeddingBag(codewords, width, mode="sum")
        self.bias = nn.Parameter(torch.zeros(width))
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, size)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """About what codes decode to.

        Args:
            rows: int64 `(n, codes)`, numbers of codewords in all codebooks.

        Returns:
            float32 `(n, size)`.
        """
        inner = F.relu(self.codes(rows) + self.bias)
        return self.tables(rows) + self.output(inner + F.relu(self.hidden(inner)))

    def restored(self, rows: torch.Tensor) -> np.ndarray:
        """As [`forward`], a few at a time, so that what lies between the layers stays in the processor's cache."""
        return torch.cat([self(some) for some in rows.split(AT_ONCE)]).numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """All weights by name."""
        return {name: tensor.detach().numpy() for name, tensor in self.state_dict().items()}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], codewords: int, size: int) -> "ApproximateDecoder":
        """The decoder with the weights of [`arrays`].

        Raises:
            ValueError: If they are none of a decoder for so many codewords and this dimension.
        """
        width = arrays["bias"].shape[0] if arrays.get("bias", np.empty(0)).ndim == 1 else 0
        if not 1 <= width <= MOST_WIDTH or any(array.dtype != np.float32 for array in arrays.values()):
            raise ValueError(f"its decoder has a width of {width}, or is of another type than it should")
        with torch.device("meta"):
            made = cls(codewords, width, size)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        if shapes != {name: array.shape for name, array in arrays.items()}:
            raise ValueError("the arrays of its decoder have other shapes than they should")
        made.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
        return made.requires_grad_(False)


def fit_decoder(
    rows: np.ndarray, vectors: np.ndarray, codewords: np.ndarray, seed: int = 0
) -> ApproximateDecoder | None:
    """A decoder that restores vectors from codes; None where the tables alone do nearly as well.

    Args:
        rows: Numbers of codewords, int64 `(n, codes)`.
        vectors: What the codes decode to, float32 `(n, size)`; brought to mean 0 and variance 1 in place.
        codewords: The tables of all codebooks, float32 `(t, size)`, that it begins with.
        seed: Of the weights and of the order of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = vectors.mean(axis=0)
    vectors -= mean
    scale = float(np.linalg.norm(vectors)) / vectors.size**0.5 or 1.0
    vectors /= scale
    made = _initialized(codewords / scale, mean / scale, generator)
    places, target, numbers = torch.from_numpy(rows), torch.from_numpy(vectors), torch.arange(len(rows))
    held, kept = numbers[numbers % HELD_OUT == 0], numbers[numbers % HELD_OUT != 0]
    before = _error(made, places[held], target[held])
    _train(made, places, target, kept, generator)
    if _error(made, places[held], target[held]) > (1 - LEAST_GAIN) * before:
        return None
    for weight in (made.tables.weight, made.output.weight, made.output.bias):
        weight.mul_(scale)
    made.output.bias.add_(torch.from_numpy(mean))
    return made


def _train(
    made: ApproximateDecoder, places: torch.Tensor, target: torch.Tensor, kept: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Trains it with the rows that are kept for that."""
    made.requires_grad_(True)
    steps = EPOCHS * -(-len(kept) // BATCH)
    optimizer = torch.optim.Adam(made.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    with torch.enable_grad(), tqdm(total=steps, desc="approximate decoder", unit="batch") as bar:
        for _ in range(EPOCHS):
            for batch in kept[torch.randperm(len(kept), generator=generator)].split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(made(places[batch]), target[batch]).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    made.requires_grad_(False)


def _error(made: ApproximateDecoder, places: torch.Tensor, target: torch.Tensor) -> float:
    """Sum of squared errors."""
    parts = zip(places.split(BATCH), target.split(BATCH), strict=True)
    return sum(F.mse_loss(made(codes), part, reduction="sum").item() for codes, part in parts)


def _initialized(codewords: np.ndarray, mean: np.ndarray, generator: torch.Generator) -> ApproximateDecoder:
    """A decoder that gives the sums of the tables, less the mean."""
    count, size = codewords.shape
    made = ApproximateDecoder(count, WIDTH, size).requires_grad_(False)
    given, shift = torch.from_numpy(codewords), torch.from_numpy(mean)
    mixed = torch.randn(size, WIDTH, generator=generator) / size**0.5
    made.tables.weight.copy_(given)
    made.codes.weight.copy_(given @ mixed)
    made.bias.copy_(-shift @ mixed)
    made.hidden.weight.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=generator)
    made.hidden.bias.zero_()
    made.output.weight.zero_()
    made.output.bias.copy_(-shift)
    return made
