"""Reads PyTorch files of strangers without running what they contain."""

import collections
import math
import pickle
import pickletools
import struct
import tarfile
import types
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..limits_rqmoe import MAX_NUMBERS

MAX_OPCODES = 4_000_000  # of one pickle; a checkpoint has some for each tensor


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


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> torch.Tensor:
    """A tensor within its storage: torch would enlarge the storage to whatever the file claims."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and 0 <= number <= MAX_NUMBERS for number in numbers):
        raise pickle.UnpicklingError(f"a tensor has the shape {size} and strides {stride}")
    length = storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((rows - 1) * step for rows, step in zip(size, stride, strict=True))
    if math.prod(size) > length or (math.prod(size) and last >= length):
        raise pickle.UnpicklingError(f"a tensor of shape {size} does not fit into its {length} numbers")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *rest)


HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
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

    _check_archive(Path(path))
    length = Path(path).stat().st_size

    class Unpickler(pickle.Unpickler):
        def __init__(self, file: Any, **kwargs: Any):
            _check_opcodes(file)
            super().__init__(file, **kwargs)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "persistent_load":  # torch's, which allocates what the file claims
                super().__setattr__(name, lambda claimed: value(_checked_storage(claimed, length)))
            else:
                super().__setattr__(name, value)

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
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, LookupError, TypeError, AttributeError,
            ValueError, ArithmeticError, MemoryError, AssertionError, struct.error, zipfile.BadZipFile,
            ImportError) as error:  # fmt: skip
        raise ValueError(f"{path} was refused or is damaged: {error}. Nothing in it was executed.") from error


def _check_archive(path: Path) -> None:
    """Raises ValueError for archives that hold code, or that unpack to more than they are.

    torch.load would hand a TorchScript archive on to torch.jit.load, which runs code of the file.
    """
    if tarfile.is_tarfile(path):  # torch would unpack it beside other temporary files
        raise ValueError(f"{path} was refused: it is a tar archive, which torch.save has not written for years.")
    try:
        with zipfile.ZipFile(path) as archive:
            names, parts = archive.namelist(), archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return  # torch says what is wrong with it, or it is of the older kind, which is no archive
    if any(name.endswith("constants.pkl") for name in names):
        raise ValueError(f"{path} was refused: it is a TorchScript archive, which holds code. It was not executed.")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > path.stat().st_size
    ):
        raise ValueError(f"{path} was refused: its parts are compressed, or overlap, which torch.save never does.")


def _check_opcodes(file: Any) -> None:
    """Refuses a pickle whose numbers make the unpickler allocate more than the pickle has bytes."""
    start = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file), 1):
        if opcode.name in ("LONG_BINPUT", "BINPUT", "PUT") and int(argument or 0) > number:
            raise pickle.UnpicklingError(f"it keeps its value number {argument} after {number} operations")
        if number > MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} operations")
    file.seek(start)


def _checked_storage(claimed: Any, length: int) -> Any:
    """What a pickle says of a storage, if the file is long enough for it."""
    if isinstance(claimed, tuple) and claimed[:1] == ("module",):  # the name of a class, in files of the older kind
        return claimed
    count = claimed[4] if isinstance(claimed, tuple) and len(claimed) > 4 else None
    if type(count) is not int or not 0 <= count <= length:
        raise pickle.UnpicklingError(f"a storage has {count} numbers, and the file {length} bytes")
    return claimed


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
