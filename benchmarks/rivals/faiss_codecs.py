"""Product, residual and local-search quantizers of Faiss, with its defaults unless a comment says otherwise.

A Faiss that was built for GPUs finds the nearest codewords of residual quantizers and the codes of local-search ones
on the first of them: the same algorithms, with other random numbers in the local search. Codebooks of the latter are
fitted on the processor.
"""

from collections.abc import Sequence

import faiss
import numpy as np

from .interface import contiguous

# Faiss trains on 256 vectors per codeword, 65,536 for 8 bits; here on four times more.
POINTS_PER_CODEWORD = 1_024
# Faiss's default. Wider beams pay when encoding, and training keeps all entries of the beam in memory.
TRAINING_BEAM = 5
# k-means of so many codewords takes minutes for each vector of the beam: on the best entry alone.
LARGE_CODEBOOK_BITS = 12
LSQ_ITERATIONS = 16  # Faiss's default


class FaissCodec:
    """Any trained-and-encoding Faiss index: `sa_encode` and `sa_decode` are its codes.

    Args:
        index: An untrained index.
        code_bits: Bits that the codes use, which Faiss rounds up to bytes.
        codebook_floats: Numbers in codebooks and transforms, 4 bytes each.
    """

    def __init__(self, index: faiss.Index, code_bits: int, codebook_floats: int):
        self.index = index
        self.code_bits = code_bits
        self.codebook_bytes = 4 * codebook_floats

    def train(self, vectors: np.ndarray) -> None:
        """See [`Quantizer.train`]."""
        self.index.train(contiguous(vectors))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8."""
        return self.index.sa_encode(contiguous(vectors))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return self.index.sa_decode(np.ascontiguousarray(codes))


class BeamCodec(FaissCodec):
    """Faiss's residual quantizer, encoding with a beam of its own."""

    def __init__(self, index: faiss.IndexResidualQuantizer, code_bits: int, codebook_floats: int, beam: int):
        super().__init__(index, code_bits, codebook_floats)
        self.beam = beam
        if max(faiss.vector_to_array(index.rq.nbits)) >= LARGE_CODEBOOK_BITS:
            self.index.rq.train_type |= faiss.ResidualQuantizer.Train_top_beam
        self.index.rq.cp.max_points_per_centroid = POINTS_PER_CODEWORD
        if faiss.get_num_gpus():
            self.index.rq.assign_index_factory = faiss.GpuProgressiveDimIndexFactory(1)

    def train(self, vectors: np.ndarray) -> None:
        """Trains with a beam of at most five."""
        self.index.rq.max_beam_size = min(self.beam, TRAINING_BEAM)
        super().train(vectors)
        self.index.rq.max_beam_size = self.beam


class SearchingCodec(FaissCodec):
    """Faiss's local-search quantizer, encoding with more iterations than it is trained with."""

    def __init__(self, index: faiss.IndexLocalSearchQuantizer, code_bits: int, codebook_floats: int, iterations: int):
        super().__init__(index, code_bits, codebook_floats)
        self.iterations = iterations
        if faiss.get_num_gpus():
            index.lsq.icm_encoder_factory = faiss.GpuIcmEncoderFactory(1)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8."""
        self.index.lsq.encode_ils_iters = self.iterations
        return super().encode(vectors)


def product(dimension: int, size: int, rotated: bool = False) -> FaissCodec:
    """PQ: one byte for each of `size` slices; where slices would be unequal, zeros are spread among the dimensions.

    Args:
        dimension: Of the vectors.
        size: Bytes.
        rotated: Learn a rotation first (OPQ).
    """
    padded = -(-dimension // size) * size
    index: faiss.Index = faiss.IndexPQ(padded, size, 8)
    index.pq.cp.max_points_per_centroid = POINTS_PER_CODEWORD
    if rotated:
        index = faiss.IndexPreTransform(faiss.OPQMatrix(padded, size), index)
    if padded > dimension:
        index = faiss.IndexPreTransform(faiss.RemapDimensionsTransform(dimension, padded, True), index)
    return FaissCodec(index, 8 * size, 256 * padded + padded * padded * rotated)


def residual(dimension: int, bits: Sequence[int], beam: int) -> BeamCodec:
    """RQ with `bits[m]` bits in step m."""
    sizes = faiss.UInt64Vector()
    for step in bits:
        sizes.push_back(step)
    index = faiss.IndexResidualQuantizer(dimension, sizes)
    return BeamCodec(index, sum(bits), sum(1 << step for step in bits) * dimension, beam)


def equal_steps(size: int, bits: int) -> list[int]:
    """As many codes of `bits` bits as fit into `size` bytes."""
    return [bits] * (8 * size // bits)


def mixed_steps(size: int, bits: int) -> list[int]:
    """The same, and a last, smaller code that uses the bits left over."""
    steps, rest = equal_steps(size, bits), 8 * size % bits
    return [*steps, rest] if rest else steps


def local_search(dimension: int, size: int, bits: int, iterations: int = LSQ_ITERATIONS) -> SearchingCodec:
    """LSQ: jointly trained codebooks, codes by iterated local search.

    Args:
        dimension: Of the vectors.
        size: Bytes.
        bits: Per code.
        iterations: Of the search when encoding.
    """
    steps = equal_steps(size, bits)
    index = faiss.IndexLocalSearchQuantizer(dimension, len(steps), bits)
    return SearchingCodec(index, sum(steps), len(steps) * (1 << bits) * dimension, iterations)


def product_of_additive(dimension: int, size: int, kind: str) -> FaissCodec | None:
    """PRQ or PLSQ: residual or local-search quantizers of slices, 4 codes in each of two slices or 8 in each of more.

    Args:
        dimension: Of the vectors.
        size: Bytes.
        kind: "residual" or "local_search".
    """
    slices = max(2, size // 8)
    if dimension % slices:
        return None
    makers = {"residual": faiss.IndexProductResidualQuantizer, "local_search": faiss.IndexProductLocalSearchQuantizer}
    index = makers[kind](dimension, slices, size // slices, 8)
    return FaissCodec(index, 8 * size, size // slices * 256 * dimension)
