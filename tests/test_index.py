"""Searching an index: first-stage scores and rankings against loops and brute force, and what is refused."""

import json
import sys
from itertools import product

import faiss
import index_workers
import numpy as np
import pytest
import torch
from conftest import MEMBERS, SIZE, randomize

from rqmoe_hf import RQMoEConfig, RQMoEModel, load_quantizer, unpack_codes
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.index.fitting import fit_scanner

METRICS = ("cosine", "inner_product", "l2")
UNEQUAL = {"hidden_size": SIZE, "num_codebooks": 4, "codebook_size": 64, "codebook_sizes": [64, 20, 64, 5],
           "intermediate_size": 8}  # fmt: skip
QUANTIZERS = {
    "additive": MEMBERS["additive"],
    "experts": MEMBERS["paper"],
    "unequal": RQMoEConfig.additive(**UNEQUAL),  # 20 bits: the norm's code begins at a whole byte
    "unequal experts": RQMoEConfig(**UNEQUAL, instruction_size=5),
}


@pytest.fixture(scope="module", params=list(QUANTIZERS))
def quantizer(request) -> RQMoEModel:
    return randomize(RQMoEModel(QUANTIZERS[request.param]))


@pytest.fixture(scope="module")
def additive() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["additive"]))


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(6, SIZE)).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(model, embeddings, queries, metric):
    """Scores `(queries, vectors)` over all reconstructions."""
    restored = model.decompress(model.compress(embeddings))
    if metric == "cosine":
        return unit(queries) @ unit(restored).T
    if metric == "inner_product":
        return queries @ restored.T
    return -np.stack([((restored - query) ** 2).sum(axis=1) for query in queries])


@pytest.mark.parametrize(("metric", "lists"), product(METRICS, (1, 7)))
def test_first_stage_scores_are_those_of_a_loop_over_the_tables(quantizer, clustered, queries, metric, lists):
    codes = quantizer.compress(clustered[:800])
    scanner = fit_scanner(quantizer, codes, quantizer.config.num_codebooks, metric, lists)
    scanner.add([(np.arange(start, start + 100) + 10, codes[start : start + 100]) for start in range(0, 800, 100)])
    sums = np.zeros((800, SIZE))
    for row, code in enumerate(unpack_codes(codes, quantizer.config.num_codebooks, quantizer.config.code_sizes)):
        for table, index in zip(scanner.tables.codewords, code, strict=True):
            sums[row] += table[index]
    if not quantizer.config.has_experts:
        np.testing.assert_allclose(sums, quantizer.decompress(codes), rtol=1e-4, atol=1e-4)
    asked = unit(queries) if metric == "cosine" else queries
    scores, rows = scanner.search(asked, 800, lists)
    assert scanner.lists == lists and (np.sort(rows, axis=1) == np.arange(800) + 10).all()
    expected, norms = asked @ sums.T, np.linalg.norm(sums, axis=1)
    tolerance = 1e-4
    if metric == "cosine":  # the norm has a code of its own, of 8 bits
        thresholds = scanner.thresholds(asked, 1.0)
        assert (thresholds <= (expected / norms).mean(axis=1)).all()
        expected -= thresholds[:, None] * norms
        tolerance += np.abs(thresholds).max() * np.diff(scanner.tables.norms).max() / 2
    if metric == "l2":
        expected -= 0.5 * norms**2
        tolerance += norms.max() * np.diff(scanner.tables.norms).max() / 2 * 1.01
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows - 10, 1), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("lists", [1, 7])
def test_first_stage_scores_of_any_code_and_norm_are_exact(quantizer, clustered, queries, lists):
    """With the norm's code looked up as well, the scores of all metrics are exact to rounding."""
    codes = quantizer.compress(clustered[:300])
    for metric in ("cosine", "l2"):
        scanner = fit_scanner(quantizer, codes, quantizer.config.num_codebooks, metric, lists)
        scanner.add([(np.arange(300), codes)])
        sums, norms = scanner.sums(codes), scanner.tables.norms
        coded = norms[np.abs(np.linalg.norm(sums, axis=1)[:, None] - norms).argmin(axis=1)]
        asked = unit(queries)
        expected = asked @ sums.T
        expected -= scanner.thresholds(asked, 1.0)[:, None] * coded if metric == "cosine" else 0.5 * coded**2
        scores, rows = scanner.search(asked, 300, lists)
        np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), rtol=1e-4, atol=1e-4)


