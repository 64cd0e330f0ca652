"""The evaluation that travels with a checkpoint, and the fit check that compares with it."""

import json

import numpy as np
import pytest

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.evaluation import nearest_neighbors, recalls
from rqmoe_hf.fit import FitReport, _judge, check_fit
from rqmoe_hf.record import EvaluationRecord, load_record, measure
from rqmoe_hf.saving import weights_checksum
from rqmoe_hf.training import initialize


@pytest.fixture(scope="module")
def trained(clustered):
    config = RQMoEConfig.additive(hidden_size=16, num_codebooks=4, codebook_size=32)
    return initialize(RQMoEModel(config), clustered[:4000]).eval()


@pytest.fixture(scope="module")
def record(trained, clustered):
    return measure(trained, clustered[4000:], "made up")


def test_the_record_holds_what_it_says(trained, clustered, record):
    held_out = clustered[4000:]
    queries, database = held_out[:200], held_out[200:]
    restored = trained.decompress(trained.compress(database))
    assert (record.num_queries, record.num_vectors) == (200, 1800)
    assert record.whole["mse"] == pytest.approx(np.square(database - restored).sum(axis=1).mean(), rel=1e-4)
    assert record.mean_norm == pytest.approx(np.linalg.norm(held_out, axis=1).mean(), rel=1e-5)
    mean = trained.mean.numpy()
    assert record.variance == pytest.approx(np.square(held_out - mean).sum(axis=1).mean(), rel=1e-4)
    assert [row["num_codebooks"] for row in record.reports] == [1, 2, 3, 4]
    assert [row["vectors"] for row in record.by_size] == [250, 500, 1000, 1800]
    truth, found = nearest_neighbors(queries, database[:500], 10), nearest_neighbors(queries, restored[:500], 10)
    assert record.at_size("recall_10_at_10", 500) == pytest.approx(recalls(truth, found)[2], abs=1e-6)
    ends = [row["code_entropy"] for row in record.by_size if row["vectors"] in (500, 1000)]
    assert record.at_size("code_entropy", round((500 * 1000) ** 0.5)) == pytest.approx(sum(ends) / 2, rel=1e-3)
    assert record.weights == weights_checksum(trained)
    assert record.speed["encode_per_second"] > 0 and record.environment["torch_threads"] >= 1


def test_the_record_survives_its_file(record, tmp_path):
    (tmp_path / "evaluation.json").write_text(record.to_json(), "utf-8")
    again = load_record(tmp_path)
    assert again.to_json() == record.to_json()
    assert load_record(tmp_path / "..") is None
    for damaged in ("", "[]", json.dumps({"weights": "x"}), record.to_json()[:200]):
        with pytest.raises(ValueError, match=r"no evaluation\.json of a quantizer"):
            EvaluationRecord.from_json(damaged)


def test_held_out_vectors_of_the_same_kind_are_trusted(trained, clustered, record):
    for count in (2000, 700):
        fit = check_fit(trained, clustered[-count:], record)
        assert fit.verdict == "trust", fit
        assert fit.reasons == []


def test_vectors_of_another_encoder_are_not(trained, clustered, record):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    fit = check_fit(trained, clustered[-1000:] @ turn, record)
    assert fit.verdict == "retrain"
    assert "times the card's" in fit.reasons[0]
    assert fit.mean_norm[0] == pytest.approx(fit.mean_norm[1], rel=0.03)  # a rotation keeps norms


def test_vectors_of_another_scale_are_recognised(trained, clustered, record):
    fit = check_fit(trained, clustered[-1000:] * 2, record)
    assert fit.verdict == "retrain"
    assert "mean norm" in fit.reasons[0] and "normalisation" in fit.reasons[0]


def test_a_drift_asks_for_fine_tuning(trained, clustered, record):
    noise = np.random.default_rng(1).normal(size=(1000, 16)).astype(np.float32)
    mild = clustered[-1000:] + 0.6 * noise
    fit = check_fit(trained, mild, record)
    assert fit.verdict == "fine-tune", fit


def test_a_narrow_collection_asks_for_a_quantizer_of_its_own(trained, clustered, record):
    rng = np.random.default_rng(2)
    narrow = clustered[rng.integers(4000, 4003, size=1000)] + rng.normal(size=(1000, 16)).astype(np.float32)
    fit = check_fit(trained, narrow, record)
    assert fit.verdict == "retrain"
    assert fit.code_entropy[0] < fit.code_entropy[1] - 1
    assert "codewords lie idle" in fit.reasons[-1]


@pytest.mark.parametrize(("least_squares", "verdict"), [(True, "fine-tune"), (False, "retrain")])
def test_a_narrow_collection_is_enough_to_fine_tune_lsq(least_squares, verdict):
    """The figures of Python's documentation with `minilm-384-8-bytes`, which gains more from that."""
    fit = FitReport("trust", [], 5400, (0.335, 0.262), (0.62, 0.50), (1.0, 1.0), (7.7, 10.2))
    _judge(fit, least_squares)
    assert fit.verdict == verdict and len(fit.reasons) == 2


def test_too_small_a_sample_is_refused(trained, clustered, record):
    with pytest.raises(ValueError, match="at least 300 embeddings, got 299"):
        check_fit(trained, clustered[:299], record)
