"""Ray's workers against the one-process command: the same files, whatever dies in between."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from s3_server import S3Server
from typer.testing import CliRunner

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason='pip install "rqmoe-hf[ray]"')

from rqmoe_hf import RQMoEModel  # noqa: E402
from rqmoe_hf.cli import app  # noqa: E402
from rqmoe_hf.data import CompressBatch, ParquetFiles, compress_shards, embed_texts, shards  # noqa: E402
from rqmoe_hf.data import ray_engine as ray_module  # noqa: E402
from rqmoe_hf.data.ray_engine import RayEngine  # noqa: E402
from rqmoe_hf.data.shards import fixed_size_column, write_shards  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(num_cpus=2, object_store_memory=150_000_000, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": paths}})  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(clustered, tmp_path_factory) -> Path:
    """24,000 vectors in four files of different lengths, with several row groups each."""
    folder = tmp_path_factory.mktemp("source")
    vectors = np.tile(clustered, (4, 1))
    bounds = [0, 3_000, 10_001, 17_777, 24_000]
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        table = pa.table({"id": pa.array([f"doc-{row}" for row in range(start, stop)], pa.string()),
                          "embeddings": fixed_size_column(vectors[start:stop])})  # fmt: skip
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=1_700)
    return folder


@pytest.fixture(scope="module")
def expected(source, quantizer, tmp_path_factory) -> dict[str, bytes]:
    """What the one-process command writes."""
    folder = tmp_path_factory.mktemp("expected") / "codes"
    run("compress", source, "-o", folder, "--model", quantizer, "--shard-size", 1_000)
    return contents(folder)


def run(*arguments) -> None:
    """The command in this process: a new one would import everything again."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def load(quantizer: str) -> RQMoEModel:
    return RQMoEModel.from_pretrained(quantizer).eval()


def test_a_killed_worker_loses_and_doubles_no_block(cluster, source, quantizer, expected, tmp_path, monkeypatch):
    engine, written, killed = RayEngine(workers=2), Counter(), []
    write_whole = shards._write_whole

    def count(file, content):
        written[file.name] += 1
        write_whole(file, content)

    def kill():
        deadline = time.time() + 600  # workers begin after minutes where tests of others take all cores
        while not engine.peak_memory and time.time() < deadline:
            time.sleep(0.002)
        process = int(next(iter(engine.peak_memory)).rpartition(":")[2])
        os.kill(process, signal.SIGKILL)
        killed.append((process, len(written)))

    monkeypatch.setattr(shards, "_write_whole", count)
    killer = threading.Thread(target=kill)
    killer.start()
    compress_shards(source, tmp_path / "codes", load(quantizer), shard_size=1_000, engine=engine)
    killer.join()
    process, written_before = killed[0]
    assert written_before < 15, "the worker was killed too late to matter"
    assert not Path(f"/proc/{process}").exists()
    assert len(engine.peak_memory) >= 2  # another one has worked
    assert contents(tmp_path / "codes") == expected
    assert set(written.values()) == {1} and len(written) == 25  # and the manifest
    assert all(memory > 100e6 for memory in engine.peak_memory.values())  # torch alone takes that


def test_each_engine_continues_the_other_ones_job(cluster, source, quantizer, expected, tmp_path):
    compress_shards(source, tmp_path / "codes", load(quantizer), shard_size=1_000)
    for order in (RayEngine(workers=1), None):
        for part in (3, 23):
            (tmp_path / "codes" / f"part-{part:05d}.parquet").unlink()
        (tmp_path / "codes" / ".part-00003.parquet.tmp").write_bytes(b"half")
        kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "codes").glob("part-*")}
        compress_shards(source, tmp_path / "codes", load(quantizer), shard_size=1_000, engine=order)
        assert contents(tmp_path / "codes") == expected
        assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())


