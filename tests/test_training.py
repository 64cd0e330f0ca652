"""Training: it learns, it resumes after a kill, it runs on several processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.evaluation import code_usage, evaluate, nearest_neighbors, recalls
from rqmoe_hf.training import RQMoETrainer, RQMoETrainingArguments, initialize, train_quantizer

CONFIG = {"hidden_size": 16, "num_codebooks": 4, "codebook_size": 32, "intermediate_size": 32}
OPTIONS = ["--codebook-size", "32", "--num-codebooks", "4", "--intermediate-size", "32", "--batch-size", "128"]


def mse(model: RQMoEModel, vectors: np.ndarray, **settings) -> float:
    return float(np.square(vectors - model.decompress(model.compress(vectors, **settings))).sum(1).mean())


def arguments(output: Path, **kwargs) -> RQMoETrainingArguments:
    defaults = {"num_train_epochs": 6, "per_device_train_batch_size": 128, "learning_rate": 3e-3, "disable_tqdm": True}
    return RQMoETrainingArguments(output_dir=str(output), **{**defaults, **kwargs})


@pytest.mark.parametrize("bf16", [False, True])
def test_training_lowers_the_error_of_held_out_vectors(clustered, tmp_path, bf16, monkeypatch, caplog):
    monkeypatch.setattr("rqmoe_hf.machine._processor_information", lambda: "flags : fpu avx2")
    train, held_out = clustered[1000:], clustered[:1000]
    config = RQMoEConfig(**CONFIG, training_loss="last_step")
    args = arguments(tmp_path, bf16=bf16)
    start = initialize(RQMoEModel(config), train, seed=args.seed).eval()  # where the run itself starts
    model = train_quantizer(config, load_embeddings(train), load_embeddings(held_out), args)
    assert mse(model, held_out) < 0.95 * mse(start, held_out)
    saved = RQMoEModel.from_pretrained(tmp_path)
    assert mse(saved, held_out) == mse(model, held_out)
    log = json.loads((tmp_path / "training_log.json").read_text())
    measured = [entry for entry in log if "eval_mse" in entry]
    assert len(measured) == 6
    assert {"eval_recall_at_1_1", "eval_recall_at_1_10", "eval_code_entropy_3", "eval_codes_used_0"} <= set(
        measured[0]
    )
    best = min(entry["eval_mse"] for entry in measured)
    assert best == pytest.approx(evaluate(saved, held_out)[0].mse, rel=1e-2 if bf16 else 1e-5)
    assert ("no instructions for bfloat16" in caplog.text) == bf16


def test_the_additive_quantizer_is_kept_where_experts_lose(clustered, tmp_path, caplog):
    """With a learning rate at which training only does harm, what it started from is saved, and the run says so."""
    train, held_out = load_embeddings(clustered[1000:]), load_embeddings(clustered[:1000])
    args = arguments(tmp_path, learning_rate=3.0, num_train_epochs=1, max_grad_norm=0.0)
    start = initialize(RQMoEModel(RQMoEConfig.additive(**CONFIG)), clustered[1000:], "lsq", seed=args.seed).eval()
    with caplog.at_level(logging.WARNING):
        model = train_quantizer(RQMoEConfig(**CONFIG), train, held_out, args, "lsq")
    assert "additive quantizer that training started from" in caplog.text
    saved = RQMoEModel.from_pretrained(tmp_path)
    assert not saved.config.has_experts and not model.config.has_experts
    expected = mse(start, clustered[:1000], beam_size=1, local_search=32)
    assert mse(saved, clustered[:1000]) == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "training.json").read_text())["member"] == "additive"


def test_lsq_needs_no_gradients(clustered, tmp_path):
    train, held_out = load_embeddings(clustered[1000:]), load_embeddings(clustered[:1000])
    config = RQMoEConfig.additive(**CONFIG, local_search=16)
    lsq = train_quantizer(config, train, held_out, arguments(tmp_path / "lsq"), "lsq")
    rq = initialize(RQMoEModel(RQMoEConfig.additive(**CONFIG)), clustered[1000:], "rq").eval()
    assert mse(lsq, clustered[:1000]) < 0.9 * mse(rq, clustered[:1000], beam_size=16)
    assert {"config.json", "model.safetensors", "evaluation.json"} <= {
        file.name for file in (tmp_path / "lsq").iterdir()
    }
    assert not list((tmp_path / "lsq").rglob("lsq.npz"))


def test_an_additive_quantizer_is_saved_with_the_rounds_that_suit_it(clustered, tmp_path):
    train, held_out = load_embeddings(clustered[1000:]), load_embeddings(clustered[:1000])
    config = RQMoEConfig.additive(hidden_size=16, num_codebooks=16, codebook_size=16, local_search=1)
    train_quantizer(config, train, held_out, arguments(tmp_path), "lsq", init_rounds=5, choose_local_search=True)
    saved = RQMoEModel.from_pretrained(tmp_path)
    found = {rounds: mse(saved, clustered[:1000], local_search=rounds) for rounds in (32, 64, 128, 256)}
    worthwhile = [rounds for rounds in (64, 128, 256) if found[rounds] <= 0.98 * found[rounds // 2]]
    assert saved.config.local_search == 32 * 2 ** len(worthwhile) > 32  # it pays less and less
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log[-1]["eval_mse"] == pytest.approx(mse(saved, clustered[100:1000]), rel=0.02)  # with these rounds


def test_the_trainer_refuses_a_model_without_data(clustered, tmp_path):
    data = load_embeddings(clustered)
    trainer = RQMoETrainer(
        RQMoEModel(RQMoEConfig(**CONFIG)), arguments(tmp_path), train_dataset=data, eval_dataset=data
    )
    with pytest.raises(ValueError, match="never initialised"):
        trainer.train()


def test_gradients_are_clipped_by_value(clustered, tmp_path):
    model = initialize(RQMoEModel(RQMoEConfig(**CONFIG)), clustered)
    args = arguments(tmp_path, max_grad_value=1e-4, max_grad_norm=0.0, max_steps=1, eval_strategy="no", save_strategy="no",  # noqa: E501
                     load_best_model_at_end=False)  # fmt: skip
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(
                max(weight.grad.abs().max().item() for group in self.param_groups for weight in group["params"])
            )
            return super().step(closure)

    optimizer = Spy(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    RQMoETrainer(model, args, train_dataset=load_embeddings(clustered), optimizers=(optimizer, schedule)).train()
    assert seen == [pytest.approx(1e-4)]


def test_the_finished_quantizer_may_search_wider(clustered, tmp_path):
    config = RQMoEConfig(**CONFIG | {"beam_size": 1})
    data = load_embeddings(clustered), load_embeddings(clustered[:500])
    model = train_quantizer(config, *data, arguments(tmp_path), final_beam_size=8).eval()
    assert RQMoEModel.from_pretrained(tmp_path).config.beam_size == 8
    assert mse(model, clustered[:500]) < mse(model, clustered[:500], beam_size=1)
    for settings, message in (
        ({"final_beam_size": 0}, "final_beam_size must be at least 1, got 0"),
        ({"init_method": "LSQ"}, "init_method must be one of rq, lsq, got 'LSQ'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_quantizer(config, *data, arguments(tmp_path / "other"), **settings)
    assert not (tmp_path / "other").exists()


def test_checkpoints_of_another_run_are_not_continued(clustered, tmp_path):
    """Nor is what one call was given changed by it: a notebook's cell runs again as it is."""
    config, args = RQMoEConfig(**CONFIG), arguments(tmp_path, num_train_epochs=1)
    data, held_out = load_embeddings(clustered), load_embeddings(clustered[:500])
    weights = train_quantizer(config, data, held_out, args, final_beam_size=2).state_dict()
    assert (config.beam_size, args.output_dir) == (4, str(tmp_path))
    again = train_quantizer(config, data, held_out, args, final_beam_size=2)
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    assert not list(tmp_path.rglob("checkpoints/checkpoints"))
    others = {
        "num_codebooks: 4 there, 2 now": (RQMoEConfig(**CONFIG | {"num_codebooks": 2}), data, {}),
        "training_loss": (RQMoEConfig(**CONFIG, training_loss="last_step"), data, {}),
        "init_method: 'rq' there, 'lsq' now": (config, data, {"init_method": "lsq"}),
        "data": (config, load_embeddings(clustered[::-1].copy()), {}),
        "started_from: None there": (again, data, {}),
    }
    before = (tmp_path / "model.safetensors").read_bytes()
    for message, (other, vectors, settings) in others.items():
        with pytest.raises(ValueError, match=message):
            train_quantizer(other, vectors, held_out, args, final_beam_size=2, **settings)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_a_stopped_run_started_from_is_not_the_next_ones(clustered, tmp_path):
    """It was killed before its first checkpoint: the next run may be of another kind."""
    good = initialize(RQMoEModel(RQMoEConfig.additive(**CONFIG | {"num_codebooks": 8})), clustered)
    good.save_pretrained(tmp_path / "checkpoints" / "additive")
    data = load_embeddings(clustered), load_embeddings(clustered[:500])
    train_quantizer(RQMoEConfig.additive(**CONFIG, local_search=2), *data, arguments(tmp_path), "lsq", init_rounds=2)
    assert RQMoEModel.from_pretrained(tmp_path).config.num_codebooks == CONFIG["num_codebooks"]


