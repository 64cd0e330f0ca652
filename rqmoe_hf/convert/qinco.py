"""QINCo v1 (arXiv 2401.14732): its first files, pickled modules, and its newer plain dictionaries."""

from pathlib import Path

import torch

from ..configuration_rqmoe import RQMoEConfig
from ..modeling_rqmoe import RQMoEModel
from .state import StateReader, fill, naming
from .unpickle import Inert, load_pickle, module_tensors

CLASSES = {("model_qinco", name) for name in ("QINCo", "QINCoStep", "IVFQINCo", "QINCoLR", "PQ_QINCo")}


def convert_qinco(path: str | Path) -> RQMoEModel:
    """Converts a QINCo v1 file, in either layout.

    The weights of QINCo's authors are CC-BY-NC 4.0: a conversion of them stays under that licence.

    Args:
        path: The .pt file.

    Returns:
        The model, in the units of the training embeddings.

    Raises:
        ValueError: If the file is damaged, hostile, or holds a variant outside the family (IVF, LR, PQ, QINCo2).
    """
    content = load_pickle(Path(path), CLASSES)
    with naming(path):
        if isinstance(content, Inert):
            return _convert_module(content, str(path))
        if isinstance(content, dict) and "model" in content and "parameters" in content:
            return _convert_dictionary(content, str(path))
    raise ValueError(f"{path} holds neither a QINCo module nor a dictionary with 'model' and 'parameters'.")


def _convert_module(module: Inert, origin: str) -> RQMoEModel:
    variant = type(module).__name__
    if variant != "QINCo":
        raise ValueError(f"{origin} holds {variant}; only QINCo itself can be converted.")
    if not isinstance(getattr(module, "db_scale", None), (int, float, torch.Tensor)):
        raise ValueError(f"{origin} has no db_scale: it was never trained, or is another version.")
    reader = StateReader(module_tensors(module), origin)
    steps = 1
    while f"step{steps}.codebook.weight" in reader:
        steps += 1
    first = reader.take("codebook0.weight")
    indices = range(1, steps)
    layers = reader.count("step1.residual_block{}.")
    codebooks = torch.stack([first] + [reader.take(f"step{m}.codebook.weight") for m in indices])
    blocks = "step{}.residual_block{}.{}.weight"
    return _build(
        reader,
        codebooks,
        torch.stack([reader.take(f"step{m}.MLPconcat.weight") for m in indices]),
        torch.stack([reader.take(f"step{m}.MLPconcat.bias") for m in indices]),
        _layer_weights(reader, blocks, indices, layers, "0"),
        _layer_weights(reader, blocks, indices, layers, "2"),
        None,
        float(module.__dict__["db_scale"]),
    )


def _convert_dictionary(content: dict, origin: str) -> RQMoEModel:
    parameters = content["parameters"]
    if not parameters.get("qinco1_mode") or parameters.get("ivf_in_use"):
        raise ValueError(f"{origin} holds QINCo2 or an inverted-file variant; only QINCo v1 is in the family.")
    reader = StateReader(content["model"], origin)
    mean, scale = reader.take("data_mean"), float(reader.take("data_std"))
    steps = reader.count("steps.{}.")
    layers = reader.count("steps.1.residual_blocks.{}.")
    indices = range(1, steps)
    codebooks = torch.stack([reader.take(f"steps.{m}.codebook.weight") for m in range(steps)])
    ignored = ("xtarget_mean", "xtarget_var")  # statistics for the re-initialisation of unused codewords
    reader.unused -= {name for name in reader.unused if name.endswith(ignored)}
    blocks = "steps.{}.residual_blocks.{}.{}.weight"
    return _build(
        reader,
        codebooks,
        torch.stack([reader.take(f"steps.{m}.concat.mlp.weight") for m in indices]),
        torch.stack([reader.take(f"steps.{m}.concat.mlp.bias") for m in indices]),
        _layer_weights(reader, blocks, indices, layers, "up_proj"),
        _layer_weights(reader, blocks, indices, layers, "down_proj"),
        mean,
        scale,
    )


def _layer_weights(reader: StateReader, pattern: str, indices: range, layers: int, part: str) -> torch.Tensor:
    return torch.stack(
        [torch.stack([reader.take(pattern.format(m, layer, part)) for layer in range(layers)]) for m in indices]
    )[:, :, None]


def _build(
    reader: StateReader,
    codebooks: torch.Tensor,
    concat: torch.Tensor,
    bias: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    mean: torch.Tensor | None,
    scale: float,
) -> RQMoEModel:
    reader.finish()
    steps, codewords, size = codebooks.shape
    config = RQMoEConfig.qinco(
        hidden_size=size,
        num_codebooks=steps,
        codebook_size=codewords,
        num_expert_layers=up.shape[1],
        intermediate_size=up.shape[3],
    )
    tensors = {
        "codebooks": codebooks,
        # QINCo adds the codeword after its concat layer; here that is part of the codeword's projection.
        "experts.codeword_proj": concat[..., :size] + torch.eye(size),
        "experts.condition_proj": concat[..., size:],
        "experts.bias": bias,
        "experts.up_proj": up,
        "experts.down_proj": down,
        "experts.output_scale": torch.ones(steps - 1, size),
    }
    return fill(config, tensors, mean, scale)
