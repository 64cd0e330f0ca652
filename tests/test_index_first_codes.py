"""Inverted lists that are first codes, against loops and brute force; codes are made here, by a loop as well."""

from itertools import pairwise, product

import faiss
import numpy as np
import pytest
import torch
from conftest import SIZE, randomize
from safetensors.numpy import load_file, save_file

from rqmoe_hf import RQMoEConfig, RQMoEModel, pack_codes
from rqmoe_hf.codes import bits_per_code, unpack_codes
from rqmoe_hf.index import RQMoEIndex, RQMoEShards, verify
from rqmoe_hf.index.first_codes import first_codes, other_codes
from rqmoe_hf.index.fitting import fit_scanner

METRICS = ("cosine", "inner_product", "l2")
SIZES = {"bits left over": [24, 20, 64, 5], "whole bytes": [300, 256, 16, 16]}
ROWS = 3000


class Truth:
    """A quantizer whose first code is the nearest codeword, codes of it and what they stand for."""

    def __init__(self, sizes: list[int], vectors: np.ndarray):
        config = RQMoEConfig.additive(hidden_size=SIZE, num_codebooks=len(sizes), codebook_size=max(sizes),
                                      codebook_sizes=sizes, search_blocks=[1, len(sizes) - 1])  # fmt: skip
        self.model, self.sizes = randomize(RQMoEModel(config)), sizes
        with torch.no_grad():  # in the units of the vectors
            first = (torch.from_numpy(vectors[-sizes[0] :]) - self.model.mean) / self.model.scale
            self.model.codebooks[0, : sizes[0]] = first
        books, mean = self.model.codebooks.detach().double().numpy(), self.model.mean.double().numpy()
        self.codewords = [book[:size] * self.model.scale.item() for book, size in zip(books, sizes, strict=True)]
        self.centroids = self.codewords[0] + mean
        self.codes, self.restored = np.empty((len(vectors), len(sizes)), np.int64), np.empty((len(vectors), SIZE))
        for row, vector in enumerate(vectors):
            left = vector - mean
            for step, book in enumerate(self.codewords):
                self.codes[row, step] = ((left - book) ** 2).sum(axis=1).argmin()
                left = left - book[self.codes[row, step]]
            self.restored[row] = vector - left
        self.packed = pack_codes(self.codes, sizes)

    def scores(self, queries: np.ndarray, metric: str) -> np.ndarray:
        """Of all rows by what they are restored to, `(queries, rows)`."""
        if metric == "l2":
            return -((self.restored[None] - queries[:, None]) ** 2).sum(axis=2)
        lengths = np.linalg.norm(self.restored, axis=1) if metric == "cosine" else 1
        return unit(queries) @ self.restored.T / lengths if metric == "cosine" else queries @ self.restored.T


@pytest.fixture(scope="module", params=list(SIZES))
def truth(request, clustered) -> Truth:
    return Truth(SIZES[request.param], clustered[:ROWS])


@pytest.fixture
def queries(clustered) -> np.ndarray:
    return clustered[4000:4017] + 0.1


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(truth, metric, rows=None):
    """A scanner with codes, whose row numbers are 10 higher than in the truth."""
    scanner = fit_scanner(truth.model, truth.packed, len(truth.sizes), metric, truth.sizes[0])
    rows = np.arange(ROWS) if rows is None else rows
    scanner.add([(part + 10, truth.packed[part]) for part in np.array_split(rows, 7)])
    return scanner


def best_of(scores, count=10):
    return -np.sort(-scores, axis=1)[:, :count]


