"""What the sums of tables lack of what codes decode to, restored approximately by a small network.

Experts decode one step after the other. This network sees all codes of a vector at once, each as a vector of its own,
and takes about a twentieth of the operations. It is fitted to decoded codes, and chooses those of a long shortlist
that are worth decoding. QINCo2 (arXiv 2501.03078) has tables for pairs of codes in this place, of which each holds
65,536 vectors for codebooks of 256; benchmarks/LEVERS.md compares them.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

WIDTH = 256
EPOCHS = 6
BATCH = 512
LEARNING_RATE = 3e-3
HELD_OUT = 20  # one row of so many
LEAST_GAIN = 0.1  # of the squared error; otherwise it is not worth its time
MOST_CODEWORDS = 1 << 14  # of all codebooks; more would need more vectors to learn from
MOST_WIDTH = 1 << 12


class Correction(nn.Module):
    """A network of two layers on the sum of one vector per code.

    Args:
        codewords: Of all codebooks.
        width: Of the hidden layers.
        size: Dimension of the vectors.
    """

    def __init__(self, codewords: int, width: int, size: int):
        super().__init__()
        self.codes = nn.EmbeddingBag(codewords, width, mode="sum")
        self.bias = nn.Parameter(torch.zeros(width))
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, size)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """What is to be added to the sums.

        Args:
            rows: int64 `(n, codes)`, numbers of codewords in all codebooks.

        Returns:
            float32 `(n, size)`.
        """
        inner = F.relu(self.codes(rows) + self.bias)
        return self.output(inner + F.relu(self.hidden(inner)))

    def arrays(self) -> dict[str, np.ndarray]:
        """All weights by name."""
        return {name: tensor.detach().numpy() for name, tensor in self.state_dict().items()}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], codewords: int, size: int) -> "Correction":
        """The network with the weights of [`arrays`].

        Raises:
            ValueError: If they are none of a network for so many codewords and this dimension.
        """
        width = arrays["bias"].shape[0] if arrays.get("bias", np.empty(0)).ndim == 1 else 0
        if not 1 <= width <= MOST_WIDTH or any(array.dtype != np.float32 for array in arrays.values()):
            raise ValueError(f"its correction has a width of {width}, or is of another type than it should")
        with torch.device("meta"):
            made = cls(codewords, width, size)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        if shapes != {name: array.shape for name, array in arrays.items()}:
            raise ValueError("the arrays of its correction have other shapes than they should")
        made.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
        return made.requires_grad_(False)


def fit_correction(rows: np.ndarray, missing: np.ndarray, codewords: np.ndarray, seed: int = 0) -> Correction | None:
    """A network that restores what is missing; None where it would restore too little of it.

    Args:
        rows: Numbers of codewords, int64 `(n, codes)`.
        missing: What the codewords' sums lack, float32 `(n, size)`; scaled in place.
        codewords: Of all codebooks, float32 `(t, size)`: codes begin as what a random matrix makes of theirs.
        seed: Of the weights and of the order of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = float(np.sqrt(np.mean(np.square(missing[:BATCH])))) or 1.0
    missing /= scale
    made = _initialized(codewords / scale, generator)
    places, target = torch.from_numpy(rows), torch.from_numpy(missing)
    held, kept = torch.arange(0, len(rows), HELD_OUT), torch.arange(len(rows))
    kept = kept[kept % HELD_OUT != 0]
    steps = EPOCHS * -(-len(kept) // BATCH)
    optimizer = torch.optim.Adam(made.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    with tqdm(total=steps, desc="correction", unit="batch") as bar:
        for _ in range(EPOCHS):
            for batch in kept[torch.randperm(len(kept), generator=generator)].split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(made(places[batch]), target[batch]).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    made.requires_grad_(False)
    left = sum(F.mse_loss(made(places[part]), target[part], reduction="sum") for part in held.split(BATCH))
    if left > (1 - LEAST_GAIN) * target[held].square().sum():
        return None
    made.output.weight.mul_(scale)
    made.output.bias.mul_(scale)
    return made


def _initialized(codewords: np.ndarray, generator: torch.Generator) -> Correction:
    """A network that adds nothing yet."""
    count, size = codewords.shape
    made = Correction(count, WIDTH, size)
    with torch.no_grad():
        mixed = torch.randn(size, WIDTH, generator=generator) / size**0.5
        made.codes.weight.copy_(torch.from_numpy(codewords) @ mixed)
        bound = WIDTH**-0.5
        made.hidden.weight.uniform_(-bound, bound, generator=generator)
        made.hidden.bias.zero_()
        made.output.weight.zero_()
        made.output.bias.zero_()
    return made
