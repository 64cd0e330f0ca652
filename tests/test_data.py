"""Sources of embeddings, resumable jobs and their files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from faiss.contrib.vecs_io import fvecs_write
from tqdm.auto import tqdm

from rqmoe_hf import RQMoEModel
from rqmoe_hf.data import (
    as_array,
    codes_info,
    compress_shards,
    decompress_shards,
    embed_texts,
    jobs,
    load_embeddings,
    shards,
)


@pytest.mark.parametrize("suffix", ["npy", "fvecs", "parquet", "arrow", "folder", "saved", "array", "column"])
def test_embeddings_from_every_source(clustered, tmp_path, suffix):
    expected, column = clustered[:200], "embeddings"
    source = tmp_path / f"data.{suffix}"
    dataset = Dataset.from_dict({"text": ["a"] * 200, "embeddings": expected.tolist()})
    if suffix == "npy":
        np.save(source, expected.astype(np.float64))
    elif suffix == "fvecs":
        fvecs_write(str(source), expected)
    elif suffix == "parquet":
        dataset.to_parquet(source)
    elif suffix == "arrow":
        with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_stream(sink, dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table)
    elif suffix == "folder":
        source.mkdir()
        for part in range(2):
            dataset.select(range(part * 100, part * 100 + 100)).to_parquet(source / f"{part}.parquet")
    elif suffix == "saved":
        dataset.save_to_disk(source)
    elif suffix == "array":
        source = expected
    else:
        source, column = dataset.rename_column("embeddings", "vector"), "vector"
    loaded = load_embeddings(source, column)
    assert loaded.column_names == ["embeddings"]
    np.testing.assert_allclose(as_array(loaded), expected, rtol=1e-6)
    np.testing.assert_allclose(loaded[3]["embeddings"], expected[3], rtol=1e-6)


def test_bvecs_become_floats(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (50, 8), dtype=np.uint8)
    with open(tmp_path / "data.bvecs", "wb") as file:
        for row in values:
            file.write(np.int32(8).tobytes() + row.tobytes())
    assert np.array_equal(as_array(load_embeddings(tmp_path / "data.bvecs")), values.astype(np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.npy", "no file"),
        (lambda folder: folder / "none.parquet", "no file or folder"),
        (lambda folder: folder, "No parquet files"),
        (lambda folder: np.ones((3, 4), int), "Expected floats"),
        (lambda folder: np.ones(3), "Expected floats"),
        (lambda folder: Dataset.from_dict({"text": ["a"]}), "no column 'embeddings'; the columns are text"),
    ],
)
def test_bad_sources_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_embeddings(make(tmp_path))


def test_rows_of_different_lengths_are_refused():
    dataset = load_embeddings(Dataset.from_dict({"embeddings": [[1.0, 2.0], [1.0]]}))
    with pytest.raises(ValueError, match="vectors of one length"):
        as_array(dataset)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda number: pa.list_(number, 2)])
@pytest.mark.parametrize("number", [pa.int8(), pa.int64(), pa.float16(), pa.float64()])
def test_only_lists_of_floats_are_embeddings(kind, number):
    """As with arrays: integers would be in other units than the quantizer's."""
    rows = np.array([[1, 2], [3, 4]], number.to_pandas_dtype())
    dataset = load_embeddings(Dataset(pa.table({"embeddings": pa.array(list(rows), kind(number))})))
    if np.issubdtype(rows.dtype, np.floating):
        assert np.array_equal(as_array(dataset), rows)
    else:
        with pytest.raises(ValueError, match=f"lists of floating point numbers, got a column of .*{number}"):
            as_array(dataset)


@pytest.mark.parametrize(("values", "kind"), [(["a", "b"], "string"), ([1.0, 2.0], "double"), ([[[1.0]]], "list")])
def test_columns_of_no_vectors_are_refused(values, kind):
    with pytest.raises(ValueError, match=f"lists of floating point numbers, got a column of {kind}"):
        as_array(load_embeddings(Dataset.from_dict({"embeddings": values})))


def test_a_split_that_is_not_there_is_refused(clustered, tmp_path):
    rows = {"embeddings": clustered[:3].tolist()}
    DatasetDict({"train": Dataset.from_dict(rows), "rest": Dataset.from_dict(rows)}).save_to_disk(tmp_path)
    np.testing.assert_allclose(as_array(load_embeddings(tmp_path, split="rest")), clustered[:3], rtol=1e-6)
    with pytest.raises(ValueError, match="no split 'test' in .*; the splits are train, rest"):
        load_embeddings(tmp_path, split="test")


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        load_embeddings(tmp_path / "data.npy")


