"""Shared steps of the converters: take tensors out of a state dict, fill a model, complain clearly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..configuration_rqmoe import RQMoEConfig
from ..modeling_rqmoe import RQMoEModel


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Lets what goes wrong in a conversion come to light as a ValueError that names the file.

    What a file of a stranger holds may be of any shape and type, and the converters look at it as if it were right.
    """
    try:
        yield
    except (RuntimeError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(
            f"{path} is damaged or of another format: {type(error).__name__}: {error}. Nothing was converted."
        ) from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be converted: {error}") from error


class StateReader:
    """Hands out the tensors of a foreign state dict and knows which were not asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor], origin: str):
        self.origin = origin
        if not all(isinstance(name, str) for name in tensors):
            raise ValueError(f"{origin} is damaged: the names of its tensors are no strings.")
        self.tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        self.unused = set(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> torch.Tensor:
        """The tensor `name` in float32; ValueError if it is missing."""
        if name not in self.tensors or not isinstance(self.tensors[name], torch.Tensor):
            found = ", ".join(sorted(self.tensors)[:5])
            raise ValueError(
                f"{self.origin} has no tensor {name!r} (it has {found}, ...): another format, or cut off."
            )
        self.unused.discard(name)
        return self.tensors[name].float()

    def count(self, pattern: str) -> int:
        """How many of `pattern` with {} = 0, 1, 2, ... exist in a row."""
        number = 0
        while any(name.startswith(pattern.format(number)) for name in self.tensors):
            number += 1
        return number

    def finish(self) -> None:
        """Raises ValueError if tensors are left that the conversion did not use."""
        if self.unused:
            raise ValueError(f"{self.origin} has tensors of an unknown variant: {', '.join(sorted(self.unused)[:5])}.")


def fill(config: RQMoEConfig, tensors: dict[str, torch.Tensor], mean: torch.Tensor | None, scale: float) -> RQMoEModel:
    """Builds a model of `config` with exactly these weights.

    Args:
        config: Its configuration.
        tensors: All parameters, by name.
        mean: `(hidden_size,)`, or None for zero.
        scale: What the foreign project divides its input by.

    Raises:
        ValueError: If the scale is no positive number, or a tensor has a wrong shape.
    """
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken or (mean is not None and not torch.isfinite(mean).all()):
        raise ValueError(f"The tensors hold NaN or infinity: {', '.join(broken) or 'mean'}.")
    model = RQMoEModel(config)
    state = {**tensors, "scale": torch.tensor(float(scale)), "mean": model.mean if mean is None else mean}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"The tensors do not fit together: {error}") from error
    return model.eval()