def test_a_killed_command_continues(source, quantizer, expected, tmp_path):
    codes = tmp_path / "codes"
    arguments = ["compress", source, "-o", codes, "--model", quantizer, "--shard-size", 1_000]
    command = [sys.executable, "-m", "rqmoe_hf", *map(str, arguments), "--engine", "ray", "--workers", "1"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (codes / "part-00000.parquet").exists() and time.time() < deadline:
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 1 <= len(list(codes.glob("part-*.parquet"))) < 24
    run(*arguments)
    assert contents(codes) == expected


def test_embed_and_compress_in_one_pass(cluster, encoder, tmp_path):
    texts = [f"This is the text with number {row}." for row in range(96)]
    pq.write_table(pa.table({"id": range(96), "text": texts}), tmp_path / "texts.parquet")
    quantizer = ROOT / "model_cards" / "minilm-384-8-bytes"
    options = {"encoder": encoder, "shard_size": 40}
    embed_texts(tmp_path / "texts.parquet", tmp_path / "embeddings", **options)
    embed_texts(tmp_path / "texts.parquet", tmp_path / "ray", **options, engine=RayEngine(workers=1))
    assert contents(tmp_path / "ray") == contents(tmp_path / "embeddings")
    compress_shards(tmp_path / "embeddings", tmp_path / "codes", load(quantizer), shard_size=40)
    command = ["embed", tmp_path / "texts.parquet", "-o", tmp_path / "both", "--encoder", encoder, "--shard-size", 40,
               "--compress", "minilm-384-8-bytes", "--engine", "ray", "--workers", 1]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert "Wrote 3 files" in done.output
    assert re.search(r"Peak memory of the workers: \d[\d,]+ MB\.", done.output)
    parts = {name: part for name, part in contents(tmp_path / "codes").items() if name.startswith("part")}
    both = contents(tmp_path / "both")
    assert {name: both[name] for name in parts} == parts
    assert set(both) == {*parts, "rqmoe_job.json"}


def test_the_callable_in_map_batches(cluster, source, quantizer, clustered):
    rows = ray.data.read_parquet(str(source / "0.parquet")).map_batches(
        CompressBatch,
        fn_constructor_args=[quantizer],
        fn_constructor_kwargs={"keep_embeddings": False},
        batch_size=500,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    table = {row["id"]: row["codes"] for row in rows.take_all()}
    assert np.array_equal(
        np.stack([table[f"doc-{row}"] for row in range(3_000)]), load(quantizer).compress(clustered[:3_000])
    )


@pytest.mark.parametrize("damage", ["missing", "width", "cut"])
def test_bad_rows_are_named_and_leave_nothing(cluster, quantizer, tmp_path, damage):
    rows: list = np.ones((50, 15 if damage == "width" else 16), np.float32).tolist()
    if damage != "width":
        rows[33] = None if damage == "missing" else rows[33][:7]
    pq.write_table(pa.table({"embeddings": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "in.parquet")
    message = "16" if damage == "width" else "vectors of one length"
    with pytest.raises(ValueError, match=message):
        compress_shards(tmp_path / "in.parquet", tmp_path / "codes", load(quantizer), engine=RayEngine(workers=1))
    assert [file.name for file in tmp_path.iterdir()] == ["in.parquet"]


def die(start: int, stop: int) -> pa.Table:
    if start == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return pa.table({"row": range(start, stop)})


def test_a_block_that_kills_its_workers_ends_the_job(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_module, "ATTEMPTS", 2)
    with pytest.raises(ValueError, match="died over the rows 10 to 20"):
        write_shards(tmp_path / "out", 30, 10, {}, die, "die", RayEngine(workers=1))


def begin(folder: Path, start: int, stop: int) -> pa.Table:
    (folder / str(start)).touch()
    return pa.table({"noise": np.random.default_rng(start).integers(0, 256, 8_000_000, dtype=np.uint8)})


def test_a_slow_disk_holds_the_workers_back(cluster, tmp_path, monkeypatch):
    (tmp_path / "begun").mkdir()
    ahead, write_whole = [], shards._write_whole

    def write_slowly(file, content):
        time.sleep(0.1)
        ahead.append(len(list((tmp_path / "begun").iterdir())) - len(ahead))
        write_whole(file, content)

    monkeypatch.setattr(shards, "_write_whole", write_slowly)
    write_shards(tmp_path / "out", 40, 1, {}, partial(begin, tmp_path / "begun"), "begin", RayEngine(workers=1))
    assert max(ahead) < 15  # of 8 MB each; Ray holds 150 MB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be at least 1, got 0"),
        ({"gpus_per_worker": -1}, "gpus_per_worker must not be negative, got -1"),
    ],
)
def test_impossible_workers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RayEngine(**options)


def test_a_cluster_that_is_too_small_is_named(cluster, source, quantizer, tmp_path):
    engine = RayEngine(workers=2, cpus_per_worker=2)
    with pytest.raises(ValueError, match="2 workers of 2 CPUs and 0 GPUs do not fit into a cluster of 2 CPUs"):
        compress_shards(source, tmp_path / "codes", load(quantizer), engine=engine)
    assert not (tmp_path / "codes").exists()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "rqmoe-hf\[ray\]"'):
        RayEngine()


def test_sources_that_workers_cannot_read_are_refused(source, quantizer, tmp_path):
    np.save(tmp_path / "in.npy", np.ones((4, 16), np.float32))
    pq.write_table(pa.table({"id": ["a"], "embeddings": [[1.0]]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"id": [1], "embeddings": [[1.0]]}), tmp_path / "1.parquet")
    refused = {"in.npy": "expected a .parquet file", "none": "no file or folder", ".": "other columns"}
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            compress_shards(tmp_path / name, tmp_path / "codes", load(quantizer), engine=RayEngine())
    with pytest.raises(ValueError, match="no column 'vector'; the columns are id, embeddings"):
        compress_shards(source, tmp_path / "codes", load(quantizer), "vector", engine=RayEngine())
    assert not (tmp_path / "codes").exists()


def test_parquet_files_read_the_rows_asked_for(source, tmp_path):
    source = shutil.copytree(source, tmp_path / "source")
    pq.write_table(pq.read_table(source / "0.parquet")[:0], source / "1-empty.parquet")
    whole = pa.concat_tables([pq.read_table(file) for file in sorted(source.iterdir())])
    files = ParquetFiles(source)
    assert (len(files), files.column_names) == (24_000, ["id", "embeddings"])
    for rows in (range(2_990, 10_050), range(0, 1), np.array([0, 1_699, 1_700, 2_999, 3_000, 10_001, 23_999])):
        assert files.select(rows).data.table.equals(whole.take(np.asarray(rows)))
    assert ParquetFiles(f"file://{source}").select(range(5), ["id"])["id"][:] == [f"doc-{row}" for row in range(5)]


def test_a_folder_on_the_hub(source, quantizer, expected, tmp_path):
    code = """
        import sys
        from rqmoe_hf.cli import app
        for engine in ("local", "ray"):
            app(["compress", "hf://datasets/org/vectors", "-o", engine, "--model", sys.argv[1], "--shard-size", "1000",
                 "--engine", engine, *(["--workers", "1"] if engine == "ray" else [])], standalone_mode=False)
    """
    with HubServer() as server:
        server.put_folder("org/vectors", source, "dataset")
        environment = {**os.environ, **server.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", textwrap.dedent(code), quantizer]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for engine in ("local", "ray"):
        assert contents(tmp_path / engine) == expected


def test_a_folder_in_object_storage(cluster, source, quantizer, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with S3Server() as server:
        server.put_folder("bucket/some/vectors", source)
        files = ParquetFiles(server.url("bucket/some/vectors"))
        assert len(files) == 24_000
        before = server.sent
        files.select(range(100), ["id"])
        assert server.sent - before < len(server.objects["bucket/some/vectors/0.parquet"]) / 2
        compress_shards(server.url("bucket/some/vectors"), tmp_path / "codes", load(quantizer), shard_size=1_000,
                        engine=RayEngine(workers=2))  # fmt: skip
        assert contents(tmp_path / "codes") == expected
        with pytest.raises(ValueError, match="no file or folder s3://bucket/none"):
            ParquetFiles(server.url("bucket/none"))