def test_one_process_trains_on_one_gpu(clustered, tmp_path, caplog):
    """The Trainer copies a model to all GPUs of its process otherwise."""
    args = arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with caplog.at_level(logging.WARNING):
        trainer = RQMoETrainer(RQMoEModel(RQMoEConfig(**CONFIG)), args, train_dataset=load_embeddings(clustered))
    assert "one of 2 GPUs" in caplog.text and "torchrun --nproc-per-node 2" in caplog.text
    assert trainer.args.n_gpu == 1


def test_the_additive_quantizer_may_search_wider_too(clustered, tmp_path):
    config = RQMoEConfig(**CONFIG | {"beam_size": 1})
    data = load_embeddings(clustered), load_embeddings(clustered[:500])
    args = arguments(tmp_path, num_train_epochs=1, learning_rate=1.0)  # experts that are no use
    kept = train_quantizer(config, *data, args, "rq", final_beam_size=8)
    assert not kept.config.has_experts and kept.config.beam_size == 8
    assert RQMoEModel.from_pretrained(tmp_path).config.beam_size == 8


def test_an_epoch_has_every_row_once(clustered, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=300, eval_strategy="no", load_best_model_at_end=False)
    data = load_embeddings(clustered[:1000])
    loader = RQMoETrainer(RQMoEModel(RQMoEConfig(**CONFIG)), args, train_dataset=data).get_train_dataloader()
    batches = [batch["embeddings"].cpu().numpy() for batch in loader]
    assert [len(batch) for batch in batches] == [300, 300, 300, 100]
    rows = np.concatenate(batches)
    assert rows.dtype == np.float32 and not np.array_equal(rows, clustered[:1000])
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(clustered[:1000], axis=0))


