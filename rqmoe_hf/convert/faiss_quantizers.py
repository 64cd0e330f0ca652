"""Faiss quantizers as additive members of the family."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ..configuration_rqmoe import RQMoEConfig
from ..limits_rqmoe import MAX_PAIRS
from ..local_search_rqmoe import LOCAL_SEARCH, LOCAL_SEARCH_BEAM
from ..modeling_rqmoe import RQMoEModel
from .faiss_header import check_header
from .state import fill, naming

WIDE_BEAM = 16  # for codebooks of LSQ that are too large for local search
_READING = threading.Lock()  # Faiss's limit holds for the whole process


def convert_faiss(source: "str | Path | faiss.Index") -> RQMoEModel:
    """Converts RQ, LSQ, PQ, or OPQ or another rotation followed by PQ.

    PQ's codebooks become whole vectors that are zero outside their block; a rotation is applied to the codewords. The
    packed codes of the result are those of the Faiss quantizer, byte for byte.

    Args:
        source: File of `faiss.write_index` or `faiss.write_ProductQuantizer`, or an index in memory.

    Returns:
        The model. PQ is encoded as by Faiss, and RQ, with the same beam. Codes of LSQ come from another local search
        over the same codebooks, the one that LSQ of this package is used with.

    Raises:
        ValueError: If the file is damaged or the quantizer is of another kind or untrained.
    """
    if isinstance(source, (faiss.Index, faiss.ProductQuantizer)):
        return _convert(source)
    path = Path(source)
    with naming(path):
        return _convert(_read(path))


def _convert(index: Any) -> RQMoEModel:
    """The model of an index in memory."""
    rotation, mean, owner = None, None, index  # which frees what it consists of when nobody holds it any more
    if isinstance(index, faiss.IndexPreTransform):
        rotation, mean = _rotation(index)
        index = faiss.downcast_index(owner.index)
    if isinstance(index, faiss.Index) and not index.is_trained:
        raise ValueError("The Faiss index is not trained: it has no codebooks yet.")
    if isinstance(index, (faiss.IndexResidualQuantizer, faiss.IndexLocalSearchQuantizer)):
        codebooks = _additive_codebooks(index.rq if isinstance(index, faiss.IndexResidualQuantizer) else index.lsq)
    elif isinstance(index, (faiss.IndexPQ, faiss.ProductQuantizer)):
        codebooks = _product_codebooks(index.pq if isinstance(index, faiss.IndexPQ) else index)
    else:
        raise ValueError(
            f"Cannot convert {type(index).__name__}: expected IndexResidualQuantizer, IndexLocalSearchQuantizer, "
            "IndexPQ, or IndexPreTransform (such as OPQ) before one of them."
        )
    if rotation is not None:
        codebooks = codebooks @ rotation
    steps, codewords, size = codebooks.shape
    search = _search(index, steps * codewords)
    config = RQMoEConfig.additive(hidden_size=size, num_codebooks=steps, codebook_size=codewords, **search)
    tensors = {"codebooks": torch.from_numpy(np.ascontiguousarray(codebooks, np.float32))}
    return fill(config, tensors, mean, 1.0)


def _search(index: Any, codewords: int) -> dict[str, int]:
    """The settings with which a quantizer of so many codewords is encoded as closely as by Faiss."""
    if isinstance(index, faiss.IndexResidualQuantizer):
        return {"beam_size": index.rq.max_beam_size}
    if not isinstance(index, faiss.IndexLocalSearchQuantizer):
        return {"beam_size": 1}  # blocks of a product quantizer do not depend on each other
    if codewords**2 > MAX_PAIRS:
        return {"beam_size": WIDE_BEAM}
    return {"beam_size": LOCAL_SEARCH_BEAM, "local_search": LOCAL_SEARCH}


def _read(path: Path) -> "faiss.Index | faiss.ProductQuantizer":
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        check_header(path)
    except ValueError as error:
        raise ValueError(f"{path} is no Faiss index and no ProductQuantizer, or is damaged: {error}.") from error
    errors = []
    with _no_vector_above(path.stat().st_size):
        for reader in (faiss.read_index, faiss.read_ProductQuantizer):  # type: ignore[attr-defined]
            try:
                return reader(str(path))
            except (RuntimeError, MemoryError) as error:
                errors.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ValueError(f"{path} is no Faiss index and no ProductQuantizer, or is damaged: {errors[0]}")


@contextmanager
def _no_vector_above(size: int) -> Iterator[None]:
    """Lets Faiss refuse what claims to be longer than the file, before it allocates that; older ones cannot."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    with _READING:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(size, 1))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def _rotation(index: Any) -> tuple[np.ndarray, torch.Tensor | None]:
    """The orthonormal matrix A of x -> A x + b, and the mean that b stands for."""
    if index.chain.size() != 1:
        raise ValueError(f"Cannot convert a chain of {index.chain.size()} transforms: expected one rotation.")
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    if not isinstance(transform, faiss.LinearTransform):
        raise ValueError(f"Cannot convert the transform {type(transform).__name__}: expected a rotation such as OPQ.")
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    if transform.d_out != transform.d_in or not np.allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-3):
        raise ValueError("Cannot convert a transform that is no rotation: it changes the dimension or distances.")
    if not transform.have_bias:
        return matrix, None
    return matrix, torch.from_numpy(-faiss.vector_to_array(transform.b) @ matrix)


def _additive_codebooks(quantizer: faiss.AdditiveQuantizer) -> np.ndarray:
    bits = {quantizer.nbits.at(step) for step in range(quantizer.M)}
    if len(bits) > 1:
        raise ValueError(f"Cannot convert codebooks of different sizes ({sorted(bits)} bits): they must be equal.")
    return faiss.vector_to_array(quantizer.codebooks).reshape(quantizer.M, 1 << bits.pop(), quantizer.d).copy()


def _product_codebooks(quantizer: faiss.ProductQuantizer) -> np.ndarray:
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(quantizer.M, quantizer.ksub, quantizer.dsub)
    codebooks = np.zeros((quantizer.M, quantizer.ksub, quantizer.d), np.float32)
    for block in range(quantizer.M):
        codebooks[block, :, block * quantizer.dsub : (block + 1) * quantizer.dsub] = centroids[block]
    return codebooks
