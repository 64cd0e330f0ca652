"""Local search: against all codes there are, a naive loop, and Faiss's LSQ."""

import copy
import itertools
from functools import partial

import faiss
import numpy as np
import pytest
import torch
from conftest import CODEWORDS, MEMBERS, STEPS, randomize

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.least_squares import WINDOW, RecentFit, RunningFit, improve_codewords, solve_codewords
from rqmoe_hf.local_search_rqmoe import build_pair_tables
from rqmoe_hf.training.lsq import train_lsq
from rqmoe_hf.training.run import suitable_rounds


def errors(model: RQMoEModel, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (vectors - model.decode(codes).reconstruction).square().sum(-1)


def test_finds_the_best_of_all_codes():
    model = randomize(RQMoEModel(RQMoEConfig.additive(hidden_size=6, num_codebooks=4, codebook_size=5)))
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    best = torch.cdist(vectors.double(), model.decode(every).reconstruction.double()).square().amin(1)
    found = errors(model, vectors, model.encode(vectors, beam_size=1, local_search=40).codes)
    greedy = errors(model, vectors, model.encode(vectors, beam_size=1).codes)
    assert (found < best + 1e-4).float().mean() > 0.97
    assert (greedy < best + 1e-4).float().mean() < 0.7


@pytest.mark.parametrize(("steps", "kept"), [(1, None), (3, 1)])
def test_a_single_code_is_the_nearest_codeword_by_exact_distances(steps, kept):
    # Codewords that differ by less than the tables of the search, which are float16, can tell.
    config = RQMoEConfig.additive(hidden_size=8, num_codebooks=steps, codebook_size=50, beam_size=1)
    model, generator = randomize(RQMoEModel(config)), torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.codebooks[0] = 1 + 1e-3 * torch.randn(50, 8, generator=generator)
    near = model.mean + model.scale * (1 + 1e-3 * torch.randn(300, 8, generator=generator))
    codewords = model.mean.double() + model.scale.double() * model.codebooks[0].detach().double()
    nearest = torch.cdist(near.double(), codewords).argmin(dim=1)
    codes = model.encode(near, num_codebooks=kept, local_search=8).codes
    assert (codes[:, 0] == nearest).float().mean() > 0.99


def test_no_single_code_of_an_additive_quantizer_can_be_improved(vectors):
    model = randomize(RQMoEModel(MEMBERS["additive"]))
    codes = model.encode(vectors, local_search=30).codes
    reached = errors(model, vectors, codes)
    improved = torch.zeros(len(vectors), dtype=torch.bool)
    for step in range(STEPS):
        for codeword in range(CODEWORDS):
            changed = codes.clone()
            changed[:, step] = codeword
            improved |= errors(model, vectors, changed) < reached - 1e-4
    assert improved.float().mean() < 0.02


def test_every_member_gains_and_no_vector_loses(model, vectors):
    before = model.encode(vectors)
    after = model.encode(vectors, local_search=12)
    lost = errors(model, vectors, after.codes) - errors(model, vectors, before.codes)
    assert lost.max() < 1e-4
    # With QINCo a code changes all later codewords: few proposals survive.
    least = 1e-4 if model.config.conditioning == "reconstruction" else 0.005
    assert lost.mean() < -least * errors(model, vectors, before.codes).mean()
    torch.testing.assert_close(after.reconstruction, model.decode(after.codes).reconstruction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "expected"), [(2, {32}), (24, {64, 128, 256})])
