"""Every member equals what it claims to be: Faiss for additive quantizers, the papers' equations for the others."""

import faiss
import naive
import numpy as np
import pytest
import torch
from conftest import randomize

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.additive import faiss_scanner, faiss_widths
from rqmoe_hf.convert import convert_faiss


def test_codes_are_those_of_the_equations(model, vectors):
    found = model.encode(vectors, beam_size=1, exact=True)
    codes = naive.encode(model, vectors)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.reconstruction, naive.decode(model, codes).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_any_prefix_decodes_as_the_equations_say(model, vectors, kept):
    codes = torch.randint(0, 20, (100, kept), generator=torch.Generator().manual_seed(3))
    expected = naive.decode(model, codes).float()
    torch.testing.assert_close(model.decode(codes).reconstruction, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        gradient_path = model.contributions(codes).sum(dim=1) * model.scale + model.mean
    torch.testing.assert_close(gradient_path, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [3, 8, 10])
def test_greedy_rq_gives_faiss_codes(clustered, bits):
    index = faiss.IndexResidualQuantizer(16, 4, bits)
    index.rq.max_beam_size = 1
    index.train(clustered)
    model = convert_faiss(index)
    packed = model.compress(clustered)
    assert np.array_equal(packed, index.sa_encode(clustered))
    np.testing.assert_allclose(model.decompress(packed), index.sa_decode(packed), atol=1e-5)


def test_codebooks_of_different_sizes_give_faiss_codes(clustered):
    """Faiss packs codes of 5, 6, 4 and 3 bits; its codebooks, padded to one size, give the same codes here."""
    index = faiss.IndexResidualQuantizer(16, faiss_widths([5, 6, 4, 3]))
    index.rq.max_beam_size = 1
    index.train(clustered)
    sizes = [32, 64, 16, 8]
    settings = {"num_codebooks": 4, "codebook_size": 64, "codebook_sizes": sizes}
    model = RQMoEModel(RQMoEConfig.additive(hidden_size=16, **settings)).eval()
    rows = torch.from_numpy(faiss.vector_to_array(index.rq.codebooks).reshape(-1, 16).copy())
    with torch.no_grad():
        model.scale.fill_(1.0)
        model.codebooks.zero_()
        for codebook, own in zip(model.codebooks, rows.split(sizes), strict=True):
            codebook[: len(own)] = own
    packed = model.compress(clustered, beam_size=1)
    assert packed.shape[1] == model.config.bytes_per_vector == 3
    assert np.array_equal(packed, index.sa_encode(clustered))
    np.testing.assert_allclose(model.decompress(packed), index.sa_decode(packed), atol=1e-5)
    scores, ids = faiss_scanner(model.codebooks.detach().numpy(), packed, sizes).search(clustered[:5], 10)
    expected = clustered[:5] @ index.sa_decode(packed).T
    np.testing.assert_allclose(scores, np.take_along_axis(expected, ids, axis=1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["additive", "paper", "official", "qinco"])
@pytest.mark.parametrize("exact", [False, True])
def test_small_codebooks_never_give_codes_that_they_lack(kind, exact, vectors):
    settings = {"hidden_size": 16, "num_codebooks": 4, "codebook_size": 20, "codebook_sizes": [20, 3, 20, 5]}
    build = {"paper": RQMoEConfig}.get(kind) or getattr(RQMoEConfig, kind)
    model = randomize(RQMoEModel(build(**settings, intermediate_size=8)))
    for rounds in (0, 6):
        codes = model.encode(vectors, exact=exact, local_search=rounds).codes
        assert (codes.amax(dim=0) < torch.tensor([20, 3, 20, 5])).all()
    packed = model.compress(vectors.numpy(), exact=exact, local_search=6)
    assert packed.shape[1] == 2  # 5 + 2 + 5 + 3 bits
    expected = model.decode(codes).reconstruction
    np.testing.assert_allclose(model.decompress(packed), expected, atol=1e-5)
    with pytest.raises(ValueError, match="between 0 and 2"):
        model.decode(torch.full((1, 4), 3))


def test_rq_beam_is_as_good_as_faiss_beam(clustered):
    index = faiss.IndexResidualQuantizer(16, 4, 5)
    index.train(clustered)
    index.rq.max_beam_size = 8
    model = convert_faiss(index)
    theirs = np.square(clustered - index.sa_decode(index.sa_encode(clustered))).sum(1).mean()
    ours = np.square(clustered - model.decompress(model.compress(clustered, beam_size=8))).sum(1).mean()
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "beam"), [(faiss.IndexResidualQuantizer, 5), (faiss.IndexResidualQuantizer, 12),
                       (faiss.IndexLocalSearchQuantizer, 1)]
)  # fmt: skip
def test_what_is_converted_encodes_as_well_as_faiss_without_being_told_how(clustered, kind, beam):
    index = kind(16, 4, 5)
    if kind is faiss.IndexResidualQuantizer:
        index.rq.max_beam_size = beam
    index.train(clustered)
    theirs = np.square(clustered - index.sa_decode(index.sa_encode(clustered))).sum(1).mean()
    model = convert_faiss(index)
    ours = np.square(clustered - model.decompress(model.compress(clustered))).sum(1).mean()
    assert ours < 1.02 * theirs and model.config.beam_size == beam


def test_lsq_whose_pairs_of_codewords_are_too_many_is_encoded_by_a_beam(clustered, monkeypatch):
    index = faiss.IndexLocalSearchQuantizer(16, 4, 5)
    index.train(clustered)
    for largest, search in ((128**2, (1, 32)), (128**2 - 1, (16, 0))):
        monkeypatch.setattr("rqmoe_hf.convert.faiss_quantizers.MAX_PAIRS", largest)
        config = convert_faiss(index).config
        assert (config.beam_size, config.local_search) == search


def test_lsq_codes_decode_to_faiss_reconstructions(clustered):
    index = faiss.IndexLocalSearchQuantizer(16, 4, 5)
    index.train(clustered)
    packed = index.sa_encode(clustered)
    restored = convert_faiss(index).decompress(packed)
    np.testing.assert_allclose(restored, index.sa_decode(packed), atol=1e-4)


@pytest.mark.parametrize("factory", ["PQ4x6", "PQ4x8", "OPQ4,PQ4x6"])
def test_pq_gives_faiss_codes(clustered, factory):
    index = faiss.index_factory(16, factory)
    index.train(clustered)
    model = convert_faiss(index)
    packed = model.compress(clustered)
    theirs = index.sa_encode(clustered)
    same = (packed == theirs).all(axis=1).mean()
    assert same == 1.0 if factory.startswith("PQ") else same > 0.999  # a rotation adds rounding, hence rare ties
    np.testing.assert_allclose(model.decompress(theirs), index.sa_decode(theirs), atol=1e-4)