def test_tables_of_experts_fit_better_than_mean_contributions(clustered):
    from rqmoe_hf.additive import mean_contributions
    from rqmoe_hf.index.codewords import fit_codewords

    model = randomize(RQMoEModel(MEMBERS["paper"]))
    packed = model.compress(clustered)
    codes, target = unpack_codes(packed, 4, 20), model.decompress(packed)
    means = sum(table[codes[:, step]] for step, table in enumerate(mean_contributions(model, codes)))
    fitted = sum(table[codes[:, step]] for step, table in enumerate(fit_codewords(model, packed, 4)))
    assert ((fitted - target) ** 2).mean() < ((means + model.mean.numpy() - target) ** 2).mean()


@pytest.mark.parametrize(("metric", "kind"), product(METRICS, ("flat", "ivf")))
def test_the_ranking_is_brute_force_when_the_shortlist_is_everything(quantizer, clustered, queries, metric, kind):
    embeddings = clustered[:600]
    index = RQMoEIndex(quantizer, metric=metric, kind=kind)
    ids = index.add(embeddings)
    np.testing.assert_array_equal(ids, np.arange(600))
    expected = brute_force(quantizer, embeddings, queries, metric)
    best = -np.sort(-expected, axis=1)[:, :10]
    for shortlist, nprobe in ((600, None), (599, 10_000)):  # all of them decoded; all of them but one scanned
        scores, found = index.search(queries, 10, shortlist=shortlist, nprobe=nprobe)
        np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, found, 1), best, rtol=1e-4, atol=1e-4)
    one, found = index.search(queries[0], 3)
    assert one.shape == found.shape == (3,)


@pytest.mark.parametrize("metric", METRICS)
def test_an_additive_quantizer_needs_a_short_list_only(additive, clustered, queries, metric):
    index = RQMoEIndex(additive, metric=metric, kind="ivf")
    index.add(clustered)
    best = -np.sort(-brute_force(additive, clustered, queries, metric), axis=1)[:, :10]
    scores, _ = index.search(queries, 10, shortlist=40, nprobe=10_000)
    np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-4)


def test_few_lists_that_hold_too_little_are_not_the_end(additive, clustered, queries):
    index = RQMoEIndex(additive, kind="ivf", num_lists=300)
    index.add(clustered[:1000])
    scores, ids = index.search(queries, 50, shortlist=60, nprobe=1)
    assert ids.shape == (6, 50) and np.isfinite(scores).all()
    assert all(len(set(row)) == 50 for row in ids.tolist())


def test_unit_norm_embeddings_are_ranked_by_cosine_whatever_the_metric():
    model = load_quantizer("minilm-384-8-bytes")
    embeddings = np.random.default_rng(0).normal(size=(60, 384)).astype(np.float32) * 3
    found = {}
    for metric in METRICS:
        index = RQMoEIndex(model, metric=metric)
        index.add(embeddings)
        assert np.linalg.norm(index.reconstruct([3]), axis=1) == pytest.approx(1)
        found[metric] = index.search(unit(embeddings[:5]), 4)
    np.testing.assert_array_equal(found["cosine"][1], found["l2"][1])
    np.testing.assert_array_equal(found["cosine"][1], found["inner_product"][1])
    np.testing.assert_allclose(found["l2"][0], 2 * found["cosine"][0] - 2, atol=1e-5)


def test_floats_that_were_kept_rank_exactly(quantizer, clustered, queries):
    index = RQMoEIndex(quantizer, keep_floats=True)
    index.add(clustered[:500])
    index.add(codes=quantizer.compress(clustered[500:510]))  # have none, and are ranked by their codes
    scores, _ = index.search(queries, 10, shortlist=510)
    exact = unit(queries) @ unit(clustered[:500].astype(np.float16).astype(np.float32)).T
    exact = np.hstack([exact, brute_force(quantizer, clustered[500:510], queries, "cosine")])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-5)
    by_codes, _ = index.search(queries, 10, shortlist=510, rescore="codes")
    assert np.abs(by_codes - scores).max() > 1e-3


