"""The engine: batch invariance, pre-selection, beam, dtypes, memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CODEWORDS, MEMBERS, STEPS, randomize
from torch.nn import functional as F

from rqmoe_hf import RQMoEConfig, RQMoEModel

REALISTIC = {
    "hidden_size": 64,
    "num_codebooks": 4,
    "codebook_size": 64,
    "intermediate_size": 32,
    "instruction_size": 16,
}


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(100_000, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def realistic() -> RQMoEModel:
    return randomize(RQMoEModel(RQMoEConfig(**REALISTIC)))


@pytest.mark.parametrize("beam_size", [1, 4])
def test_float32_codes_do_not_depend_on_the_batch(realistic, embeddings, beam_size):
    settings = {"num_candidates": 4, "beam_size": beam_size}
    together = realistic.encode(embeddings, **settings).codes
    for rows in (torch.arange(500), torch.arange(77_000, 77_500)):
        alone = torch.cat([realistic.encode(embeddings[row : row + 1], **settings).codes for row in rows.tolist()])
        assert torch.equal(alone, together[rows])
    odd = torch.cat([realistic.encode(part, **settings).codes for part in embeddings[:20_000].split(777)])
    assert torch.equal(odd, together[:20_000])


def test_near_ties_are_settled_alike_in_any_batch():
    """Codewords in pairs a rounding error apart: float32 arithmetic alone decides them by the batch."""
    generator = torch.Generator().manual_seed(0)
    model = randomize(RQMoEModel(RQMoEConfig(**REALISTIC)))
    with torch.no_grad():
        twins = model.codebooks[:, ::2]
        model.codebooks[:, 1::2] = twins * (1 + 1e-7 * torch.randn(twins.shape, generator=generator))
    vectors = torch.randn(4000, 64, generator=generator)
    together = model.encode(vectors, beam_size=1).codes
    apart = torch.cat([model.encode(part, beam_size=1).codes for part in vectors.split(13)])
    assert torch.equal(apart, together)


def test_bfloat16_codes_hardly_depend_on_the_batch(realistic, embeddings):
    model = randomize(RQMoEModel(RQMoEConfig(**REALISTIC)))
    model.experts.to(torch.bfloat16)
    model.instructions.data = model.instructions.data.to(torch.bfloat16)
    vectors = embeddings[:6_000]
    together = model.encode(vectors)
    apart = [model.encode(part) for part in vectors.split(33)]
    assert (torch.cat([part.codes for part in apart]) != together.codes).float().mean() < 1e-3
    error = (vectors - together.reconstruction).square().sum(1).mean()
    apart_error = (vectors - torch.cat([part.reconstruction for part in apart])).square().sum(1).mean()
    assert apart_error == pytest.approx(error.item(), rel=1e-3)
    full = (vectors - realistic.encode(vectors).reconstruction).square().sum(1).mean()
    assert error == pytest.approx(full.item(), rel=1e-2)


def test_more_search_finds_better_codes(model, vectors):
    def error(**settings):
        return (vectors - model.encode(vectors, **settings).reconstruction).square().sum(1).mean().item()

    greedy, exact = error(num_candidates=1, beam_size=1), error(exact=True, beam_size=1)
    assert exact <= greedy * 1.001
    assert error(exact=True, beam_size=8) < exact
    assert error(num_candidates=8, beam_size=8) <= error(exact=True, beam_size=8) * 1.01


def test_a_wide_enough_beam_is_exhaustive_search(paper_model, vectors):
    """With two steps, a beam of all codewords and all candidates, the code is the best of all K^2."""
    found = paper_model.encode(vectors[:20], exact=True, beam_size=20, num_codebooks=2)
    pairs = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    decoded = paper_model.decode(pairs).reconstruction
    best = torch.cdist(vectors[:20].double(), decoded.double()).argmin(dim=1)
    assert torch.equal(found.codes, pairs[best])


def test_tables_follow_the_weights(paper_model, vectors):
    """Also after a fused optimizer step, which leaves no trace on the weights' version."""
    optimizer = torch.optim.AdamW(paper_model.parameters(), lr=0.1, fused=True)
    paper_model.encode(vectors)
    paper_model.train()
    before = paper_model(vectors)
    before.loss.backward()
    optimizer.step()
    after = paper_model(vectors)
    paper_model.eval()
    fresh = RQMoEModel(paper_model.config).eval()
    fresh.load_state_dict(paper_model.state_dict())
    assert torch.equal(paper_model.encode(vectors).codes, fresh.encode(vectors).codes)
    assert not torch.equal(before.codes, after.codes)