def test_codes_in_parquet(clustered, quantizer, tmp_path):
    ids = [f"doc-{row}" for row in range(500)]
    Dataset.from_dict({"id": ids, "embeddings": clustered[:500].tolist()}).to_parquet(tmp_path / "in.parquet")
    model = RQMoEModel.from_pretrained(quantizer).eval()
    files = compress_shards(tmp_path / "in.parquet", tmp_path / "codes", model, shard_size=200)
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    schema = pq.read_schema(files[0])
    assert schema.field("codes").type == pa.list_(pa.uint8(), 2)
    info = codes_info(tmp_path / "codes")
    assert info["model"] == quantizer
    assert (info["num_codebooks"], info["codebook_size"]) == (3, 32)
    loaded = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    assert loaded["id"][:] == ids
    codes = loaded.with_format("numpy", columns=["codes"], dtype=np.uint8)[:]["codes"]
    assert np.array_equal(codes, model.compress(clustered[:500]))
    restored = decompress_shards(tmp_path / "codes", tmp_path / "restored", model)
    table = pq.read_table(restored[0])
    assert table["id"].to_pylist() == ids
    assert np.array_equal(as_array(load_embeddings(tmp_path / "restored")), model.decompress(codes))


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many rows the progress bars of jobs went on by, each time."""
    seen: list[int] = []

    class Bar(tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    monkeypatch.setattr(shards, "tqdm", Bar)
    return seen


def test_progress_shows_within_a_shard(clustered, quantizer, tmp_path, steps):
    many = np.tile(clustered, (3, 1))
    np.save(tmp_path / "in.npy", many)
    model = RQMoEModel.from_pretrained(quantizer).eval()
    (file,) = compress_shards(tmp_path / "in.npy", tmp_path / "codes", model)
    assert [step for step in steps if step] == [8_192, 8_192, 1_616]
    codes = pq.read_table(file)["codes"].combine_chunks()
    assert np.array_equal(codes.flatten().to_numpy().reshape(len(many), -1), model.compress(many))


def test_texts_are_embedded_piece_by_piece(encoder, tmp_path, steps, monkeypatch):
    monkeypatch.setattr(jobs, "TEXTS_AT_A_TIME", 5)
    texts = [f"This is text {row}, " + "which is longer than others. " * (row % 4) for row in range(12)]
    embed_texts(Dataset.from_dict({"text": texts}), tmp_path / "out", encoder)
    assert [step for step in steps if step] == [5, 5, 2]
    from sentence_transformers import SentenceTransformer

    embeddings = as_array(load_embeddings(tmp_path / "out"))
    np.testing.assert_allclose(embeddings, SentenceTransformer(encoder).encode(texts), atol=1e-5)


def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_source(clustered, quantizer, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "VECTORS_AT_A_TIME", 30)
    vectors = clustered[:200].copy()
    vectors[[187, 190]] = np.inf
    np.save(tmp_path / "in.npy", vectors)
    model = RQMoEModel.from_pretrained(quantizer).eval()
    with pytest.raises(ValueError, match="row 187 of the source"):
        compress_shards(tmp_path / "in.npy", tmp_path / "codes", model, shard_size=70)


def test_codes_of_another_quantizer_are_refused(clustered, quantizer, tmp_path):
    np.save(tmp_path / "in.npy", clustered[:100])
    model = RQMoEModel.from_pretrained(quantizer).eval()
    compress_shards(tmp_path / "in.npy", tmp_path / "codes", model)
    model.codebooks.data[0, 0, 0] += 1
    with pytest.raises(ValueError, match="made by .* not by"):
        decompress_shards(tmp_path / "codes", tmp_path / "restored", model)
    with pytest.raises(ValueError, match="another job"):
        compress_shards(tmp_path / "in.npy", tmp_path / "codes", model)
    with pytest.raises(ValueError, match="holds no codes"):
        codes_info(tmp_path / "in.npy")


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-m", "rqmoe_hf", *arguments], env=environment, capture_output=True, text=True, **kwargs
    )


def kill_after_first_shard(output: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "rqmoe_hf", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (output / "part-00000.parquet").exists() and time.time() < deadline:
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_killed_compress_continues(clustered, quantizer, tmp_path):
    np.save(tmp_path / "in.npy", np.tile(clustered, (5, 1)))

    def arguments(name: str) -> list[str]:
        return [
            "compress",
            str(tmp_path / "in.npy"),
            "--output",
            str(tmp_path / name),
            "--model",
            quantizer,
            "--shard-size",
            "1000",
        ]

    whole = run(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    kill_after_first_shard(tmp_path / "killed", *arguments("killed"))
    done = list((tmp_path / "killed").glob("part-*.parquet"))
    assert 1 <= len(done) < 30
    written = {file: file.stat().st_mtime_ns for file in done}
    (tmp_path / "killed" / ".part-00009.parquet.tmp").write_bytes(b"half")
    assert run(*arguments("killed")).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in written.items())


def test_a_killed_embed_continues(encoder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"This is the text with number {row}." for row in range(600)))

    def arguments(name: str) -> list[str]:
        return [
            "embed",
            str(tmp_path / "texts.txt"),
            "--output",
            str(tmp_path / name),
            "--encoder",
            encoder,
            "--shard-size",
            "64",
        ]

    whole = run(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    kill_after_first_shard(tmp_path / "killed", *arguments("killed"))
    assert 1 <= len(list((tmp_path / "killed").glob("part-*.parquet"))) < 10
    assert run(*arguments("killed")).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(encoder).encode([f"This is the text with number {row}." for row in (0, 599)])
    embeddings = as_array(load_embeddings(tmp_path / "killed"))
    np.testing.assert_allclose(embeddings[[0, 599]], expected, atol=1e-5)
    changed = run(*arguments("killed"), "--dtype", "bfloat16")
    assert changed.returncode == 1
    assert "dtype: 'float32' there, 'bfloat16' now" in changed.stderr


def test_embed_refuses_a_missing_column(encoder, tmp_path):
    with pytest.raises(ValueError, match="no column 'body'; the columns are text"):
        embed_texts(Dataset.from_dict({"text": ["a"]}), tmp_path / "out", encoder, text_column="body")
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_the_job(clustered, quantizer, tmp_path):
    np.save(tmp_path / "in.npy", clustered[:100])
    compress_shards(tmp_path / "in.npy", tmp_path / "codes", RQMoEModel.from_pretrained(quantizer).eval())
    manifest = json.loads((tmp_path / "codes" / "rqmoe_job.json").read_text())
    assert manifest["job"] == "compress"
    assert manifest["rows"] == 100
