"""Shards that are searched together, against one index with the same rows, and against brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
from conftest import MEMBERS, SIZE, randomize
from typer.testing import CliRunner

from rqmoe_hf import RQMoEModel
from rqmoe_hf.cli import app
from rqmoe_hf.index import RQMoEIndex, RQMoEShards, verify

METRICS = ("cosine", "inner_product", "l2")
CUTS = (0, 900, 1000, 2300, 4000)  # four shards of different sizes


@pytest.fixture(scope="module", params=["additive", "paper"])
def quantizer(request) -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS[request.param]))


@pytest.fixture(scope="module")
def additive() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["additive"]))


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(20, SIZE)).astype(np.float32)


def build(quantizer, place, vectors, cuts=CUTS, **settings):
    """Folders of shards that were built apart, and one index with the same rows."""
    folders = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        folders.append(place / f"shard-{number}")
        with RQMoEIndex(quantizer, folders[-1], **settings) as index:
            fill(index, vectors, start, stop)
            index.save()
    one = RQMoEIndex(quantizer, place / "one", **settings)
    fill(one, vectors, cuts[0], cuts[-1])
    return folders, one


def fill(index, vectors, start, stop):
    """Rows with ids that are not in the order of the rows."""
    ids = [(7919 * number) % 100_003 for number in range(start, stop)]
    metadata = [{"third": number % 3 == 0} for number in range(start, stop)]
    if stop > start:
        index.add(vectors[start:stop], ids=ids, metadata=metadata, texts=[f"text {number}" for number in ids])


def same(found, expected):
    """Whether hits, order and scores are the same, bit by bit."""
    assert (found[1] == expected[1]).all()
    assert (found[0] == expected[0]).all()


@pytest.mark.parametrize(("metric", "kind"), product(METRICS, ("flat", "ivf")))
def test_four_shards_find_what_one_index_finds(quantizer, clustered, queries, tmp_path, metric, kind):
    folders, one = build(quantizer, tmp_path, clustered, metric=metric, kind=kind)
    with RQMoEShards(folders, quantizer) as shards, one:
        assert len(shards) == len(one) == 4000
        for settings in ({}, {"shortlist": 30}, {"rescore": "tables"}, {"shortlist": 10_000}, {"nprobe": 1},
                         {"filter": {"third": True}}, {"filter": {"third": True}, "rescore": "tables"}):  # fmt: skip
            same(shards.search(queries, 10, **settings), one.search(queries, 10, **settings))
        some = [(7919 * number) % 100_003 for number in range(880, 1020)]
        same(shards.search(queries[0], 5, ids=some), one.search(queries[0], 5, ids=some))
        restored = one.reconstruct([document.id for document in one.documents()])
        names = np.array([document.id for document in one.documents()])
        if metric == "l2":
            exact = -((restored[None] - queries[:, None]) ** 2).sum(axis=2)
        else:
            lengths = np.linalg.norm(restored, axis=1) if metric == "cosine" else 1
            exact = queries @ restored.T / lengths
        _, ids = shards.search(queries, 10, shortlist=4000)
        found = np.take_along_axis(exact, np.argsort(names)[np.searchsorted(np.sort(names), ids)], axis=1)
        np.testing.assert_allclose(found, -np.sort(-exact, axis=1)[:, :10], rtol=1e-5, atol=1e-5)


def test_equal_vectors_in_several_shards_come_in_their_order(additive, clustered, queries, tmp_path):
    vectors = np.repeat(clustered[:20], 200, axis=0)[np.random.default_rng(0).permutation(4000)]
    folders, one = build(additive, tmp_path, vectors, kind="flat")
    with RQMoEShards(folders, additive) as shards, one:
        for shortlist in (25, 100, 350):
            same(shards.search(queries, 20, shortlist=shortlist), one.search(queries, 20, shortlist=shortlist))


def test_shards_of_a_few_rows_or_none(additive, clustered, queries, tmp_path):
    folders, one = build(additive, tmp_path, clustered, (0, 0, 3, 3, 400), metric="l2")
    with RQMoEShards(folders, additive) as shards, one:
        same(shards.search(queries, 10, rescore="tables"), one.search(queries, 10, rescore="tables"))
        shards.save()
    with RQMoEShards(folders, additive) as shards:
        same(shards.search(queries, 10, shortlist=50), RQMoEIndex.load(tmp_path / "one", additive).search(
            queries, 10, shortlist=50))  # fmt: skip
    with RQMoEIndex.load(tmp_path / "one", additive) as unscanned, RQMoEShards(folders, additive) as shards:
        assert unscanned._ranker.scanner is None
        same(shards.search(queries, 10, shortlist=400), unscanned.search(queries, 10, shortlist=400))
    empty = RQMoEIndex(additive, tmp_path / "empty")
    with empty, RQMoEShards([tmp_path / "empty"], additive) as shards:
        assert len(shards) == 0 and shards.search(queries, 10)[1].shape == (20, 0)


def test_saved_shards_open_without_fitting_and_follow_changes(quantizer, clustered, queries, tmp_path, monkeypatch):
    folders, one = build(quantizer, tmp_path, clustered, kind="ivf")
    with RQMoEShards(folders, quantizer) as shards:
        shards.save()
    assert [problem for folder in folders for problem in verify(folder)] == []
    expected = one.search(queries, 10)
    monkeypatch.setattr("rqmoe_hf.index.shards.fit_tables", None)  # would fail
    with RQMoEShards(folders, quantizer) as shards:
        same(shards.search(queries, 10), expected)
        gone = [(7919 * number) % 100_003 for number in range(900, 950)]
        with RQMoEIndex.load(folders[1], quantizer) as writer:
            writer.remove(gone)
        with RQMoEIndex.load(folders[3], quantizer) as writer:  # the last, so that the order is that of one index
            fill(writer, clustered, 4000, 4300)
        one.remove(gone)
        fill(one, clustered, 4000, 4300)
        with one:
            assert len(shards) == len(one) == 4250
            same(shards.search(queries, 10), one.search(queries, 10))
            new = one.reconstruct([(7919 * 4100) % 100_003])
            same(shards.search(new, 1), one.search(new, 1))


def test_what_is_known_of_ids(additive, clustered, tmp_path):
    folders, one = build(additive, tmp_path, clustered)
    ids = [(7919 * number) % 100_003 for number in (3999, 0, 950, 1)]
    with RQMoEShards(folders, additive) as shards, one:
        assert shards.get(ids) == one.get(ids)
        assert (shards.reconstruct(ids) == one.reconstruct(ids)).all() and shards.reconstruct([]).shape == (0, SIZE)
        assert ids[0] in shards and -1 not in shards
        assert shards.count({"third": True}) == one.count({"third": True})
        assert [document.id for document in shards.get([-1, ids[0]], missing_ok=True)] == ids[:1]
        for call in (shards.get, shards.reconstruct, lambda ids: shards.search(clustered[0], ids=ids)):
            with pytest.raises(ValueError, match="1 of 2 ids are in none of the shards: -1"):
                call([ids[0], -1])


def test_merged_shards_are_one_index(quantizer, clustered, queries, tmp_path):
    folders, one = build(quantizer, tmp_path, clustered, metric="l2", kind="ivf", keep_floats=True)
    with RQMoEShards(folders, quantizer) as shards, shards.merge(tmp_path / "merged") as merged, one:
        same(merged.search(queries, 10), one.search(queries, 10))
        same(shards.search(queries, 10), one.search(queries, 10))  # by floats
        assert list(merged.documents()) == list(one.documents())
        assert merged.settings == one.settings and merged.add(clustered[:1]) == one.add(clustered[:1])
        with pytest.raises(ValueError, match="is there already"):
            shards.merge(tmp_path / "merged")
    assert verify(tmp_path / "merged") == []


def full(_):
    raise OSError("no space left")


def test_a_merge_that_fails_leaves_nothing(additive, clustered, tmp_path, monkeypatch):
    folders, one = build(additive, tmp_path, clustered)
    before = sorted(tmp_path.rglob("*"))
    with RQMoEShards(folders, additive) as shards:
        monkeypatch.setattr(RQMoEIndex, "save", full)
        with pytest.raises(OSError, match="no space left"):
            shards.merge(tmp_path / "merged")
    one.close()
    assert [file for file in sorted(tmp_path.rglob("*")) if file not in before and "sqlite-" not in file.name] == []


def test_strings_as_ids(additive, clustered, tmp_path):
    for number in range(2):
        with RQMoEIndex(additive, tmp_path / str(number)) as index:
            index.add(clustered[number * 200 : number * 200 + 200], ids=[f"{number}/{row}" for row in range(200)])
    with RQMoEShards([tmp_path / "0", tmp_path / "1"], additive) as shards:
        assert shards.search(additive.decompress(additive.compress(clustered[250:251])), 1)[1][0, 0] == "1/50"
    with RQMoEIndex.load(tmp_path / "1", additive) as index:
        index.add(clustered[:1], ids=["0/17"])
    with pytest.raises(ValueError, match="1 ids are in more than one shard, such as '0/17' in .*0 and .*1"):
        RQMoEShards([tmp_path / "0", tmp_path / "1"], additive)


@pytest.mark.parametrize(("settings", "message"), [
    ({"metric": "l2"}, "differ in their metric: .*shard-0 has cosine, .*other has l2"),
    ({"kind": "flat"}, "differ in their kind"),
    ({"keep_floats": True}, "differ in their keep_floats"),
    ({"num_codebooks": 3}, "differ in their quantizer's num_codebooks"),
])  # fmt: skip
def test_shards_that_do_not_belong_together(additive, clustered, tmp_path, settings, message):
    folders, one = build(additive, tmp_path, clustered, (0, 150))
    one.close()
    with RQMoEIndex(additive, tmp_path / "other", **settings) as other:
        other.add(clustered[:10], ids=range(200_000, 200_010))
    with pytest.raises(ValueError, match=message):
        RQMoEShards([folders[0], tmp_path / "other"], additive)


def test_bad_folders(additive, clustered, tmp_path):
    folders, one = build(additive, tmp_path, clustered, (0, 150, 300))
    one.close()
    with pytest.raises(ValueError, match="A folder is named twice"):
        RQMoEShards([folders[0], folders[0]], additive)
    with pytest.raises(ValueError, match="Expected a list of folders"):
        RQMoEShards(str(folders[0]), additive)
    with pytest.raises(ValueError, match="150 ids are in more than one shard"):
        RQMoEShards([folders[0], tmp_path / "one"], additive)
    with RQMoEIndex(randomize(RQMoEModel(MEMBERS["additive"]), seed=9), tmp_path / "foreign") as index:
        index.add(clustered[:5], ids=["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="foreign"):
        RQMoEShards([folders[0], tmp_path / "foreign"], additive)
    with pytest.raises(ValueError, match="missing holds no index"):
        RQMoEShards([folders[0], tmp_path / "missing"], additive)
    file = folders[1] / "collection.sqlite"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        RQMoEShards(folders, additive)


def test_the_command_line(passages, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        rows = range(number * 128, number * 128 + 128)
        with RQMoEIndex("minilm-384-8-bytes", f"shard-{number}", encoder=encoder) as index:
            index.add(texts=[passages[row] for row in rows], ids=rows)
    rqmoe = CliRunner()
    aligned = rqmoe.invoke(app, ["index", "align", "shard-0", "shard-1"])
    assert aligned.stdout.endswith("2 shards of 256 vectors are scored by the same tables.\n")
    merged = rqmoe.invoke(app, ["index", "merge", "shard-0", "shard-1", "--output", "one"])
    assert merged.stdout.endswith("one holds 256 vectors.\n")
    expected = rqmoe.invoke(app, ["index", "search", "one", "sorting a list", "-k", "9"]).stdout
    found = rqmoe.invoke(app, ["index", "search", "shard-0", "sorting a list", "-k", "9", "--shard", "shard-1"]).stdout
    assert found == expected and found.count("\n") == 10
    with pytest.raises(ValueError, match="one is there already"):
        rqmoe.invoke(app, ["index", "merge", "shard-0", "shard-1", "--output", "one"], catch_exceptions=False)


def test_lists_that_hold_too_little_are_not_the_end(additive, clustered, queries, tmp_path):
    folders, one = build(additive, tmp_path, clustered, kind="ivf", num_lists=600)  # default: 37 of them are scanned
    with RQMoEShards(folders, additive) as shards, one:
        for settings in ({}, {"nprobe": 1}, {"nprobe": 1, "shortlist": 200}):
            same(shards.search(queries, 150, **settings), one.search(queries, 150, **settings))
        assert shards.search(queries, 150, nprobe=1)[1].shape == (20, 150)
