"""The benchmark of searching: its numbers against naive ones, what it counts, and that a run continues."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import faiss
import matplotlib
import plots
import rag_tasks
import search
import tables
import tasks
import torch
from conftest import MEMBERS, randomize
from searchers import FaissSearcher, OwnSearcher, assemble, rated, timing
from sets import EmbeddingSet

from rqmoe_hf import RQMoEModel

DIMENSION = 16


@pytest.fixture(scope="module")
def data() -> EmbeddingSet:
    vectors = np.random.default_rng(0).normal(size=(900, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    train, validation, database, queries = np.split(vectors, [600, 610, 880])
    return EmbeddingSet("tiny", "random", train, validation, database, queries, "c0ffee", True)


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quantizer") / "mine"
    model = randomize(RQMoEModel(MEMBERS["additive"]))
    with torch.no_grad():  # of vectors of norm 1, so that few of them have the same codes
        model.mean.zero_()
        model.scale.fill_(DIMENSION**-0.5)
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"vectors": 450}))
    return str(folder)


def nearest(queries: np.ndarray, database: np.ndarray) -> list[list[int]]:
    return [np.argsort([((row - query) ** 2).sum() for row in database])[:10].tolist() for query in queries]


def test_the_database_is_what_is_not_trained_with(data):
    found = assemble(data, 400)
    assert found.describe() | {"checksum": ""} == {
        "training_vectors": 400,
        "database": 470,
        "database_held_out": 270,
        "database_from_training_vectors": 0,
        "queries": 20,
        "checksum": "",
    }
    np.testing.assert_array_equal(found.database, np.concatenate([data.database, data.train[400:]]))
    assert found.truth.tolist() == nearest(found.queries, found.database)
    assert [found.seen_by(count) for count in (0, 400, 450, 600)] == [0, 0, 50, 200]
    more = assemble(data, 400, 500, 5)
    assert (len(more.database), more.held_out, more.reused, len(more.queries)) == (500, 270, 30, 5)
    assert [more.seen_by(count) for count in (10, 450, 600)] == [10, 80, 230]
    np.testing.assert_array_equal(more.database[-30:], data.train[:30])
    assert assemble(data, 400, 100).held_out == 100
    with pytest.raises(ValueError, match="cannot be had"):
        assemble(data, 400, 2_000)


def test_faiss_is_measured_as_naive_computation_does(data, tmp_path):
    found = assemble(data, 600, 200)
    searcher = FaissSearcher("IVF-PQ", "IVF{lists},PQ4x4", 2, 3)
    built = searcher.build(found, tmp_path / "index")
    searcher.open(tmp_path / "index")
    row = search.measure(searcher, found, {"nprobe": 3}, 1)
    index = searcher.index
    restored = index.reconstruct_n(0, 200) if index.make_direct_map() is None else None
    shared = zip(nearest(found.queries, restored), nearest(found.queries, found.database), strict=True)
    expected = np.mean([len(set(mine) & set(right)) / 10 for mine, right in shared])
    assert row["recall_10_at_10"] == pytest.approx(expected, abs=0.02)  # equal codes have no order
    assert row["queries_per_second"] > 0 and row["latency_ms"] > 0 and 1 <= row["repeats"] <= 5
    assert (built["stored_bytes"], built["refinement_bytes"]) == (2, 0)


def test_refinement_and_links_are_counted(data, tmp_path):
    found = assemble(data, 600, 200)
    refined = FaissSearcher("refined", "IVF{lists},PQ4x4", 2, 3, "SQfp16")
    assert refined.build(found, tmp_path / "refined")["refinement_bytes"] == 2 * DIMENSION
    refined.open(tmp_path / "refined")
    assert search.measure(refined, found, {"nprobe": 3, "shortlist": 200}, 1)["recall_10_at_10"] > 0.98
    graph = FaissSearcher("graph", "PCA8,HNSW8,SQ4", None)
    assert 4 + 2 * 8 * 4 < graph.build(found, tmp_path / "graph")["stored_bytes"] < 200
    graph.open(tmp_path / "graph")
    assert graph.search(found.queries, efSearch=64).shape == (20, 10)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dimension", [128, 384])
def test_no_rate_is_exceeded(dimension, size):
    for searcher in rated(dimension, size, 4, faiss.METRIC_L2):
        index = faiss.index_factory(dimension, searcher.factory)
        inner = faiss.extract_index_ivf(index)
        kept = faiss.index_factory(dimension, searcher.refinement).sa_code_size() if searcher.refinement else 0
        kept = 0 if searcher.refinement == "SQfp16" else kept  # floats are counted, but come on top
        assert inner.code_size + kept <= size + (searcher.name == "IVF-RQ"), searcher.name


@pytest.mark.parametrize("lists, floats", [(1, False), (4, True)])
def test_ours_is_measured_as_naive_computation_does(data, quantizer, tmp_path, lists, floats):
    found = assemble(data, 400)
    searcher = OwnSearcher(quantizer, tmp_path, lists, floats)
    built = searcher.build(found, tmp_path / "index")
    searcher.open(tmp_path / "index")
    setting = {"shortlist": len(found.database), "rescore": "floats" if floats else "codes"}
    row = search.measure(searcher, found, setting, 1)
    if floats:
        assert row["recall_10_at_10"] > 0.98
    else:
        model = searcher.model
        restored = model.decompress(model.compress(found.database, show_progress_bar=False), show_progress_bar=False)
        restored /= np.linalg.norm(restored, axis=1, keepdims=True)
        shared = zip(nearest(found.queries, restored), found.truth.tolist(), strict=True)
        expected = np.mean([len(set(mine) & set(right)) / 10 for mine, right in shared])
        assert row["recall_10_at_10"] == pytest.approx(expected, abs=0.02)
    assert built["database_seen_by_quantizer"] == 50
    assert built["refinement_bytes"] == (2 * DIMENSION if floats else 0)


def test_a_stopped_run_continues(data, quantizer, tmp_path, monkeypatch):
    monkeypatch.setattr(search.environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(search, "load", lambda *_: data)
    monkeypatch.setattr(search, "SETS", {"tiny": None})
    monkeypatch.setattr(search.timing, "memory", lambda *_: {"resident_bytes_all": 1.0})  # a process of its own
    command = ["search", "--set", "tiny", "--root", str(tmp_path), "--bytes", "16", "--threads", "1"]
    command += ["--training", "300", "--lists", "0.1", "--methods", "IVF-RaBitQ, all", "--ours", quantizer]
    monkeypatch.setattr(sys, "argv", command)
    plain, calls = search.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(search, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.main()
    assert len(search.environment.load("search-tiny")["cells"]) == 5
    search.main()
    results = search.environment.load("search-tiny")
    assert len(results["cells"]) == len(calls) - 1  # none was measured twice
    assert {cell["build"] for cell in results["cells"].values()} == set(results["builds"])
    assert results["unit_norm"] and all(built["database"] == 570 for built in results["builds"].values())
    monkeypatch.setattr(search, "measure", lambda *_: pytest.fail("measured again"))
    search.main()
    assert not any((tmp_path / "tiny" / "search" / "indexes").iterdir())
    check_table_and_plot(monkeypatch, tmp_path / "results")


def check_table_and_plot(monkeypatch, results: Path) -> None:
    (results / "search-minilm-384.json").write_bytes((results / "search-tiny.json").read_bytes())
    lines = tables.search().splitlines()
    assert len(lines) == 6 and "**mine**, flat" in "\n".join(lines)
    matplotlib.use("svg")
    plots.draw_search("tiny")
    assert (results / "search-tiny.svg").stat().st_size > 10_000


def test_threads_are_limited_and_given_back():
    before = os.sched_getaffinity(0), faiss.omp_get_max_threads()
    with timing.limited(1):
        assert len(os.sched_getaffinity(0)) == faiss.omp_get_max_threads() == 1
    assert (os.sched_getaffinity(0), faiss.omp_get_max_threads()) == before
    with pytest.raises(ValueError, match="cores"), timing.limited(10_000):
        pass


def test_known_items_through_langchain(data, quantizer):
    pytest.importorskip("langchain_core")
    relevant = [row[::4] for row in nearest(data.queries, data.database)]
    known = tasks.Tasks(
        *[data.queries] * 2, np.zeros(20), data.queries, data.database, relevant, data.queries, relevant
    )
    exact = rag_tasks.measure(None, known, 20)
    assert exact["known_item_ndcg_at_10"] == pytest.approx(tasks.retrieval(data.queries, data.database, relevant)[0])
    ours = rag_tasks.measure(quantizer, known, 20)
    model = RQMoEModel.from_pretrained(quantizer).eval()
    restored = model.decompress(model.compress(data.database, show_progress_bar=False), show_progress_bar=False)
    expected = tasks.retrieval(data.queries, restored, relevant)[0]
    assert ours["known_item_ndcg_at_10"] == pytest.approx(expected, abs=0.01)  # equal codes have no order
    assert (exact["bytes"], ours["bytes"], ours["documents"], ours["queries"]) == (64, 3, 270, 20)