def test_the_trainer_writes_the_card_of_a_quantizer(clustered, tmp_path):
    model = initialize(RQMoEModel(RQMoEConfig(**CONFIG)), clustered)
    RQMoETrainer(model, arguments(tmp_path, eval_strategy="no", save_strategy="no", load_best_model_at_end=False),
                 train_dataset=load_embeddings(clustered)).create_model_card(model_name="org/name")  # fmt: skip
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "# RQ-MoE quantizer for embeddings of 16 dimensions" in card
    assert 'RQMoEModel.from_pretrained("org/name")' in card


def test_training_stops_early(clustered, tmp_path):
    args = arguments(tmp_path, early_stopping_patience=2, learning_rate=0.0, num_train_epochs=10)
    train_quantizer(RQMoEConfig(**CONFIG), load_embeddings(clustered), load_embeddings(clustered[:500]), args)
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert sum("eval_mse" in entry for entry in log) == 3


def test_training_from_a_stream(clustered, tmp_path):
    Dataset.from_dict({"embeddings": clustered.tolist()}).to_parquet(tmp_path / "train.parquet")
    stream = load_embeddings(tmp_path / "train.parquet", streaming=True)
    assert isinstance(stream, IterableDataset)
    args = arguments(
        tmp_path / "run", max_steps=60, eval_strategy="steps", save_strategy="steps", eval_steps=30, save_steps=30
    )
    config = RQMoEConfig(**CONFIG, training_loss="last_step")
    start = initialize(RQMoEModel(config), clustered, seed=args.seed).eval()  # where the run itself starts
    model = train_quantizer(config, stream, load_embeddings(clustered[:500]), args)
    assert mse(model, clustered[:500]) < mse(start, clustered[:500])