def same(found, expected):
    assert (found[1] == expected[1]).all()
    assert (found[0] == expected[0]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_all_lists_are_those_of_a_loop(truth, queries, metric):
    scanner, asked = filled(truth, metric), unit(queries) if metric == "cosine" else queries
    scores, rows = scanner.search(asked, ROWS, truth.sizes[0])
    assert (np.sort(rows, axis=1) == np.arange(ROWS) + 10).all()
    expected = asked @ truth.restored.T
    if metric != "inner_product":  # the norm has a code of its own, of 8 bits
        norms = scanner.tables.norms
        coded = norms[np.abs(np.linalg.norm(truth.restored, axis=1)[:, None] - norms).argmin(axis=1)]
        weights = scanner.thresholds(asked, 1.0)[:, None] if metric == "cosine" else 0.5 * coded
        expected = expected - weights * coded
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows - 10, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_lists_are_first_codes_and_the_nearest_are_scanned(truth, queries, metric):
    scanner = filled(truth, metric)
    code_bytes = -(-sum(bits_per_code(size) for size in truth.sizes[1:]) // 8)
    assert scanner.lists == truth.sizes[0]
    assert scanner.bytes_per_vector == code_bytes + (metric != "inner_product") + 8 < truth.packed.shape[1] + 9
    closeness = queries @ truth.centroids.T
    if metric == "l2":
        closeness = -((queries[:, None] - truth.centroids) ** 2).sum(axis=2)
    elif metric == "cosine":
        closeness = unit(queries) @ unit(truth.centroids).T
    rows = scanner.search(unit(queries) if metric == "cosine" else queries, ROWS, 5)[1]
    for place, order in enumerate(np.argsort(-closeness, axis=1)):
        found = rows[place][rows[place] >= 0] - 10
        np.testing.assert_array_equal(np.sort(found), np.flatnonzero(np.isin(truth.codes[:, 0], order[:5])))


@pytest.mark.parametrize("metric", METRICS)
def test_some_rows_score_as_among_all(truth, queries, metric):
    scanner, asked = filled(truth, metric), unit(queries) if metric == "cosine" else queries
    some = np.arange(10, ROWS + 10, 3)
    scores, rows = scanner.search(asked, len(some), 1, some, share=0.5)
    assert (np.sort(rows, axis=1) == some).all()
    everything, numbers = scanner.search(asked, ROWS, truth.sizes[0], share=0.5)
    by_row = np.take_along_axis(everything, np.argsort(numbers, axis=1), 1)  # the order of summation is the same
    np.testing.assert_array_equal(scores, np.take_along_axis(by_row, rows - 10, 1))


@pytest.mark.parametrize("metric", METRICS)
def test_the_ranking_is_brute_force_if_all_lists_are_scanned(truth, queries, metric, tmp_path):
    index = RQMoEIndex(truth.model, metric=metric, kind="ivf")
    index.add(codes=truth.packed, metadata=[{"n": row} for row in range(ROWS)])
    expected, everything = truth.scores(queries, metric), {"shortlist": ROWS - 1, "nprobe": 10_000}
    scores, ids = index.search(queries, 10, **everything)
    assert index._ranker.scanner.tables.by_first_code
    np.testing.assert_allclose(scores, best_of(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), best_of(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(index.search(queries, 10, shortlist=60, nprobe=10_000)[0], scores, atol=1e-5)
    np.testing.assert_allclose(index.reconstruct([5, 7]), truth.restored[[5, 7]], rtol=1e-4, atol=1e-4)
    assert np.isfinite(index.search(queries, 50, nprobe=1)[0]).all()  # a list holds too little
    scores, ids = index.search(queries, 10, shortlist=1200, filter={"n": {"$gte": 1500}})  # scanned, not decoded
    np.testing.assert_allclose(scores, best_of(expected[:, 1500:]), rtol=1e-4, atol=1e-4)
    assert ids.min() >= 1500


@pytest.mark.parametrize("metric", METRICS)
def test_changes_are_followed_and_what_is_saved_is_mapped(truth, queries, metric, tmp_path):
    folder, everything = tmp_path / "index", {"nprobe": 10_000}
    with RQMoEIndex(truth.model, folder, metric=metric, kind="ivf") as index:
        index.add(codes=truth.packed[:2000])
        index.search(queries, shortlist=1999)
        scanner = index._ranker.scanner
        index.remove(range(0, 2000, 3))
        index.add(codes=truth.packed[2000:])
        left = np.setdiff1d(np.arange(ROWS), np.arange(0, 2000, 3))
        found = index.search(queries, 20, shortlist=1000, **everything)
        assert index._ranker.scanner is scanner  # nothing was made anew
        np.testing.assert_allclose(found[0], best_of(truth.scores(queries, metric)[:, left], 20), rtol=1e-4, atol=1e-4)
        assert np.isin(found[1], left).all()
        index.save()
    assert "centroids" not in load_file(next(folder.glob("scan-*"))) and verify(folder) == []
    with RQMoEIndex.load(folder, truth.model) as index:
        scanner = index._ranker.scanner
        assert scanner._mapped is not None and scanner.lists == truth.sizes[0]
        same(index.search(queries, 20, shortlist=1000, **everything), found)
        index.remove(left[:500])
        scores, _ = index.search(queries, 20, shortlist=1000, **everything)
        assert index._ranker.scanner is scanner and scanner._mapped is None
        np.testing.assert_allclose(scores, best_of(truth.scores(queries, metric)[:, left[500:]], 20), rtol=1e-4,
                                   atol=1e-4)  # fmt: skip


@pytest.mark.parametrize(("metric", "equals"), product(METRICS, (1, 300)))
def test_shards_find_what_one_index_finds(truth, queries, tmp_path, metric, equals):
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(ROWS // equals), equals))
    with RQMoEIndex(truth.model, tmp_path / "one", metric=metric, kind="ivf") as one:
        one.add(codes=truth.packed[rows], metadata=[{"third": row % 3 == 0} for row in range(ROWS)])
        folders = []
        for start, stop in pairwise((0, 700, 800, ROWS)):
            folders.append(tmp_path / str(start))
            with RQMoEIndex(truth.model, folders[-1], metric=metric, kind="ivf") as shard:
                metadata = [{"third": row % 3 == 0} for row in range(start, stop)]
                shard.add(codes=truth.packed[rows[start:stop]], ids=range(start, stop), metadata=metadata)
                shard.save()
        for _ in range(2):
            with RQMoEShards(folders, truth.model) as shards:
                for settings in ({}, {"nprobe": 3}, {"shortlist": 20}, {"rescore": "tables"}, {"nprobe": 1_000},
                                 {"filter": {"third": True}, "shortlist": 50}):  # fmt: skip
                    same(shards.search(queries, 10, **settings), one.search(queries, 10, **settings))
                assert shards._rescorer.scanner.tables.by_first_code
                shards.save()


def test_threads_share_the_queries(truth, clustered):
    index, before, found = RQMoEIndex(truth.model, kind="ivf"), faiss.omp_get_max_threads(), []
    index.add(codes=truth.packed, metadata=[{"n": row} for row in range(ROWS)])
    try:
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            found.append(index.search(clustered[3000:3299], 20))
            found.append(index.search(clustered[3000:3299], 20, filter={"n": {"$gte": 1000}}))
    finally:
        faiss.omp_set_num_threads(before)
    for one, three in zip(found[:2], found[2:], strict=True):
        same(one, three)


@pytest.mark.parametrize(("settings", "by_first", "lists"), [
    ({"kind": "ivf", "num_lists": 24}, True, 24),
    ({"kind": "ivf", "num_lists": 7}, False, 7),
    ({"kind": "ivf", "num_codebooks": 2}, True, 24),
    ({"kind": "ivf", "num_codebooks": 1}, False, 55),  # nothing would be left to scan
    ({"kind": "auto"}, True, 24),
    ({"kind": "flat", "num_lists": 24}, False, 1),
])  # fmt: skip
def test_when_lists_are_first_codes(clustered, queries, monkeypatch, settings, by_first, lists):
    monkeypatch.setattr("rqmoe_hf.index.ranking.FLAT_UP_TO", 1000)
    truth, steps = Truth(SIZES["bits left over"], clustered[:ROWS]), settings.get("num_codebooks", 4)
    index = RQMoEIndex(truth.model, metric="l2", **settings)
    index.add(codes=pack_codes(truth.codes[:, :steps], truth.sizes))
    scores, _ = index.search(queries, shortlist=2999, nprobe=1000)
    assert (index._ranker.scanner.tables.by_first_code, index._ranker.scanner.lists) == (by_first, lists)
    restored = truth.centroids[truth.codes[:, 0]]
    for step in range(1, steps):
        restored = restored + truth.codewords[step][truth.codes[:, step]]
    expected = -((restored[None] - queries[:, None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(scores, best_of(expected), rtol=1e-4, atol=1e-4)


def test_a_first_code_that_no_list_has_is_noticed(clustered, tmp_path):
    truth = Truth(SIZES["bits left over"], clustered[:ROWS])
    index = RQMoEIndex(truth.model, kind="ivf")
    index.add(codes=truth.packed)
    wrong = pack_codes(np.array([[25, 0, 0, 0]]), [32, 20, 64, 5]).tobytes()
    index._database._connection.execute("UPDATE vectors SET code = ? WHERE row = 7", (wrong,))
    with pytest.raises(ValueError, match="is damaged: one of its first codes is 25, of 24 codewords"):
        index.search(clustered[:1])


@pytest.mark.parametrize("change", ["another quantizer", "sizes", "lists"])
def test_snapshots_that_do_not_fit(clustered, tmp_path, change):
    truth, folder = Truth(SIZES["bits left over"], clustered[:ROWS]), tmp_path / "index"
    with RQMoEIndex(truth.model, folder, kind="ivf", metric="l2") as index:
        index.add(codes=truth.packed)
        index.save()
    file = next(folder.glob("scan-*"))
    arrays, model = load_file(file), truth.model
    if change == "another quantizer":  # whose first codes make no lists
        model.config.search_blocks = None
    elif change == "sizes":
        arrays["sizes"] = np.append(arrays["sizes"], 0)
    else:
        arrays["lists"] = arrays["lists"][:-1]
    save_file(arrays, file, {"version": "1", "row": "3000", "removal": "0", "fitted": "3000"})
    with pytest.raises(ValueError, match=r"scan-\d+.safetensors is no snapshot of this index"):
        RQMoEIndex.load(folder, model, check=False)


@pytest.mark.parametrize("sizes", [[2, 5], [256, 256], [2**16, 3, 7], [4096, 1024, 1024, 256], [300, 2], [100, 2**16]])
def test_first_codes_are_taken_off(sizes):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 500) for size in sizes], axis=1)
    width = -(-sum(bits_per_code(size) for size in sizes[1:]) // 8)
    packed = pack_codes(codes, sizes)
    first = first_codes(packed, bits_per_code(sizes[0]))
    rest = other_codes(packed, bits_per_code(sizes[0]), width)
    np.testing.assert_array_equal(first, codes[:, 0])
    np.testing.assert_array_equal(unpack_codes(rest, len(sizes) - 1, sizes[1:]), codes[:, 1:])
