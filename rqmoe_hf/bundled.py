"""The quantizers that come with the package."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .modeling_rqmoe import RQMoEModel
from .saving import weights_checksum


def bundled_quantizers() -> dict[str, Path]:
    """Names and folders of the quantizers that need no download; `RQMoEModel.from_pretrained(folder)` loads one."""
    package = Path(__file__).parent
    for root in (package / "model_cards", package.parent / "model_cards"):  # in a wheel; in a checkout
        if root.is_dir():
            return {file.parent.name: file.parent for file in sorted(root.glob("*/config.json"))}
    return {}


def bundled_name(source: str | None) -> str | None:
    """The name of the bundled quantizer in a folder; None if it is none of them."""
    return next((name for name, folder in bundled_quantizers().items() if str(folder) == source), None)


def quantizer_source(name: str) -> str:
    """The folder or Hub id behind a bundled name, a folder or a Hub id.

    Raises:
        ValueError: If it can be none of them.
    """
    bundled = bundled_quantizers()
    folder = Path(name)
    if name not in bundled and not folder.is_dir() and ("/" not in name or folder.is_absolute()):
        raise ValueError(
            f"There is no quantizer {name!r}: expected a folder, a Hub id such as org/name, or one of the bundled "
            f"quantizers ({', '.join(bundled) or 'none here'})."
        )
    if name not in bundled and folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"The folder {name} holds no quantizer: it has no config.json.")
    return str(bundled.get(name, name))


def load_quantizer(
    name: str | os.PathLike, dtype: str = "float32", revision: str | None = None, **config: Any
) -> RQMoEModel:
    """Loads a quantizer by its bundled name, its folder or its Hub id.

    Args:
        name: For example "minilm-384-32-bytes", "runs/mine", a `Path` or "org/name".
        dtype: Of the experts' arithmetic: "float32", or "bfloat16" where the processor or the GPU has it.
        revision: Branch, tag or commit on the Hub.
        config: Settings of its config to replace, such as `beam_size`.

    Raises:
        ValueError: If there is no such quantizer or dtype.
    """
    kind, source = named_dtype(dtype, ("float32", "bfloat16")), quantizer_source(os.fspath(name))
    settings: dict[str, Any] = {"revision": revision or "main", **config}
    model = RQMoEModel.from_pretrained(source, dtype=torch.float32, **settings)
    if kind != torch.float32:
        stored = weights_checksum(model)
        model = RQMoEModel.from_pretrained(source, dtype=kind, **settings)
        model.cast_from = (weights_checksum(model), stored)
    return model.eval()


def named_dtype(name: str, allowed: Sequence[str]) -> torch.dtype:
    """The dtype of a name; raises ValueError unless it is one of those allowed."""
    if name not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(allowed)}, got {name!r}.")
    return getattr(torch, name)