def test_tables_follow_weights_that_are_trained_in_evaluation_mode(paper_model, vectors):
    optimizer = torch.optim.AdamW(paper_model.parameters(), lr=0.1, fused=True)
    before = paper_model.encode(vectors).codes
    for _ in range(2):
        paper_model(vectors).loss.backward()
        optimizer.step()
    fresh = RQMoEModel(paper_model.config).eval()
    fresh.load_state_dict(paper_model.state_dict())
    after = paper_model.encode(vectors).codes
    assert torch.equal(after, fresh.encode(vectors).codes) and not torch.equal(before, after)


def test_dropout_never_touches_the_codes(vectors):
    config = RQMoEConfig(**{**REALISTIC, "hidden_size": 16}, dropout=0.5)
    model = randomize(RQMoEModel(config))
    expected = model(vectors)
    model.train()
    first, second = model(vectors), model(vectors)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codes, expected.codes)
    assert first.loss != second.loss


def test_the_reference_mixture_is_batched_dense_experts(paper_model):
    """RQMoEExperts.forward against torch's own linear and softmax, one step and expert at a time."""
    experts = paper_model.experts
    codewords, condition = torch.randn(3, 7, 16), torch.randn(3, 7, 5)
    result = experts(codewords, condition)
    step = 1
    z = F.linear(codewords[step], experts.codeword_proj[step], experts.bias[step])
    z = z + F.linear(condition[step], experts.condition_proj[step])
    gate = F.softmax(F.linear(z, experts.gate_proj[step], experts.gate_bias[step]), dim=-1)
    outputs = [
        z + F.linear(F.relu(F.linear(z, experts.up_proj[step, 0, n])), experts.down_proj[step, 0, n]) for n in range(3)
    ]
    mixture = sum(gate[:, n : n + 1] * output for n, output in enumerate(outputs))
    torch.testing.assert_close(result[step], codewords[step] + experts.output_scale[step] * mixture)


MEMORY = """
import resource, numpy as np, torch
from rqmoe_hf import RQMoEConfig, RQMoEModel
model = RQMoEModel(RQMoEConfig(num_codebooks=2, intermediate_size=16, num_candidates=2, beam_size=2)).eval()
model.scale.fill_(1.0)
vectors = np.random.default_rng(0).standard_normal((400_000, 384), dtype=np.float32)
model.compress(vectors[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codes = model.compress(vectors, show_progress_bar=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, codes.shape)
"""


def test_compressing_many_vectors_needs_less_memory_than_a_copy_of_them():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    gibibytes, *shape = result.stdout.split(maxsplit=1)
    assert float(gibibytes) < 0.4  # a copy would take .57; it is .19 for 100,000 vectors as for 250,000
    assert shape == ["(400000, 2)\n"]


@pytest.mark.parametrize("codebook_size", [2, 1000, 65536])
def test_any_codebook_size(codebook_size):
    config = RQMoEConfig(
        hidden_size=8, num_codebooks=3, codebook_size=codebook_size, intermediate_size=4, instruction_size=4
    )
    model = randomize(RQMoEModel(config))
    vectors = np.random.default_rng(0).standard_normal((200, 8), dtype=np.float32)
    packed = model.compress(vectors)
    assert packed.shape == (200, config.bytes_per_vector)
    found = model.encode(torch.from_numpy(vectors))
    np.testing.assert_allclose(model.decompress(packed), found.reconstruction.numpy(), atol=1e-5)
    assert found.codes.max() < codebook_size


@pytest.mark.parametrize("name", ["paper", "paper-deep", "official"])
def test_a_model_too_large_for_row_tables_decodes_alike(name, monkeypatch):
    model = randomize(RQMoEModel(MEMBERS[name]))
    codes = torch.randint(CODEWORDS, (50, STEPS))
    by_lookup = model.decode(codes).reconstruction
    monkeypatch.setattr("rqmoe_hf.decoding_rqmoe.MAX_LOOKUP_BYTES", 0)
    model.train().eval()  # forgets the tables
    torch.testing.assert_close(model.decode(codes).reconstruction, by_lookup, atol=1e-5, rtol=0)