def test_rounds_are_doubled_while_it_lowers_the_error(steps, expected):
    # Of two codes the search is at its end at once; 24 in 16 dimensions are hard to find.
    model = randomize(RQMoEModel(RQMoEConfig.additive(hidden_size=16, num_codebooks=steps, codebook_size=16)))
    vectors = torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    chosen = suitable_rounds(model, vectors.numpy())
    known = {
        rounds: errors(model, vectors, model.encode(vectors, beam_size=1, local_search=rounds).codes).mean()
        for rounds in (32, 64, 128, 256)
    }
    assert chosen in expected
    assert all(known[rounds] <= 0.98 * known[rounds // 2] for rounds in known if 32 < rounds <= chosen)
    assert chosen == 256 or known[2 * chosen] > 0.98 * known[chosen]


def test_tables_are_as_precise_under_autocast(vectors):
    model = randomize(RQMoEModel(MEMBERS["additive"]))
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(vectors, local_search=2)
    (found,) = (tables.pairs[STEPS] for _, tables in model._tables.values() if STEPS in tables.pairs)
    products = found.codewords.double() @ found.codewords.double().T * 2 * found.unit
    parts = [part[:, :size] for part, size in zip(found.products, found.sizes, strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=1).double(), products.detach(), rtol=1e-3, atol=1e-3)


def test_vectors_and_codewords_far_out_are_no_problem(vectors):
    model = randomize(RQMoEModel(MEMBERS["additive"]))
    with torch.no_grad():
        model.codebooks[1, 3] *= 1e5  # beyond float16
    far = torch.cat([vectors * 1e6, vectors])
    found = model.encode(far, local_search=6)
    assert found.reconstruction.isfinite().all()
    before = errors(model, far, model.encode(far).codes)
    assert (errors(model, far, found.codes) <= before * (1 + 1e-5) + 1e-4).all()
    assert (errors(model, vectors, found.codes[len(vectors) :]) < before[len(vectors) :] - 1e-4).float().mean() > 0.1


def test_prefixes_are_searched_as_such(model, vectors):
    found = model.encode(vectors, num_codebooks=2, local_search=6)
    assert found.codes.shape == (300, 2)
    beam = model.encode(vectors, num_codebooks=2)
    assert errors(model, vectors, found.codes).mean() <= errors(model, vectors, beam.codes).mean()


def test_codes_do_not_depend_on_the_batch(model, vectors):
    together = model.encode(vectors, local_search=8).codes
    apart = torch.cat([model.encode(part, local_search=8).codes for part in vectors.split(7)])
    assert torch.equal(apart, together)


def test_packed_codes_and_configuration(vectors):
    model = randomize(RQMoEModel(copy.deepcopy(MEMBERS["additive"])))  # the config is changed below
    asked = model.compress(vectors.numpy(), local_search=5)
    model.config.local_search = 5
    assert np.array_equal(model.compress(vectors.numpy()), asked)
    with pytest.raises(ValueError, match="local_search"):
        model.encode(vectors, local_search=-1)
    with pytest.raises(ValueError, match="local_search=0"):
        build_pair_tables([torch.zeros(8192, 1)] * 8)


@pytest.fixture(scope="module")
def centred(clustered) -> np.ndarray:
    return clustered - clustered.mean(axis=0)


@pytest.fixture(scope="module")
def faiss_lsq(centred):
    quantizer = faiss.LocalSearchQuantizer(16, 4, 5)
    quantizer.train(centred[:5000])
    return quantizer


def encoded_error(codebooks: np.ndarray, vectors: np.ndarray) -> float:
    model = RQMoEModel(RQMoEConfig.additive(hidden_size=16, num_codebooks=4, codebook_size=32)).eval()
    with torch.no_grad():
        model.codebooks.copy_(torch.from_numpy(codebooks))
        model.scale.fill_(1.0)
    return float(np.square(vectors - model.decompress(model.compress(vectors, local_search=16))).sum(1).mean())


def test_codes_and_codebooks_are_no_worse_than_those_of_faiss(faiss_lsq, centred):
    vectors = np.ascontiguousarray(centred[5000:])
    theirs = np.square(vectors - faiss_lsq.decode(faiss_lsq.compute_codes(vectors))).sum(1).mean()
    their_codebooks = faiss.vector_to_array(faiss_lsq.codebooks).reshape(4, 32, 16).copy()
    assert encoded_error(their_codebooks, vectors) <= 1.005 * theirs
    codebooks, codes = train_lsq(
        centred[:5000], [32] * 4, search_rounds=8, jitter=0, show_progress_bar=False
    )  # as many rounds as Faiss, and the same vectors in all of them
    assert encoded_error(np.stack(codebooks), vectors) <= theirs
    restored = sum(codebook[column] for codebook, column in zip(codebooks, codes.T, strict=True))
    theirs = np.square(centred[:5000] - faiss_lsq.decode(faiss_lsq.compute_codes(centred[:5000]))).sum(1).mean()
    assert np.square(centred[:5000] - restored).sum(1).mean() <= theirs


def test_few_vectors_make_codebooks_that_hold_elsewhere(centred):
    """The noise of 600 vectors is not learned: others are encoded better than by Faiss's LSQ, and than without."""
    few, others = np.ascontiguousarray(centred[:600]), np.ascontiguousarray(centred[5000:])
    quantizer = faiss.LocalSearchQuantizer(16, 4, 5)
    quantizer.train(few)
    theirs = np.square(others - quantizer.decode(quantizer.compute_codes(others))).sum(1).mean()
    moved, fixed = (
        encoded_error(np.stack(train_lsq(few, [32] * 4, jitter=jitter, show_progress_bar=False)[0]), others)
        for jitter in (0.5, 0.0)
    )
    assert moved < 0.97 * theirs
    assert moved < fixed


def weighted_solution(codes, vectors, sizes, ridge, weights=None):
    """Least squares from the design matrix: a column for each codeword, the ridge as further equations."""
    design = np.concatenate([np.eye(size)[column] for size, column in zip(sizes, codes.T, strict=True)], axis=1)
    root = np.sqrt(np.ones(len(codes)) if weights is None else weights)[:, None]
    padded = np.concatenate([root * design, np.sqrt(ridge) * np.eye(sum(sizes))])
    targets = np.concatenate([root * vectors, np.zeros((sum(sizes), vectors.shape[1]))])
    return np.linalg.lstsq(padded, targets, rcond=None)[0]


def dependent_codes(count, sizes, seed):
    codes = np.random.default_rng(seed).integers(sizes, size=(count, len(sizes)))
    codes[:, 1] = codes[:, 0] % sizes[1]  # codes that hang together, as real ones do
    return codes


def test_conjugate_gradients_reach_least_squares(centred):
    sizes = [30, 7, 12]
    codes = dependent_codes(len(centred), sizes, 3)
    expected = weighted_solution(codes, centred, sizes, 5.0)
    np.testing.assert_allclose(solve_codewords(codes, centred, sizes, 5.0), expected, atol=1e-3)
    given = torch.zeros(49, 16), torch.from_numpy(codes), torch.from_numpy(centred)
    np.testing.assert_allclose(improve_codewords(*given, sizes, 5.0, 60), expected, atol=1e-3)


@pytest.mark.parametrize("kind", [RunningFit, partial(RunningFit, dtype=torch.float32), RecentFit])
def test_fits_to_several_rounds_weigh_older_ones_less(centred, kind):
    sizes, rounds = [30, 7, 12], 3
    fit, size = kind(sizes, 16), len(centred) // rounds
    vectors = centred[: rounds * size].reshape(rounds, size, 16)
    codes = [dependent_codes(size, sizes, seed) for seed in range(rounds)]
    for part, own in zip(vectors, codes, strict=True):
        fit.add(torch.from_numpy(own), torch.from_numpy(part), 0.6)
    weights = np.repeat([0.36, 0.6, 1.0], size)
    expected = weighted_solution(np.concatenate(codes), vectors.reshape(-1, 16), sizes, 5.0, weights)
    again = kind(sizes, 16)
    again.restore(fit.state())
    for one in (fit, again):
        for _ in range(6):  # the iterative one comes closer each time
            found = one.solve(5.0)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_recent_fit_forgets_what_is_older_than_its_window(centred):
    sizes = [30, 7, 12]
    fits = RecentFit(sizes, 16), RecentFit(sizes, 16)
    vectors = torch.from_numpy(centred[:500])
    fits[0].add(torch.from_numpy(dependent_codes(500, sizes, 9)), vectors + 100)
    for seed in range(WINDOW):
        for fit in fits:
            fit.add(torch.from_numpy(dependent_codes(500, sizes, seed)), vectors, 0.6)
    np.testing.assert_array_equal(fits[0].solve(1.0), fits[1].solve(1.0))


def test_training_continues_where_it_was_stopped(clustered, tmp_path, monkeypatch):
    settings = {"rounds": 4, "final_rounds": 2, "batch_size": 2048, "show_progress_bar": False}
    whole = train_lsq(clustered, [16, 16, 4], **settings)[0]
    from rqmoe_hf.training import lsq

    improve, calls = lsq._improve, itertools.count()

    def stop(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return improve(*args)

    monkeypatch.setattr(lsq, "_improve", stop)
    with pytest.raises(KeyboardInterrupt):
        train_lsq(clustered, [16, 16, 4], **settings, checkpoint=tmp_path / "lsq.npz")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["lsq.npz"]
    resumed = train_lsq(clustered, [16, 16, 4], **settings, checkpoint=tmp_path / "lsq.npz")[0]
    for again, codebook in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(again, codebook)
    other = train_lsq(clustered, [16, 16, 4], **settings | {"seed": 1}, checkpoint=tmp_path / "lsq.npz")[0]
    assert not np.array_equal(other[0], whole[0])  # the file of another run is not continued
    moved = clustered + 1.0
    fresh, other = (train_lsq(moved, [16, 16, 4], **settings, checkpoint=file)[0] for file in (None, tmp_path / "lsq.npz"))  # noqa: E501
    np.testing.assert_array_equal(other[0], fresh[0])  # nor that of other vectors
