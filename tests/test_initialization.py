"""Models start as exactly the Faiss quantizers that they are initialised from."""

import faiss
import numpy as np
import pytest
import torch

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.codes import bits_per_code
from rqmoe_hf.training import initialize
from rqmoe_hf.training.initialization import sort_by_energy, suitable_blocks, suitable_sizes

COMMON = {"hidden_size": 16, "num_codebooks": 3, "codebook_size": 32, "intermediate_size": 8}
CONFIGS = [
    RQMoEConfig.additive(**COMMON),
    RQMoEConfig(**COMMON),
    RQMoEConfig(**COMMON, instruction_size=4, num_expert_layers=2),
    RQMoEConfig.official(**COMMON),
    RQMoEConfig.qinco(**COMMON),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_rq_start_is_faiss_rq(clustered, config):
    model = initialize(RQMoEModel(config), clustered, "rq", beam_size=3, seed=5).eval()
    mean = clustered.mean(axis=0)
    scale = np.sqrt(clustered.var(axis=0).mean())
    np.testing.assert_allclose(model.mean, mean, atol=1e-5)
    assert model.scale.item() == pytest.approx(scale, rel=1e-5)
    quantizer = faiss.ResidualQuantizer(16, 3, 5)
    quantizer.max_beam_size, quantizer.cp.seed = 3, 6
    rows = np.sort(np.random.default_rng(5).permutation(len(clustered))[:65_536])
    quantizer.train(((clustered[rows] - mean) / scale).astype(np.float32))
    codes = model.encode(torch.from_numpy(clustered), beam_size=1, exact=True).codes
    packed = np.ascontiguousarray(faiss.pack_bitstrings(codes.numpy().astype(np.int32), 5))
    expected = quantizer.decode(packed) * scale + mean
    np.testing.assert_allclose(model.decode(codes).reconstruction, expected, atol=1e-3)


def test_lsq_start_has_the_codes_of_lsq(clustered):
    """The model that starts from LSQ is at least as good as Faiss's LSQ, whatever the codes are searched with."""
    vectors = clustered[:300]
    model = initialize(RQMoEModel(RQMoEConfig(**COMMON)), clustered, "lsq", seed=1).eval()
    exhaustive = model.decompress(model.compress(vectors, exact=True, beam_size=32**2))
    index = faiss.IndexLocalSearchQuantizer(16, 3, 5)
    index.lsq.random_seed = 2
    mean, scale = clustered.mean(axis=0), np.sqrt(clustered.var(axis=0).mean())
    index.train((clustered - mean) / scale)
    theirs = index.sa_decode(index.sa_encode((vectors - mean) / scale)) * scale + mean
    assert np.square(vectors - exhaustive).sum(1).mean() <= 1.001 * np.square(vectors - theirs).sum(1).mean()


def test_sorting_by_energy_keeps_sums_and_puts_the_strongest_first():
    rng = np.random.default_rng(0)
    codebooks = rng.normal(size=(4, 8, 5)) * np.array([1.0, 5.0, 0.1, 2.0])[:, None, None] + rng.normal(size=(4, 1, 5))
    codes = rng.integers(0, 8, (1000, 4))
    ordered, order = sort_by_energy(codebooks.astype(np.float32), codes)
    ordered = np.stack(ordered)
    before = codebooks[np.arange(4), codes].sum(axis=1)
    after = ordered[np.arange(4), codes[:, order]].sum(axis=1)
    np.testing.assert_allclose(before, after, atol=1e-5)
    assert order.tolist() == [1, 3, 0, 2]
    contributions = ordered[np.arange(4), codes[:, order]]
    np.testing.assert_allclose(contributions[:, 1:].mean(axis=0), 0, atol=1e-5)


def test_sizes_that_faiss_rq_lacks(clustered):
    config = RQMoEConfig(**{**COMMON, "codebook_size": 33})
    model = initialize(RQMoEModel(config), clustered).eval()
    mse = np.square(clustered - model.decompress(model.compress(clustered))).sum(1).mean()
    assert mse < 0.5 * np.square(clustered - clustered.mean(0)).sum(1).mean()


@pytest.mark.parametrize("size", [1, 8, 16, 33])
def test_codebooks_grow_with_the_vectors_and_use_every_bit(size):
    numbers = [sum(suitable_sizes(size, vectors)) for vectors in (1_000, 30_000, 100_000, 1_000_000)]
    assert numbers == sorted(numbers)
    for vectors in (1_000, 30_000, 100_000, 1_000_000):
        sizes = suitable_sizes(size, vectors)
        assert sum(bits_per_code(codewords) for codewords in sizes) == 8 * size
        assert 9 * sum(sizes) <= vectors or max(sizes) == 256
    assert max(suitable_sizes(8, 1_000)) == 256
    assert suitable_sizes(8, 65_536) == [1024] * 6 + [16]


def test_many_bytes_are_divided_into_blocks_of_about_the_same_size():
    assert suitable_blocks(16, 200_000) == [suitable_sizes(16, 200_000)]
    for size, shares in ((17, [9, 8]), (32, [16, 16]), (64, [16] * 4), (40, [14, 13, 13])):
        assert suitable_blocks(size, 200_000) == [suitable_sizes(share, 200_000) for share in shares]


def test_bad_samples_are_refused(clustered):
    model = RQMoEModel(RQMoEConfig(**COMMON))
    with pytest.raises(ValueError, match="at least 128 vectors, got 100"):
        initialize(model, clustered[:100])
    with pytest.raises(ValueError, match="variance is 0"):
        initialize(model, np.ones((500, 16), np.float32))
    with pytest.raises(ValueError, match=r"shape \(n, 16\)"):
        initialize(model, clustered[:, :8])
    with pytest.raises(ValueError, match="NaN"):
        initialize(model, np.full((500, 16), np.nan, np.float32))
    big = RQMoEModel(RQMoEConfig(hidden_size=2, num_codebooks=8, codebook_size=8192, num_experts=0))
    with pytest.raises(ValueError, match="use 'rq'"):
        initialize(big, np.random.default_rng(0).normal(size=(40_000, 2)), "lsq")
    assert not model.is_initialized


def test_norms_of_1_are_told_from_norms_of_1_in_the_mean(clustered, tmp_path):
    """Search brings reconstructions to norm 1 where the embeddings had it, and only there."""
    drawn = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32) / 4
    assert np.square(drawn).sum(1).mean() == pytest.approx(1, abs=0.01)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    for vectors, expected in ((drawn, False), (unit, True), (unit.astype(np.float16).astype(np.float32), True)):
        initialize(RQMoEModel(RQMoEConfig.additive(**COMMON)), vectors).save_pretrained(tmp_path)
        model = RQMoEModel.from_pretrained(tmp_path)
        assert model.is_unit_norm is expected
        model.config.unit_norm = None  # a quantizer from before this was on record
        assert model.is_unit_norm
