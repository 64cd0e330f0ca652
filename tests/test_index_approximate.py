"""The approximate decoder of an index, against its formula, brute force and what codes decode to."""

import numpy as np
import pytest
from conftest import CODEWORDS, MEMBERS, SIZE, STEPS, randomize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rqmoe_hf import RQMoEModel, pack_codes
from rqmoe_hf.codes import unpack_codes
from rqmoe_hf.index import RQMoEIndex, RQMoEShards, approximate, fitting, verify
from rqmoe_hf.index.approximate import ApproximateDecoder, fit_decoder
from rqmoe_hf.index.rescoring import WIDENING

METRICS = ("cosine", "inner_product", "l2")
ROWS = 4_500
NAMES = ("tables.weight", "codes.weight", "bias", "hidden.weight", "hidden.bias", "output.weight", "output.bias")


@pytest.fixture(scope="module")
def experts() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["qinco"]))


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    return np.random.default_rng(3).integers(CODEWORDS, size=(ROWS, STEPS))


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(20, SIZE)).astype(np.float32)


@pytest.fixture(autouse=True)
def from_few_codes(monkeypatch):
    monkeypatch.setattr(fitting, "DECODER_FROM", 3_000)
    monkeypatch.setattr(fitting, "DECODER_ROWS", 4_000)
    monkeypatch.setattr(approximate, "BATCH", 64)


def filled(model, codes, folder=None, **settings) -> RQMoEIndex:
    index = RQMoEIndex(model, folder, **settings)
    index.add(codes=pack_codes(codes, CODEWORDS), ids=range(len(codes)))
    return index


