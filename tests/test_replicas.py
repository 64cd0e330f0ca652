"""Replicas of shards that Ray Serve keeps: real processes, one of which is killed under load."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMON, SIZE, randomize
from test_serve import Letters, ask, found, serving
from typer.testing import CliRunner

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.cli import app as command_line
from rqmoe_hf.index import RQMoEIndex, RQMoEShards
from rqmoe_hf.index.shard import Shard
from rqmoe_hf.serve import LiveShards
from rqmoe_hf.serve.guard import Workers

CLIENTS, QUERIES = 50, 8  # of each
TEXTS = [f"text {number}" for number in range(1200)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two aligned shards, one index with the same rows, two shards that are not aligned, and the quantizer."""
    place = tmp_path_factory.mktemp("replicas")
    randomize(RQMoEModel(RQMoEConfig(**COMMON, num_experts=3, instruction_size=5))).save_pretrained(place / "model")
    parts = {"0": TEXTS[:500], "1": TEXTS[500:], "one": TEXTS, "alone": TEXTS[:500]}
    for name, texts in parts.items():
        with RQMoEIndex(str(place / "model"), place / name, encoder=Letters()) as index:
            index.add(texts=texts, ids=texts)
            index.save()
    with RQMoEShards([place / "0", place / "1"]) as shards:
        shards.save()
    return [place / "0", place / "1", place / "one", place / "alone"]


@pytest.fixture(scope="module")
def replicated(folders):
    replicas = pytest.importorskip("rqmoe_hf.serve.replicas", exc_type=ImportError)
    with replicas.ReplicatedShards(folders[:2], encoder=Letters(), replicas=2) as shards:
        yield shards


def processes(shards) -> list[int]:
    """Numbers of the processes that are replicas of these shards."""
    numbers = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(f"ServeReplica:{name}:" in title for name in shards._applications):
            numbers.append(int(entry.name))
    return numbers


def test_a_replica_killed_under_load_loses_no_request(replicated, folders):
    before = processes(replicated)
    assert len(before) == 4
    expected, answered = {}, []
    with RQMoEIndex.load(folders[2], encoder=Letters()) as one:
        for text in TEXTS[:: len(TEXTS) // 40]:
            scores, ids = one.search(text, 5, shortlist=100)
            expected[text] = list(zip(ids.tolist(), scores.tolist(), strict=True))

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        for text in rng.choice(list(expected), QUERIES):
            answer = found(port, "/api/search", query=str(text), top_k=5, shortlist=100)  # asserts status 200
            answered.append([(hit["id"], hit["score"]) for hit in answer["hits"]] == expected[text])

    live = LiveShards(replicated, "shards")
    with serving(live, searches=Workers(16, 100, 60)) as port, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while len(answered) < CLIENTS * QUERIES // 4:
            time.sleep(0.005)
            assert not all(one.done() for one in clients)
        os.kill(before[0], signal.SIGKILL)
        at_the_kill = len(answered)
        for one in clients:
            one.result()
    print(f"{len(answered)} requests of {CLIENTS} clients, {at_the_kill} before the kill")
    assert at_the_kill < CLIENTS * QUERIES * 3 / 4
    assert len(answered) == CLIENTS * QUERIES and all(answered)


def test_replicas_answer_as_one_index(replicated, folders):
    queries = np.random.default_rng(3).normal(size=(30, SIZE)).astype(np.float32)
    with RQMoEIndex.load(folders[2]) as one:
        for settings in ({}, {"rescore": "tables"}, {"ids": TEXTS[490:510]}):
            for mine, theirs in zip(replicated.search(queries, 10, **settings), one.search(queries, 10, **settings),
                                    strict=True):  # fmt: skip
                assert (mine == theirs).all()
        assert len(replicated) == len(one) and "text 7" in replicated
        assert (replicated.reconstruct(["text 1100", "text 1"]) == one.reconstruct(["text 1100", "text 1"])).all()
    with pytest.raises(ValueError, match="1 of 1 ids are in none of the shards: 'text 9999'"):
        replicated.get(["text 9999"])
    with pytest.raises(ValueError, match="unknown operator|operator"):  # found by the replicas
        replicated.search(queries, filter={"a": {"$near": 1}})
    with pytest.raises(ValueError, match="Replicas only read"):
        replicated.save()


def test_the_page_over_shards(folders):
    with RQMoEShards(folders[:2], encoder=Letters()) as shards, serving(LiveShards(shards, "my shards")) as port:
        about = ask(port, "/api/index")[2]
        assert '"vectors":1200' in about and '"exact":null' in about
        for body, message in (({"query": " "}, "empty"), ({"query": "a", "num_codebooks": 1}, "num_codebooks must be"),
                              ({"query": "a", "rescore": "floats"}, "rescore must be")):  # fmt: skip
            status, _, text = ask(port, "/api/search", body)
            assert status == 422 and message in text
        assert ask(port, "/api/compare", {"query": "a"})[0] == 422


def test_a_lost_replica_is_started_again(replicated):
    end = time.monotonic() + 30
    while len(processes(replicated)) < 4 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(processes(replicated)) == 4


def test_what_cannot_be_served(replicated, folders, tmp_path, monkeypatch):
    from rqmoe_hf.serve.replicas import ReplicatedShards

    with pytest.raises(ValueError, match="replicas must be at least 1, got 0"):
        ReplicatedShards(folders[:2], replicas=0)
    with pytest.raises(ValueError, match="missing holds no index"):
        ReplicatedShards([tmp_path / "missing"])
    monkeypatch.setattr(ReplicatedShards, "_deployed", lambda self, folder, *_: Shard(RQMoEIndex.load(folder)))
    with pytest.raises(ValueError, match="run `rqmoe index align`"):  # found before the first search
        ReplicatedShards([folders[3], folders[1]])
    assert len(processes(replicated)) == 4  # those of others stay


def test_the_command_serves_shards(folders, monkeypatch):
    from rqmoe_hf.serve import server

    monkeypatch.setattr(server, "RQMoEShards", lambda folders, *_: RQMoEShards(folders, encoder=Letters()))
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: None)
    command = ["serve", str(folders[0]), "--shard", str(folders[1]), "--port", "0"]
    result = CliRunner().invoke(command_line, command, catch_exceptions=False)
    assert result.exit_code == 0 and "http://127.0.0.1:" in result.output
    with pytest.raises(ValueError, match="ids are in more than one shard"):
        CliRunner().invoke(command_line, [*command, "--shard", str(folders[2])], catch_exceptions=False)


def test_without_ray(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "rqmoe_hf.serve.replicas", raising=False)
    result = CliRunner().invoke(command_line, ["serve", str(folders[0]), "--engine", "ray"])
    assert isinstance(result.exception, ValueError) and 'pip install "rqmoe-hf[ray]"' in str(result.exception)
    result = CliRunner().invoke(command_line, ["serve", str(folders[0]), "--engine", "spark"])
    assert "--engine must be one of local, ray, got 'spark'" in str(result.exception)
