"""Other methods that compress vectors, behind one interface, for comparisons at equal bytes.

    from rivals import RIVALS, build
    quantizer = build("LSQ", dimension=384, size=8)

Every method has the settings that its authors recommend; where a module departs from them, it says so. A method that
does not exist at a rate is None there. Codes never take more than the bytes asked for; `code_bits` is what they use.
"""

from collections.abc import Callable
from functools import partial

from .binary_codecs import itq, rabitq
from .faiss_codecs import equal_steps, local_search, mixed_steps, product, product_of_additive, residual
from .family import EXPERTS, FamilyMember, OursAdditive
from .interface import BestOf, Quantizer, Searcher
from .references import Binary, Float32, Int8
from .residual_vq import ResidualVQCodec
from .scalar_codecs import eden_one_bit, pca_scalar, rotated_scalar

Maker = Callable[[int, int], Quantizer | None]

RIVALS: dict[str, Maker] = {
    "PQ": product,
    "OPQ": lambda dimension, size: product(dimension, size, rotated=True),
    "RQ, beam 1": lambda dimension, size: residual(dimension, equal_steps(size, 8), 1),
    "RQ, beam 5": lambda dimension, size: residual(dimension, equal_steps(size, 8), 5),
    "RQ, beam 32": lambda dimension, size: residual(dimension, equal_steps(size, 8), 32),
    "RQ x10, beam 5": lambda dimension, size: residual(dimension, equal_steps(size, 10), 5),
    "RQ x12, beam 5": lambda dimension, size: residual(dimension, equal_steps(size, 12), 5),
    "RQ x12 and rest, beam 5": lambda dimension, size: residual(dimension, mixed_steps(size, 12), 5),
    "LSQ": lambda dimension, size: local_search(dimension, size, 8),
    "LSQ, 128 iterations": lambda dimension, size: local_search(dimension, size, 8, 128),
    "LSQ x9": lambda dimension, size: local_search(dimension, size, 9),
    "LSQ x10": lambda dimension, size: local_search(dimension, size, 10),
    "PRQ": lambda dimension, size: product_of_additive(dimension, size, "residual"),
    "PLSQ": lambda dimension, size: product_of_additive(dimension, size, "local_search"),
    "ITQ": itq,
    "RaBitQ (PCA)": rabitq,
    "TurboQuant (PCA)": lambda dimension, size: rotated_scalar(dimension, size, vector_scale=False),
    "EDEN, 1 bit (PCA)": eden_one_bit,
    "EDEN (PCA)": lambda dimension, size: rotated_scalar(dimension, size, vector_scale=True),
    "PCA + SQ": pca_scalar,
    "ResidualVQ": ResidualVQCodec,
}

# Our own quantizers stand apart: they are no rivals, but are trained like them, in the same run.
OURS: dict[str, Maker] = {
    f"ours, additive x{bits}": lambda dimension, size, bits=bits: OursAdditive(dimension, size, bits)
    for bits in (8, 9, 10, 11, 12)
}
OURS["ours, experts x8"] = partial(FamilyMember, EXPERTS)

REFERENCES: dict[str, Callable[[int], Quantizer]] = {"float32": Float32, "int8": Int8, "binary, rescored": Binary}


def build(method: str, dimension: int, size: int) -> Quantizer | None:
    """A new quantizer of a rival or a reference; None where it does not exist.

    Args:
        method: A key of `RIVALS`, `OURS` or `REFERENCES`.
        dimension: Of the vectors.
        size: Bytes per vector. References have bytes of their own and ignore it.
    """
    return REFERENCES[method](dimension) if method in REFERENCES else (RIVALS | OURS)[method](dimension, size)


__all__ = ["OURS", "REFERENCES", "RIVALS", "BestOf", "Quantizer", "Searcher", "build"]