def by_formula(arrays: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """The network, one vector after the other."""
    given = (arrays[name].astype(np.float64) for name in NAMES)
    tables, weights, bias, hidden, hidden_bias, output, output_bias = given
    restored = []
    for row in codes:
        numbers = [32 * step + code for step, code in enumerate(row)]
        inner = np.maximum(sum(weights[number] for number in numbers) + bias, 0)
        added = output @ (inner + np.maximum(hidden @ inner + hidden_bias, 0)) + output_bias
        restored.append(sum(tables[number] for number in numbers) + added)
    return np.array(restored)


def scores(queries, vectors, metric):
    if metric == "l2":
        return -((vectors[None] - queries[:, None]) ** 2).sum(axis=2)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return queries @ vectors.T


@pytest.mark.parametrize("member", ["paper", "qinco"])
def test_it_restores_what_tables_miss(codes, member):
    """Of codes that it was not fitted to; as its formula says."""
    experts = randomize(RQMoEModel(MEMBERS[member]))
    index = filled(experts, codes)
    index.search(np.ones(SIZE, np.float32))
    scanner = index._ranker.scanner
    others = np.random.default_rng(4).integers(CODEWORDS, size=(500, STEPS))
    packed = pack_codes(others, CODEWORDS)
    truth = experts.decompress(packed)
    before = np.square(truth - scanner.sums(packed)).sum()
    after = np.square(truth - scanner.restored(packed)).sum()
    assert after < 0.8 * before
    expected = by_formula(scanner.tables.decoder.arrays(), others)
    np.testing.assert_allclose(scanner.restored(packed), expected, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_stages_equal_brute_force(experts, codes, queries, metric):
    """Tables choose four times the shortlist, the approximate decoder the shortlist, and the real one ranks it."""
    index, shortlist = filled(experts, codes, metric=metric), 12
    found = index.search(queries, 5, shortlist=shortlist, nprobe=10**6)
    scanner, packed = index._ranker.scanner, pack_codes(codes, CODEWORDS)
    stages = scanner.sums(packed), by_formula(scanner.tables.decoder.arrays(), codes)
    decoded = experts.decompress(packed)
    for query, hits in zip(queries, found[1], strict=True):
        rows = np.arange(ROWS)
        for vectors, count in zip((*stages, decoded), (WIDENING * shortlist, shortlist, 5), strict=True):
            rows = rows[np.argsort(-scores(query[None], vectors[rows], metric)[0], kind="stable")[:count]]
        # Tables know norms to one of 256 levels, so that the last of their rows may be others.
        assert len(set(rows) & set(hits.tolist())) >= 4, (rows, hits)
    everything = index.search(queries, 5, shortlist=ROWS)[1]
    expected = np.argsort(-scores(queries, decoded, metric), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(everything, expected)


def test_it_finds_more(experts, codes, queries, monkeypatch):
    truth = np.argsort(-scores(queries, experts.decompress(pack_codes(codes, CODEWORDS)), "cosine"), axis=1)[:, :10]

    def share(index):
        hits = index.search(queries, 10, shortlist=20)[1]
        return np.mean([len(set(some) & set(best)) for some, best in zip(hits.tolist(), truth.tolist(), strict=True)])

    more = share(filled(experts, codes))
    monkeypatch.setattr(fitting, "DECODER_FROM", ROWS + 1)
    plain = filled(experts, codes)
    assert share(plain) < more
    assert plain._ranker.scanner.tables.decoder is None


def test_restricted_searches(experts, codes, queries):
    """Few rows that a filter leaves are all decoded; floats and tables rank as they are asked to."""
    index = filled(experts, codes)
    decoded, few = experts.decompress(pack_codes(codes, CODEWORDS)), np.arange(100, 700)
    index.search(queries)
    hits = index.search(queries, 7, ids=few, shortlist=20)[1]
    np.testing.assert_array_equal(hits, few[np.argsort(-scores(queries, decoded[few], "cosine"), axis=1)[:, :7]])
    sums = index._ranker.scanner.sums(pack_codes(codes, CODEWORDS))
    hits = index.search(queries, 1, rescore="tables", shortlist=50)[1]
    np.testing.assert_array_equal(hits[:, 0], scores(queries, sums, "cosine").argmax(axis=1))


def test_a_snapshot_brings_it(experts, codes, queries, tmp_path):
    with filled(experts, codes, tmp_path / "index", kind="ivf") as index:
        index.save()
        before = index.search(queries, 10, shortlist=20)
    with RQMoEIndex.load(tmp_path / "index", experts) as index:
        assert index._ranker.scanner.tables.decoder is not None
        after = index.search(queries, 10, shortlist=20)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert verify(tmp_path / "index") == []
    again = filled(experts, codes, kind="ivf")  # fitted anew, to the same codes
    np.testing.assert_array_equal(again.search(queries, 10, shortlist=20)[1], before[1])


@pytest.mark.parametrize("damage", ["a weight is missing", "wider", "of another type", "of no width"])
def test_hostile_snapshots_are_refused(experts, codes, tmp_path, damage):
    with filled(experts, codes, tmp_path / "index") as index:
        index.save()
    (file,) = (tmp_path / "index").glob("scan-*.safetensors")
    arrays = load_file(file)
    with safe_open(file, "numpy") as opened:
        notes = opened.metadata()
    if damage == "a weight is missing":
        del arrays["decoder.hidden.weight"]
    elif damage == "wider":
        arrays["decoder.output.weight"] = np.ones((SIZE + 1, 256), np.float32)
    elif damage == "of another type":
        arrays["decoder.codes.weight"] = arrays["decoder.codes.weight"].astype(np.float64)
    else:
        arrays["decoder.bias"] = np.ones((), np.float32)
    lists = arrays.pop("lists")
    save_file(arrays | {"lists": lists}, file, notes)
    with pytest.raises(ValueError, match="no snapshot of this index"):
        index._ranker.load(file)


def test_shards_equal_one_index(experts, codes, queries, tmp_path):
    folders = []
    for number, part in enumerate(np.split(np.arange(ROWS), [900, 1000, 3300])):
        folders.append(tmp_path / f"shard-{number}")
        with RQMoEIndex(experts, folders[-1]) as index:
            index.add(codes=pack_codes(codes[part], CODEWORDS), ids=part)
    expected = filled(experts, codes).search(queries, 10, shortlist=20)
    with RQMoEShards(folders, experts) as shards:
        found = shards.search(queries, 10, shortlist=20)
        assert shards._rescorer.scanner.tables.decoder is not None
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_that_gains_nothing_is_not_kept():
    rng = np.random.default_rng(0)
    rows, noise = rng.integers(64, size=(5_000, 3)), rng.normal(size=(5_000, 8)).astype(np.float32)
    codewords = rng.normal(size=(64, 8)).astype(np.float32)
    assert fit_decoder(rows, codewords[rows].sum(axis=1) + noise, codewords) is None
    learned = fit_decoder(rows, np.repeat((rows[:, :1] * rows[:, 1:2] % 7).astype(np.float32), 8, axis=1), codewords)
    assert isinstance(learned, ApproximateDecoder)


def test_tables_are_fitted_to_all_of_the_sample(experts, codes, monkeypatch):
    """And not to its first rows, which are those that were added first."""
    monkeypatch.setattr(fitting, "FIT_ROWS", 500)
    same = np.repeat(codes[:1], 3_000, axis=0)  # of one kind
    scanner = fitting.fit_scanner(experts, pack_codes(np.vstack([same, codes[:900]]), CODEWORDS), STEPS, "l2", 1)
    packed = pack_codes(codes[1000:1300], CODEWORDS)
    truth = experts.decompress(packed)
    error = np.square(truth - scanner.sums(packed)).sum(axis=1).mean()
    assert error < 0.9 * np.square(truth - truth.mean(axis=0)).sum(axis=1).mean()
    assert (unpack_codes(packed, STEPS, CODEWORDS) == codes[1000:1300]).all()
