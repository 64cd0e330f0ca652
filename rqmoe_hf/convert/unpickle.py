"""Reads PyTorch files of strangers without running what they contain."""

import collections
import pickle
import types
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Inert:
    """Stands in for a class of a foreign project: keeps the attributes that the file gives it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _number_dtype(name: str, align: bool = False, copy: bool = False) -> "_NumberType":
    return _NumberType(name)


class _NumberType(Inert):
    """Stands in for numpy.dtype, which must not be rebuilt from arbitrary state."""

    def __init__(self, name: str):
        if np.dtype(name).kind not in "fiub":
            raise pickle.UnpicklingError(f"numpy type {name} is no plain number")
        self.name = name


def _number(dtype: _NumberType, data: bytes) -> float | int:
    if isinstance(data, str):  # protocol 2 spells bytes as latin-1 text
        data = data.encode("latin-1")
    return np.frombuffer(data, dtype=dtype.name)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("numpy", "dtype"): _number_dtype,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
STORAGES = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Char", "Bool")


def load_pickle(path: Path, inert: Set[tuple[str, str]] = frozenset()) -> Any:
    """Loads a file of `torch.save`.

    Tensors, numbers, strings and plain containers come back as they are; instances of the classes in `inert` and of
    modules of `torch.nn` as [`Inert`] objects. Anything else that the file names is refused before it is touched.

    Args:
        path: The file.
        inert: (module, name) of foreign classes that may appear.

    Raises:
        ValueError: If the file is no PyTorch file, is cut off, or names anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")

    if _is_torchscript(path):
        raise ValueError(f"{path} was refused: it is a TorchScript archive, which holds code. It was not executed.")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in HARMLESS:
                return HARMLESS[module, name]
            if module == "torch" and name.removesuffix("Storage") in STORAGES:
                return getattr(torch, name)
            if (module, name) in inert or module.startswith("torch.nn.modules."):
                return type(name, (Inert,), {})
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a quantizer has no use for")

    def load(file: Any, **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()

    restricted = types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted_pickle")
    try:
        return torch.load(path, map_location="cpu", pickle_module=restricted, weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, AttributeError, ValueError,
            zipfile.BadZipFile, ImportError) as error:  # fmt: skip
        raise ValueError(f"{path} was refused or is damaged: {error}. Nothing in it was executed.") from error


def _is_torchscript(path: Path) -> bool:
    """Whether torch.load would hand the file on to torch.jit.load, which runs code of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def module_tensors(module: Inert, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of an unpickled `nn.Module` that came back inert."""
    tensors = {}
    for group in ("_parameters", "_buffers"):
        for name, tensor in module.__dict__.get(group, {}).items():
            if tensor is not None:
                tensors[prefix + name] = tensor.detach()
    for name, child in module.__dict__.get("_modules", {}).items():
        if isinstance(child, Inert):
            tensors |= module_tensors(child, f"{prefix}{name}.")
    return tensors