def test_tables_alone_rank_as_their_sums_do(quantizer, clustered, queries):
    index = RQMoEIndex(quantizer)
    index.add(clustered[:300])
    scores, _ = index.search(queries, 300, rescore="tables")
    sums = index._ranker.scanner.sums(quantizer.compress(clustered[:300]))
    np.testing.assert_allclose(scores, -np.sort(-(unit(queries) @ unit(sums).T), axis=1), atol=1e-5)


def test_a_prefix_of_the_codes(quantizer, clustered, queries):
    index = RQMoEIndex(quantizer, num_codebooks=2, metric="l2")
    index.add(clustered[:300])
    restored = quantizer.decompress(quantizer.compress(clustered[:300], num_codebooks=2), num_codebooks=2)
    scores, _ = index.search(queries, 5)
    expected = -((queries[:, None] - restored) ** 2).sum(axis=2)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_changes_are_followed_by_the_scanner(additive, clustered, queries, kind):
    index = RQMoEIndex(additive, kind=kind, metric="l2")
    index.add(clustered[:2000])
    index.search(queries, shortlist=1999)
    scanner = index._ranker.scanner
    index.remove(range(0, 2000, 3))
    index.add(clustered[2000:2500])
    index.update(range(1, 2000, 30), clustered[3000:3067])
    now = clustered[:2500].copy()
    now[range(1, 2000, 30)] = clustered[3000:3067]
    kept = np.setdiff1d(np.arange(2500), np.arange(0, 2000, 3))
    scores, ids = index.search(queries, 20, shortlist=1000, nprobe=10_000)
    assert index._ranker.scanner is scanner  # nothing was made anew
    expected = brute_force(additive, now, queries, "l2")
    np.testing.assert_allclose(scores, -np.sort(-expected[:, kept], axis=1)[:, :20], rtol=1e-4, atol=1e-4)
    assert np.isin(ids, kept).all()
    index.add(np.concatenate([clustered, clustered[:2000]]))  # grown to more than four times: made anew
    index.search(queries, shortlist=500)
    assert index._ranker.scanner is not scanner


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_threads_share_the_queries(additive, clustered, kind):
    index = RQMoEIndex(additive, kind=kind)
    index.add(clustered, metadata=[{"n": number} for number in range(6000)])
    before, found = faiss.omp_get_max_threads(), []
    try:
        for threads in (1, 3, 6):  # the last are too many for Python to go through lists
            faiss.omp_set_num_threads(threads)
            found.append(index.search(clustered[:299], 20))
            found.append(index.search(clustered[:299], 20, filter={"n": {"$gte": 2000}}))
    finally:
        faiss.omp_set_num_threads(before)
    for one, more in zip(found[:2] * 2, found[2:], strict=True):
        np.testing.assert_array_equal(one[1], more[1])
        np.testing.assert_array_equal(one[0], more[0])
    for number in (0, 150, 298):
        np.testing.assert_array_equal(index.search(clustered[number], 20)[1], found[0][1][number])


