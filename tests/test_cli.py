"""The command line as a user meets it: help, exit codes, messages, and whole workflows."""

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import faiss
import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from rqmoe_hf import RQMoEConfig
from rqmoe_hf.cli import app
from rqmoe_hf.cli.advice import advice
from rqmoe_hf.demo import collect_documentation

VERBS = ["demo", "embed", "train", "compress", "decompress", "evaluate", "push", "info", "convert", "serve", "index"]


@pytest.fixture
def rqmoe(forked):
    """The command, in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        program = "import runpy, sys\nsys.argv[1:] = {!r}\nrunpy.run_module('rqmoe_hf', run_name='__main__')"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        return forked(program.format(list(arguments)), Path.cwd(), environment)

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
    listed = CliRunner().invoke(app, ["--help"]).output
    assert verb in listed


def test_versions_are_those_that_are_installed(monkeypatch):
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith(f"rqmoe_hf {metadata.version('rqmoe-hf')}, Python 3.")
    assert f"\ntorch {metadata.version('torch')}\n" in result.output
    monkeypatch.setattr("rqmoe_hf.cli.USED", ("no-such-library",))
    assert "no-such-library is not installed" in CliRunner().invoke(app, ["--version"]).output


def test_train_evaluate_compress_decompress_info(clustered, tmp_path, rqmoe):
    np.save(tmp_path / "train.npy", clustered[1000:])
    np.save(tmp_path / "test.npy", clustered[:1000])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"embeddings: {tmp_path / 'train.npy'}\nnum_codebooks: 3\ncodebook_size: 16\nepochs: 1\nintermediate_size: 8\n"
    )
    model = str(tmp_path / "model")
    trained = rqmoe("train", "--recipe", str(recipe), "--output", model, "--epochs", "2")
    assert trained.returncode == 0, trained.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_codebooks"], config["codebook_size"]) == (3, 16)
    log = json.loads((tmp_path / "model" / "training_log.json").read_text())
    assert max(entry["epoch"] for entry in log) == 2  # the command line wins over the recipe

    report = tmp_path / "report.json"
    measured = rqmoe("evaluate", str(tmp_path / "test.npy"), "--model", model, "--prefixes", "--json", str(report))
    assert measured.returncode == 0, measured.stderr
    rows = json.loads(report.read_text())["reports"]
    assert [row["num_codebooks"] for row in rows] == [1, 2, 3]
    assert rows[0]["mse"] > rows[1]["mse"] > rows[2]["mse"]

    assert "Verdict: trust it" in measured.stdout  # held out of the same collection
    folder = {file.name for file in (tmp_path / "model").iterdir() if file.is_file()}
    assert folder == {"README.md", "config.json", "evaluation.json", "model.safetensors", "training.json",
                      "training_log.json"}  # fmt: skip

    codes, restored = str(tmp_path / "codes"), str(tmp_path / "restored")
    assert rqmoe("compress", str(tmp_path / "test.npy"), "-o", codes, "--model", model).returncode == 0
    assert rqmoe("decompress", codes, "-o", restored, "--model", model).returncode == 0
    shown = rqmoe("info", model)
    assert "3 x 16 codewords, 12 bits" in shown.stdout
    assert model in rqmoe("info", codes).stdout

    tuned = rqmoe(
        "train",
        "--from",
        model,
        "--embeddings",
        str(tmp_path / "train.npy"),
        "-o",
        str(tmp_path / "tuned"),
        "--epochs",
        "1",
    )
    assert tuned.returncode == 0, tuned.stderr

    start = ["train", "--from", model, "--embeddings", str(tmp_path / "train.npy"), "-o", str(tmp_path / "again")]
    refused = rqmoe(*start, "--bytes", "1", "--member", "additive", "--epochs", "1")
    assert refused.returncode == 1 and "--member, --bytes would describe a new one" in refused.stderr
    assert not (tmp_path / "again").exists()
    changed = rqmoe(*start, "--epochs", "1", "--loss", "last_step", "--beam-size", "2", "--dropout", "0.1")
    assert changed.returncode == 0, changed.stderr
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["training_loss"], config["beam_size"], config["dropout"]) == ("last_step", 2, 0.1)


def test_train_from_texts(encoder, tmp_path, rqmoe):
    lines = [f"The {color} {animal} {verb} over {number} fences." for color in ("red", "green", "grey") for animal in
             ("fox", "cat", "dog") for verb in ("jumps", "flies") for number in range(12)]  # fmt: skip
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    result = rqmoe("train", "--texts", str(tmp_path / "texts.txt"), "--encoder", encoder, "-o", str(tmp_path / "model"),  # noqa: E501
                   "--codebook-size", "16", "--num-codebooks", "2", "--epochs", "1", "--intermediate-size", "8",
                   "--evaluation-size", "40", "--batch-size", "32")  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["base_model"] == encoder
    assert config["hidden_size"] == 384


@pytest.mark.parametrize("evaluations", [1, 2])
def test_train_from_a_stream(clustered, tmp_path, evaluations, rqmoe):
    np.save(tmp_path / "held_out.npy", clustered[4000:])
    Dataset.from_dict({"embeddings": clustered[:4000].tolist()}).to_parquet(tmp_path / "train" / "part.parquet")
    done = rqmoe(
        "train", "--streaming", "--embeddings", str(tmp_path / "train"), "-o", str(tmp_path / "out"),
        "--evaluation", str(tmp_path / "held_out.npy"), "--max-steps", "40", "--batch-size", "64",
        "--gradient-accumulation-steps", "2", "--limit", "3000", "--evaluations-per-epoch", str(evaluations),
        "--num-codebooks", "2", "--codebook-size", "32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((tmp_path / "out" / "training_log.json").read_text("utf-8"))
    steps = [entry["step"] for entry in log if "eval_mse" in entry]
    assert steps == ([40] if evaluations == 1 else [20, 40])
    assert json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))["batch_size"] == 128
    assert "3,000 embeddings are few for experts" in done.stdout


def test_who_has_few_embeddings_is_told_what_may_serve_better():
    experts, codebooks = RQMoEConfig(hidden_size=384), RQMoEConfig.additive(hidden_size=384)
    assert ["few for experts" in said for said in advice(50_000, experts)] == [True]
    (said,) = advice(5_000, codebooks)
    assert "from all-MiniLM-L6-v2" in said and "--from minilm-384-" in said
    assert len(advice(5_000, experts)) == 2
    assert advice(5_000, RQMoEConfig.additive(hidden_size=384, base_model="org/another-encoder")) == []
    (said,) = advice(5_000, RQMoEConfig.additive(hidden_size=768, base_model="me/all-mpnet-base-v2"))
    assert "mpnet-768-16-bytes" in said
    assert advice(100_000, experts) == advice(30_000, codebooks) == advice(None, experts) == []


def test_train_additive(clustered, tmp_path, rqmoe):
    np.save(tmp_path / "vectors.npy", clustered)
    options = ["--additive", "--num-codebooks", "3", "--codebook-size", "32", "--evaluation-size", "500"]
    done = rqmoe("train", "--embeddings", str(tmp_path / "vectors.npy"), "-o", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["beam_size"], config["local_search"]) == (0, 1, 32)
    assert "LSQ" in (tmp_path / "out" / "README.md").read_text()


def test_train_experts_on_reconstructions(clustered, tmp_path, rqmoe):
    np.save(tmp_path / "vectors.npy", clustered)
    options = ["--conditioning", "reconstruction", "--num-experts", "1", "--intermediate-size", "32"]
    options += ["--num-codebooks", "3", "--codebook-size", "32", "--beam-size", "1", "--final-beam-size", "8"]
    options += ["--weight-decay", "0.1", "--batch-size", "128", "--learning-rate", "0.004", "--loss", "per_step"]
    done = rqmoe("train", "--embeddings", str(tmp_path / "vectors.npy"), "-o", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["conditioning"], config["gate"], config["residual"]) == ("reconstruction", "none", True)
    assert (config["num_experts"], config["beam_size"]) == (1, 8)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["member"] == "qinco"


def test_a_fit_check_on_texts(encoder, tmp_path, rqmoe):
    lines = [" ".join(text.split()[:30]) for text in collect_documentation()[1][:400]]
    (tmp_path / "texts.txt").write_text("\n".join(lines), "utf-8")
    report = tmp_path / "report.json"
    result = rqmoe("evaluate", "--model", "minilm-384-8-bytes", "--texts", str(tmp_path / "texts.txt"),
                   "--encoder", encoder, "--json", str(report))  # fmt: skip
    assert result.returncode == 0, result.stderr
    fit = json.loads(report.read_text("utf-8"))["fit"]
    assert fit["mse"][0] < 1.5 * fit["mse"][1]  # English prose, and the right encoder
    assert fit["mean_norm"] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert f"recall@10   {fit['recall_10_at_10'][0]:6.3f} {fit['recall_10_at_10'][1]:6.3f}" in result.stdout
    assert "Verdict: " in result.stdout


def test_convert(clustered, tmp_path, rqmoe):
    index = faiss.IndexPQ(16, 4, 4)
    index.train(clustered)
    faiss.write_index(index, str(tmp_path / "pq.index"))
    done = rqmoe("convert", str(tmp_path / "pq.index"), "-o", str(tmp_path / "model"), "--format", "faiss")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "no-such-quantizer"], "There is no quantizer 'no-such-quantizer'"),
        (["evaluate", "--model", "minilm-384-32-bytes"], "Give embeddings, or --texts, to measure on"),
        (["evaluate", "--model", "minilm-384-32-bytes", "--texts", "none.txt"], "no file or folder none.txt"),
        (["push", "no-such-quantizer", "org/name"], "There is no quantizer 'no-such-quantizer'"),
        (["compress", "none.npy", "-o", "codes", "--model", "minilm-384-32-bytes"], "There is no file none.npy"),
        (["compress", "a.npy", "-o", "out", "--model", "none", "--workers", "2"], "only with --engine ray"),
        (["embed", "a.txt", "-o", "out", "--encoder", "x", "--engine", "spark"], "must be local or ray, got 'spark'"),
        (["train", "-o", "run"], "Give either --embeddings, or --texts and --encoder"),
        (
            ["train", "-o", "run", "--embeddings", "none", "--bytes", "16", "--codebook-sizes", "256x16"],
            "give one, not 16 and '256x16'",
        ),
        (["train", "-o", "run", "--embeddings", "x", "--streaming"], "give --max-steps and --evaluation"),
        (["convert", "none.pt", "-o", "out", "--format", "official"], "--scale belongs to --format official"),
        (["convert", "none.pt", "-o", "out", "--format", "qinco"], "There is no file none.pt"),
        (["embed", "none.txt", "-o", "out", "--encoder", "x"], "no file or folder none.txt"),
        (
            ["evaluate", "a.npy", "--model", "none", "--save", "--json", "b.json", "--prefixes", "--queries", "c.npy",
             "--beam-size", "8", "--num-candidates", "8", "--local-search", "0"],
            "--queries, --prefixes, --num-candidates, --beam-size, --local-search, --json: not with --save",
        ),
        (["compress", "a.npy", "-o", "out", "--model", "none", "--dtype", "fp16"], "float32, bfloat16, got 'fp16'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, arguments, message, rqmoe):
    monkeypatch.chdir(tmp_path)
    result = rqmoe(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "4"], "at least 11 held-out ones, got 4 and 0"),
        (["--limit", "54"], "got 44 and 10"),
        (["--limit", "0"], "got 0 and 0"),
        (["--evaluation-size", "0"], "got 600 and 0"),
        (["--limit", "0", "--evaluation", "vectors.npy"], "got 0 and 600"),
        (["--evaluations-per-epoch", "0"], "Invalid value for '--evaluations-per-epoch'"),
    ],
)
def test_training_on_nothing_is_refused(clustered, tmp_path, monkeypatch, options, message, rqmoe):
    monkeypatch.chdir(tmp_path)
    np.save("vectors.npy", clustered[:600])
    result = rqmoe("train", "--embeddings", "vectors.npy", "-o", "out", *options)
    assert result.returncode in (1, 2)  # 2: refused by the option itself
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.npy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("codebok_size: 16\n", "codebok_size"),
        ("epochs: 1\nlimit: ]\nseed: 0\n", "recipe.yaml is no YAML in line 2: "),
        ("epochs: \0\n", "recipe.yaml is no YAML: unacceptable character"),
    ],
)
def test_a_recipe_with_a_typo_is_refused(tmp_path, text, message, rqmoe):
    (tmp_path / "recipe.yaml").write_text(text)
    result = rqmoe("train", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