def command(tmp_path: Path, output: str, *extra: str) -> list[str]:
    data = ["--embeddings", str(tmp_path / "data.npy"), "--output", str(tmp_path / output)]
    return ["train", *data, *OPTIONS, "--epochs", "12", "--evaluations-per-epoch", "2", "--dropout", "0.1", *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def test_a_killed_run_continues_to_the_same_weights(clustered, tmp_path):
    np.save(tmp_path / "data.npy", clustered)
    runner = [sys.executable, "-m", "rqmoe_hf"]
    whole = subprocess.run([*runner, *command(tmp_path, "whole")], env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*runner, *command(tmp_path, "killed")], env=environment(), stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.time() + 120
    while len(list(checkpoints.glob("checkpoint-*/trainer_state.json"))) < 2 and time.time() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "config.json").exists()
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    cut_off = newest.with_name("checkpoint-99999")  # a kill while a checkpoint was written
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"half")
    again = subprocess.run([*runner, *command(tmp_path, "killed")], env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    first, second = (RQMoEModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert not list((tmp_path / "killed").glob(".saving-*"))


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_several_processes_train_one_model(clustered, tmp_path, launcher):
    np.save(tmp_path / "data.npy", clustered)
    if launcher == "torchrun":
        runner = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "rqmoe_hf",
        ]
    else:
        runner = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",  # noqa: E501
                  "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "rqmoe_hf"]  # fmt: skip
    done = subprocess.run(
        [*runner, *command(tmp_path, "run", "--patience", "3")], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    if launcher == "torchrun":  # accelerate's own launcher runs one process without GPUs and without MPI
        steps = [entry["step"] for entry in log if "eval_mse" in entry]
        assert steps[-1] <= 12 * (4800 // 256 + 1)  # two processes share each epoch's 4,800 vectors in batches of 128
    held_out = [entry["eval_mse"] for entry in log if "eval_mse" in entry]
    assert min(held_out) < 0.97 * held_out[0]


def test_recalls_by_hand():
    truth = np.array([list(range(10)), list(range(10, 20))])
    found = np.array([[1, 0, *range(20, 28)], [10, 11, 12, *range(30, 37)]])
    assert recalls(truth, found) == (0.5, 1.0, pytest.approx((2 + 3) / 20))
    entropy, used = code_usage(np.array([[0, 1], [0, 0], [1, 2], [1, 3]]), 4)
    assert entropy == [1.0, 2.0]
    assert used == [0.5, 1.0]


def test_evaluation_against_brute_force(clustered, tmp_path):
    model = initialize(
        RQMoEModel(RQMoEConfig.additive(hidden_size=16, num_codebooks=3, codebook_size=32)), clustered
    ).eval()
    queries, database = clustered[:50], clustered[50:1050]
    # One vector of each code: among equal ones, the order and with it the recall would be any sort's own.
    database = database[np.sort(np.unique(model.compress(database), axis=0, return_index=True)[1])]
    reports = evaluate(model, database, queries, num_codebooks=[1, 3])
    assert [report.bytes_per_vector for report in reports] == [1, 2]
    restored = model.decompress(model.compress(database))
    distances = np.square(queries[:, None] - database[None]).sum(-1)
    approximate = np.square(queries[:, None] - restored[None]).sum(-1)
    truth, found = distances.argsort(1)[:, :10], approximate.argsort(1)[:, :10]
    assert np.array_equal(nearest_neighbors(queries, database, 10), truth)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert reports[1].recall_10_at_10 == pytest.approx(shared, abs=1e-6)
    assert reports[1].mse == pytest.approx(np.square(database - restored).sum(1).mean(), rel=1e-5)
    assert reports[0].mse > reports[1].mse


@pytest.mark.parametrize(
    ("database", "queries", "message"),
    [
        (np.ones((20, 16)), np.ones((5, 8)), r"queries of shape \(n, 16\), n >= 1, got \(5, 8\)"),
        (np.ones((20, 8)), np.ones((5, 16)), r"embeddings of shape \(n, 16\), n >= 1, got \(20, 8\)"),
        (np.ones((20, 16)), np.full((5, 16), np.nan), "Queries must be finite, but row 0"),
    ],
)
def test_evaluation_refuses_what_cannot_be_ranked(paper_model, database, queries, message):
    with pytest.raises(ValueError, match=message):
        evaluate(paper_model, database, queries)


def test_evaluation_needs_ten_vectors_to_rank(paper_model, vectors):
    array = vectors.numpy()
    for fewest, queries in ((10, array[:20]), (11, None)):
        with pytest.raises(ValueError, match=f"at least {fewest} vectors.*, got {fewest - 1}"):
            evaluate(paper_model, array[: fewest - 1], queries)
        assert evaluate(paper_model, array[:fewest], queries)[0].recall_10_at_10 == 1.0  # all ten are neighbours
