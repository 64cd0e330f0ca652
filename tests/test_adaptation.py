"""Fine-tuning of additive quantizers: against least squares written out, and for what it is good for."""

import json
import logging

import numpy as np
import pytest
import torch

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.evaluation import evaluate
from rqmoe_hf.training import RQMoETrainingArguments, initialize, lsq, train_quantizer
from rqmoe_hf.training.adaptation import adapt
from rqmoe_hf.training.blocks import TrainedBlock

SIZES = [32, 32, 8, 16]


@pytest.fixture(scope="module", params=[None, [2, 2], [1, 3]], ids=["one block", "two blocks", "k-means first"])
def trained(request, clustered) -> RQMoEModel:
    settings = {"num_codebooks": 4, "codebook_size": 32, "codebook_sizes": SIZES, "beam_size": 1, "local_search": 8}
    config = RQMoEConfig.additive(hidden_size=16, **settings, search_blocks=request.param)
    return initialize(RQMoEModel(config), clustered, "lsq", rounds=20, show_progress_bar=False).eval()


@pytest.fixture
def model(trained, tmp_path) -> RQMoEModel:
    trained.save_pretrained(tmp_path / "before")
    return RQMoEModel.from_pretrained(tmp_path / "before").eval()


@pytest.fixture(scope="module")
def moved(clustered) -> np.ndarray:
    """Other vectors: turned a little, and with another mean."""
    turn = np.linalg.qr(np.eye(16) + 0.05 * np.random.default_rng(3).normal(size=(16, 16)))[0]
    turn *= np.sign(np.diag(turn))
    return (clustered @ turn + 0.1).astype(np.float32)


def mse(model: RQMoEModel, vectors: np.ndarray) -> float:
    return evaluate(model, vectors)[0].mse


def test_fit_is_the_posterior_mean(clustered):
    vectors = clustered[:400] - clustered.mean(axis=0)
    generator = np.random.default_rng(0)
    books = [0.5 * generator.normal(size=(size, 16)).astype(np.float32) for size in (6, 9)]
    prior = TrainedBlock(books, np.stack([generator.integers(size, size=400) for size in (6, 9)], axis=1))
    settings = {"rounds": 0, "final_rounds": 1, "jitter": 0.0, "show_progress_bar": False}
    found, codes = lsq.train_lsq(vectors, [6, 9], prior=prior, **settings)
    rows = codes + np.array([0, 6])
    before = np.concatenate(books).astype(np.float64)
    chosen = np.zeros((400, 15))
    np.put_along_axis(chosen, rows, 1.0, axis=1)
    left = chosen.T @ (vectors - chosen @ before)
    expected = before + np.linalg.solve(chosen.T @ chosen + lsq.PRIOR_RIDGE * np.eye(15), left)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)


def test_few_vectors_are_enough(model, moved, clustered):
    train, held_out = moved[:1500], moved[5000:7000]
    before, at_home = mse(model, held_out), mse(model, clustered[5000:7000])
    fresh = initialize(RQMoEModel(model.config), train, "lsq", rounds=20, show_progress_bar=False).eval()
    adapt(model, train, show_progress_bar=False)
    assert at_home < mse(model, held_out) < 0.9 * before
    assert mse(model, held_out) < 1.1 * mse(fresh, held_out)  # of two optima; what k-means found stays as it is
    assert torch.equal(model.scale, RQMoEModel.from_pretrained(model.name_or_path).scale)


def test_codewords_that_no_vector_has_stay(model, moved):
    before = model.codebooks.detach().clone()
    same = np.repeat(moved[:2], 300, axis=0) + 1e-3 * np.random.default_rng(0).normal(size=(600, 16))
    adapt(model, same.astype(np.float32), show_progress_bar=False)
    changed = (model.codebooks != before).any(dim=-1)
    assert 0 < changed.float().mean() < 0.7


def arguments(folder) -> RQMoETrainingArguments:
    return RQMoETrainingArguments(str(folder), report_to="none", disable_tqdm=True, per_device_train_batch_size=256)


def test_a_run_saves_what_is_better(model, moved, tmp_path, caplog):
    before = mse(model, moved[5000:6000])
    train, held_out = load_embeddings(moved[:3000]), load_embeddings(moved[5000:6000])
    model.commit_hash = "0" * 40  # as if it came from the Hub
    trained = train_quantizer(model, train, held_out, arguments(tmp_path / "out"))
    assert (trained.name_or_path, trained.commit_hash) == (str(tmp_path / "out"), None)
    assert mse(RQMoEModel.from_pretrained(tmp_path / "out").eval(), moved[5000:6000]) < 0.95 * before
    notes = json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))
    assert (notes["started_from"], notes["epochs"], notes["vectors"]) == ("before", None, 3000)
    assert not list((tmp_path / "out").rglob("lsq*.npz"))


def test_a_run_that_would_do_harm_changes_nothing(model, clustered, tmp_path, caplog):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    noise = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        train_quantizer(model, load_embeddings(noise), load_embeddings(clustered[:1000]), arguments(tmp_path / "out"))
    assert "stays as it was" in caplog.text
    for name, weight in RQMoEModel.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(weight, before[name])
