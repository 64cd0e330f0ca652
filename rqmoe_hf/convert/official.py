"""The RQ-MoE authors' `model.pt` and `checkpoint.pt`."""

from pathlib import Path
from typing import Any

import torch

from ..configuration_rqmoe import RQMoEConfig
from ..modeling_rqmoe import RQMoEModel
from .state import StateReader, fill, naming
from .unpickle import load_pickle

SCHEDULERS = {("utils", "Scheduler"), ("__main__", "Scheduler")}  # checkpoint.pt pickles one beside the weights


def convert_official(path: str | Path, scale: float) -> RQMoEModel:
    """Converts a file of the official code.

    Args:
        path: `model.pt` or `checkpoint.pt`.
        scale: What the training embeddings were divided by: the largest value of the training set. The file lacks it.

    Returns:
        The model, in the units of the training embeddings.

    Raises:
        ValueError: If the file is damaged, hostile or of another format.
    """
    content = load_pickle(Path(path), SCHEDULERS)
    with naming(path):
        return _convert(content, path, scale)


def _convert(content: Any, path: str | Path, scale: float) -> RQMoEModel:
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path} is no file of the official RQ-MoE code: it has no 'state_dict'.")
    reader = StateReader(content["state_dict"], str(path))
    steps = 1 + _steps_from_one(reader)
    experts, layers = reader.count("step1.expert{}."), reader.count("step1.expert0.{}.")
    if steps < 2 or not experts:
        raise ValueError(f"{path} is no file of the official RQ-MoE code: it has no step1.expert0.")
    indices = range(1, steps)
    first = reader.take("codebook0.weight")
    tensors = {
        "codebooks": torch.stack([first] + [reader.take(f"step{m}.codebook.weight") for m in indices]),
        "instructions": torch.stack(
            [reader.take("instruction0.weight")] + [reader.take(f"step{m}.instruction.weight") for m in indices[:-1]]
        ),
    }
    reader.unused.discard(f"step{steps - 1}.instruction.weight")  # the last instructions influence nothing
    size = first.shape[1]
    concat = torch.stack([reader.take(f"step{m}.MLPconcat.weight") for m in indices])  # [codeword | instruction]
    tensors |= {
        "experts.codeword_proj": concat[..., :size],
        "experts.condition_proj": concat[..., size:],
        "experts.bias": torch.stack([reader.take(f"step{m}.MLPconcat.bias") for m in indices]),
        "experts.gate_up_proj": torch.stack([reader.take(f"step{m}.gate.0.weight") for m in indices]),
        "experts.gate_proj": torch.stack([reader.take(f"step{m}.gate.3.weight") for m in indices]),
        "experts.up_proj": _expert_weights(reader, indices, layers, experts, 0),
        "experts.down_proj": _expert_weights(reader, indices, layers, experts, 3),
        "experts.output_scale": torch.ones(steps - 1, size),
    }
    reader.finish()
    config = RQMoEConfig.official(
        hidden_size=size,
        num_codebooks=steps,
        codebook_size=len(first),
        num_experts=experts,
        num_expert_layers=layers,
        intermediate_size=tensors["experts.up_proj"].shape[3],
    )
    return fill(config, tensors, None, scale)


def _steps_from_one(reader: StateReader) -> int:
    number = 1
    while f"step{number}.codebook.weight" in reader:
        number += 1
    return number - 1


def _expert_weights(reader: StateReader, indices: range, layers: int, experts: int, part: int) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([reader.take(f"step{m}.expert{n}.{layer}.{part}.weight") for n in range(experts)])
                    for layer in range(layers)
                ]
            )
            for m in indices
        ]
    )
