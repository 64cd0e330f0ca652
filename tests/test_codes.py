"""The byte format of codes: Faiss's bit strings, frozen by golden bytes."""

import faiss
import numpy as np
import pytest

from rqmoe_hf import RQMoEConfig, bytes_per_vector, pack_codes, truncate_codes, unpack_codes
from rqmoe_hf.codes import sizes_for_bytes


@pytest.mark.parametrize("codebook_size", [2, 3, 16, 200, 256, 512, 1000, 4096, 65536])
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_packing_is_faiss_packing(codebook_size, steps):
    codes = np.random.default_rng(0).integers(0, codebook_size, (500, steps))
    bits = int(np.ceil(np.log2(codebook_size)))
    packed = pack_codes(codes, codebook_size)
    assert packed.dtype == np.uint8
    assert packed.shape == (500, int(np.ceil(steps * bits / 8))) == (500, bytes_per_vector(steps, codebook_size))
    assert RQMoEConfig(num_codebooks=steps, codebook_size=codebook_size).bytes_per_vector == packed.shape[1]
    assert np.array_equal(packed, faiss.pack_bitstrings(codes.astype(np.int32), bits))
    assert np.array_equal(unpack_codes(packed, steps, codebook_size), codes)


def test_golden_bytes():
    assert pack_codes(np.array([[1, 255, 0]]), 256).tobytes() == b"\x01\xff\x00"
    assert pack_codes(np.array([[1, 2, 1023]]), 1024).tobytes() == bytes(
        [0b00000001, 0b00001000, 0b11110000, 0b00111111]
    )
    assert pack_codes(np.array([[258, 1]]), 65536).tobytes() == b"\x02\x01\x01\x00"
    assert pack_codes(np.array([[1, 0, 1, 1]]), 2).tobytes() == b"\x0d"


@pytest.mark.parametrize("codebook_size", [256, 1024])
def test_a_truncated_code_is_the_code_of_the_prefix(codebook_size):
    codes = np.random.default_rng(0).integers(0, codebook_size, (50, 6))
    packed = pack_codes(codes, codebook_size)
    assert np.array_equal(truncate_codes(packed, 6, 4, codebook_size), pack_codes(codes[:, :4], codebook_size))
    with pytest.raises(ValueError, match="between 1 and num_codebooks = 6, got 7"):
        truncate_codes(packed, 6, 7, codebook_size)


def test_trailing_zero_bytes_survive():
    packed = pack_codes(np.array([[1, 2, 0, 0]]), 256)
    assert packed.shape == (1, 4)
    assert unpack_codes(packed, 4, 256).tolist() == [[1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[256]]), "between 0 and 255"),
        (np.array([[-1]]), "between 0 and 255"),
        (np.array([[1.0]]), "integer codes, got float64"),
        (np.array([1, 2]), "shape"),
        (np.empty((0, 4), int), "shape"),
    ],
)
def test_packing_refuses_what_are_no_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, 256)


def test_unpacking_refuses_wrong_bytes():
    with pytest.raises(ValueError, match=r"uint8 \(n, 3\), got uint8 \(1, 4\)"):
        unpack_codes(np.zeros((1, 4), np.uint8), 3, 256)
    with pytest.raises(ValueError, match="between 0 and 199"):
        unpack_codes(np.full((1, 3), 255, np.uint8), 3, 200)
    with pytest.raises(ValueError, match="between 2 and 65536, got 70000"):
        unpack_codes(np.zeros((1, 3), np.uint8), 1, 70000)


@pytest.mark.parametrize("size", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("bits", [4, 9, 10, 16])
def test_codebooks_for_a_number_of_bytes_use_every_bit(size, bits):
    sizes = sizes_for_bytes(size, bits)
    assert sum(codewords.bit_length() - 1 for codewords in sizes) == 8 * size
    assert max(sizes) <= 1 << bits
    assert bytes_per_vector(len(sizes), sizes) == size