def test_kinds_by_size(additive, clustered, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.index.ranking.FLAT_UP_TO", 1000)
    index = RQMoEIndex(additive)
    index.add(clustered[:900])
    index.search(clustered[0], shortlist=200)
    assert index._ranker.scanner.lists == 1
    index.add(clustered[:900])
    index.search(clustered[0], shortlist=200)
    assert index._ranker.scanner.lists == 42


def test_what_add_takes(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(torch.from_numpy(clustered[:5]))
    index.add(clustered[5:8].tolist())
    index.add([[0] * SIZE, [1] * SIZE])  # whole numbers in lists, as frameworks hand on
    index.add(clustered[10].astype(np.float64), ids=[77])
    assert index.add(codes=additive.compress(clustered[11:13])).tolist() == [78, 79]
    assert index.add([]).tolist() == [] and index.add([], ids=[], metadata=[]).tolist() == []
    assert len(index) == 13 and 77 in index and 76 not in index
    codes = additive.compress(clustered[:13])
    np.testing.assert_allclose(index.reconstruct([0, 7, 79]), additive.decompress(codes[[0, 7, 12]]), rtol=1e-5)


def test_ids_are_integers_of_64_bits_to_the_last(additive, clustered):
    index, least, largest = RQMoEIndex(additive), -(2**63), 2**63 - 1
    index.add(clustered[:2], ids=[least, largest])
    assert sorted(index.search(clustered[0], 2)[1].tolist()) == [least, largest]
    with pytest.raises(ValueError, match="Counting ids on from 9223372036854775807 .* give ids"):
        index.add(clustered[2:3])
    index.add(clustered[2:3], ids=[largest - 1])
    assert len(index) == 3


def test_codes_are_those_of_the_quantizer_and_the_version_tells_of_changes(additive, clustered, tmp_path, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.index.documents.CHUNK", 64)  # several batches
    names = [f"vector {number}" for number in range(150)]
    folder = tmp_path / "index"
    with RQMoEIndex(additive, folder) as index, RQMoEIndex.load(folder, additive) as reader:
        versions = [reader.version]
        index.add(clustered[:150], ids=names)
        versions.append(reader.version)
        index.remove(["vector 3"])
        versions.append(reader.version)
        assert versions == sorted(set(versions)) and index.version == reader.version == versions[-1]
        ids, codes = (np.concatenate(parts) for parts in zip(*reader.codes(), strict=True))
        assert ids.tolist() == [name for name in names if name != "vector 3"]
        np.testing.assert_array_equal(codes, np.delete(additive.compress(clustered[:150]), 3, axis=0))


def test_an_empty_index_finds_nothing(additive, queries):
    index = RQMoEIndex(additive)
    scores, ids = index.search(queries, 5)
    assert scores.shape == ids.shape == (6, 0)
    assert index.count() == len(index) == 0 and list(index.documents()) == [] and index.get([]) == []
    assert index.reconstruct([]).shape == (0, SIZE)


def test_more_hits_than_vectors_are_all_vectors(additive, clustered, queries):
    index = RQMoEIndex(additive)
    index.add(clustered[:7], ids=[f"id {number}" for number in range(7)])
    scores, ids = index.search(queries, 100)
    assert scores.shape == ids.shape == (6, 7)
    assert all(sorted(row) == [f"id {number}" for number in range(7)] for row in ids.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()


BROKEN = np.full((2, SIZE), np.nan, np.float32)
HUGE = np.full((2, SIZE), 3e38, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index, x: index.search(x[:2, :5]), r"Expected queries of shape \(n, 16\), .* got \(2, 5\)"),
        (lambda index, x: index.search(BROKEN), "Row 0 of the queries holds NaN"),
        (lambda index, x: index.search(HUGE), r"Row 0 of the queries .* of 1e\+15 or more"),
        (lambda index, x: index.search([]), "There is no query"),
        (lambda index, x: index.search(x[:0]), "There is no query"),
        (lambda index, x: index.search("  "), "A query is empty"),
        (lambda index, x: index.search("text"), "Texts need an encoder"),
        (lambda index, x: index.search(["text", 3]), "Expected queries as strings, but number 1 is 3"),
        (lambda index, x: index.search(x[0], 0), "top_k must be at least 1, got 0"),
        (lambda index, x: index.search(x[0], shortlist=0), "shortlist must be at least 1"),
        (lambda index, x: index.search(x[0], nprobe=-1), "nprobe must be at least 1"),
        (lambda index, x: index.search(x[0], rescore="best"), "rescore must be one of auto, floats"),
        (lambda index, x: index.search(x[0], rescore="floats"), "This index has no floats"),
        (lambda index, x: index.search(x[0], ids=[99]), "1 of 1 ids are not in the index: 99"),
        (lambda index, x: index.add(x[:2, :5]), r"Expected embeddings of shape \(n, 16\)"),
        (lambda index, x: index.add(np.vstack([x[:1], BROKEN])), "Row 1 of the embeddings holds NaN"),
        (lambda index, x: index.add(x[:2].astype(np.int8)), "embeddings are int8"),
        (lambda index, x: index.add([["a"] * SIZE]), "Expected embeddings as floats"),
        (lambda index, x: index.add([[0.5] * SIZE, [0.5] * 3]), "Expected embeddings as floats"),
        (lambda index, x: index.add(), "Nothing to add"),
        (lambda index, x: index.add(x[:2], codes=np.zeros((2, 3), np.uint8)), "embeddings or codes, not both"),
        (lambda index, x: index.add(codes=np.zeros((2, 9), np.uint8)), r"Expected packed codes, uint8 \(n, 3\)"),
        (lambda index, x: index.add(codes=np.full((2, 3), 255, np.uint8)), "Codes must lie between 0 and 19"),
        (lambda index, x: index.add(x[:2], ids=[1, 50]), "1 ids are in the index already or come twice: 1"),
        (lambda index, x: index.add(x[:2], ids=[50, 50]), "come twice: 50"),
        (lambda index, x: index.add(x[:2], ids=[50]), "There are 1 ids for 2 vectors"),
        (lambda index, x: index.add(x[:2], ids=[50, "a"]), "all integers or all strings"),
        (lambda index, x: index.add(x[:2], ids=["a", "b"]), "ids of this index are of type int, got 'a'"),
        (lambda index, x: index.add(x[:1], ids=[2**63]), "integers of 64 bits"),
        (lambda index, x: index.add(x[:1], ids=[True]), "integers of 64 bits"),
        (lambda index, x: index.add(x[:1], ids=[1.5]), "integers of 64 bits"),
        (lambda index, x: index.add(x[:1], ids=[""]), "strings that are not empty"),
        (lambda index, x: index.add(x[:1], ids="abc"), "Expected a list of ids"),
        (lambda index, x: index.add(x[:1], texts=["a", "b"]), "There are 2 texts for 1 vectors"),
        (lambda index, x: index.add(x[:1], texts=[3]), "Expected texts as strings"),
        (lambda index, x: index.add(x[:1], texts=["\ud800"]), "Expected texts as strings"),
        (lambda index, x: index.add(x[:1], metadata=[[1]]), "Metadata are dictionaries"),
        (lambda index, x: index.add(x[:1], metadata=[{"a": float("nan")}]), "cannot be written as JSON"),
        (lambda index, x: index.add(x[:1], metadata=[{"a": object()}]), "cannot be written as JSON"),
        (lambda index, x: index.add(x[:1], duplicates="ignore"), "duplicates must be one of"),
        (lambda index, x: index.remove([1, 99]), "1 of 2 ids are not in the index: 99"),
        (lambda index, x: index.remove(), "Give either the ids or the filter"),
        (lambda index, x: index.update([99], x[:1]), "not in the index: 99"),
        (lambda index, x: index.update([1, 1], x[:2]), "An id comes twice"),
        (lambda index, x: index.update([1, 2], x[:1]), "There are 2 ids for 1 vectors"),
        (lambda index, x: index.update([1], metadata=[{}, {}]), "There are 2 metadata for 1 vectors"),
        (lambda index, x: index.get([99]), "not in the index: 99"),
        (lambda index, x: index.reconstruct([99]), "not in the index: 99"),
        (lambda index, x: index.save(), "This index has no folder"),
        (lambda index, x: index.add_from(x, batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(additive, clustered, call, message):
    index = RQMoEIndex(additive)
    index.add(clustered[:10], metadata=[{"number": number} for number in range(10)])
    before = list(index.documents()), index.reconstruct(range(10))
    with pytest.raises(ValueError, match=message):
        call(index, clustered)
    assert list(index.documents()) == before[0]
    np.testing.assert_array_equal(index.reconstruct(range(10)), before[1])


def test_bad_settings(additive, tmp_path):
    for settings, message in [
        ({"metric": "dot"}, "metric must be one of cosine"),
        ({"kind": "hnsw"}, "kind must be one of auto"),
        ({"num_lists": 0}, "num_lists must lie between 1"),
        ({"num_codebooks": 9}, "num_codebooks must lie between 1 and 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            RQMoEIndex(additive, tmp_path / "index", **settings)
    with pytest.raises(ValueError, match="never initialised"):
        RQMoEIndex(RQMoEModel(MEMBERS["additive"]))
    assert list(tmp_path.iterdir()) == []


def test_embeddings_that_float16_cannot_hold(additive, clustered):
    index = RQMoEIndex(additive, keep_floats=True)
    with pytest.raises(ValueError, match="as float16, which ends at 65504"):
        index.add(clustered[:2] * 1e6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_per_vector(processes, tmp_path):
    process = processes(index_workers.measure_memory, tmp_path / "log", 400_000)
    process.join(300)
    measured = json.loads((tmp_path / "log").read_text())  # resident memory of the process
    print("bytes per vector, flat and in lists:", *measured)
    assert index_workers.filled(20_000, 1).bytes_per_vector == 25  # code, norm, row number
    assert all(20 < each < 30 for each in measured), measured
