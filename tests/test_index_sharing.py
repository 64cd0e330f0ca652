"""An index on the Hub and on the command line."""

import json

import numpy as np
import pytest
from conftest import MEMBERS, randomize
from datasets import Dataset
from index_workers import MODEL
from typer.testing import CliRunner

from rqmoe_hf import RQMoEModel, quantize_embeddings
from rqmoe_hf.cli import app
from rqmoe_hf.data import compress_shards
from rqmoe_hf.index import RQMoEIndex, verify
from rqmoe_hf.index.storage import DATABASE, MANIFEST
from rqmoe_hf.index.tables import SourceTable


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A quantizer in a folder."""
    folder = tmp_path_factory.mktemp("quantizer") / "small"
    randomize(RQMoEModel(MEMBERS["additive"])).save_pretrained(folder)
    return str(folder)


PUSH = """
    import numpy as np
    from rqmoe_hf import RQMoEModel
    from rqmoe_hf.index import RQMoEIndex
    RQMoEModel.from_pretrained({saved!r}).push_to_hub("org/quantizer")
    model = RQMoEModel.from_pretrained("org/quantizer")
    index = RQMoEIndex(model, "here", encoder={saved!r})
    vectors = np.load("vectors.npy")
    index.add(vectors, ids=[f"id {{n}}" for n in range(len(vectors))], texts=["<b>text</b>"] * len(vectors))
    index.push_to_hub("org/index")
    index.remove(["id 0"])
    index.push_to_hub("org/index", commit_message="Fewer", revision="second")
    np.savez("expected.npz", *index.search(vectors[:3], 5, shortlist=200))
"""
LOAD = """
    import os, shutil
    from rqmoe_hf.index import verify
    shutil.rmtree(os.environ["HF_HOME"])  # nothing of it is in a cache
    first = RQMoEIndex.from_pretrained("org/index")
    assert len(first) == 300 and first._ranker.scanner is not None and first.settings["encoder"] is None
    assert first.get(["id 0"])[0].text == "<b>text</b>"
    try:
        first.remove(["id 0"])
    except ValueError as error:
        assert "Hub's cache" in str(error)
    first.search(vectors[:3], 5, shortlist=200)
    first.close()
    os.mkdir("copy")
    with open("copy/collection.sqlite-wal", "wb") as leftover:
        leftover.write(b"of a process that was killed")
    second = RQMoEIndex.from_pretrained("org/index", folder="copy", revision="second")
    np.savez("found.npz", *second.search(vectors[:3], 5, shortlist=200))
    second.add(vectors[:1], ids=["new"])
    second.close()
    assert verify("copy") == []
    other = RQMoEIndex.load("copy")  # finds the quantizer by itself
    assert len(other) == 300 and "new" in other
    try:
        RQMoEIndex.from_pretrained("org/index", folder="copy")
    except ValueError as error:
        assert "holds an index already" in str(error)
"""


def test_push_and_load(hub, client, saved, clustered, tmp_path):
    np.save(tmp_path / "vectors.npy", clustered[:300])
    client(PUSH.format(saved=saved) + LOAD)
    repository = hub.repositories["dataset", "org/index"]
    assert list(repository.messages.values()) == ["initial commit", "Upload index", "Fewer"]
    files = {path: file.content for path, file in repository.commits[repository.branches["second"]].items()}
    scans = [path for path in files if path.startswith("scan-")]
    assert set(files) == {".gitattributes", "README.md", MANIFEST, DATABASE, *scans} and len(scans) == 1
    manifest = json.loads(files[MANIFEST])
    pushed = hub.repositories["model", "org/quantizer"]
    assert manifest["quantizer"]["model"] == "org/quantizer"
    assert manifest["quantizer"]["revision"] == pushed.branches["main"]
    card = files["README.md"].decode()
    assert "# 299 embeddings" in card and manifest["quantizer"]["weights"] in card
    expected, found = np.load(tmp_path / "expected.npz", allow_pickle=True), np.load(tmp_path / "found.npz",
                                                                                      allow_pickle=True)  # fmt: skip
    np.testing.assert_array_equal(expected["arr_0"], found["arr_0"])
    np.testing.assert_array_equal(expected["arr_1"], found["arr_1"])


def test_a_quantizer_that_nobody_else_has_is_not_pushed(saved, clustered):
    index = RQMoEIndex(RQMoEModel.from_pretrained(saved))
    index.add(clustered[:10])
    with pytest.raises(ValueError, match="Nobody else could decode these codes"):
        index.push_to_hub("org/nothing")


def rqmoe(*arguments, code: int = 0, **options) -> str:
    result = CliRunner().invoke(app, ["index", *map(str, arguments)], **options)
    assert result.exit_code == code, result.output
    return result.stdout


def test_build_from_embeddings_codes_and_tables(saved, clustered, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    np.save("vectors.npy", clustered[:500])
    model = RQMoEModel.from_pretrained(saved).eval()
    assert "Added 500 vectors; the index holds 500" in rqmoe("build", "first", "vectors.npy", "--model", saved)
    assert "Added 0 vectors" in rqmoe("build", "first", "vectors.npy", "--model", saved)  # they are in
    compress_shards("vectors.npy", "codes", model)
    rqmoe("build", "second", "codes", "--model", saved)
    table = {"key": [f"k{n}" for n in range(500)], "vector": list(clustered[:500]), "passage": ["words"] * 500,
             "year": list(range(500))}  # fmt: skip
    pq.write_table(pa.table(table), "table.parquet")
    options = ["--model", saved, "--column", "vector", "--id-column", "key", "--text-column", "passage",
               "--metadata", "year", "--metric", "l2", "--batch-size", "64"]  # fmt: skip
    rqmoe("build", "third", "table.parquet", *options)
    codes = quantize_embeddings(clustered[:500], model)
    for folder, ids in (("first", range(500)), ("second", range(500)), ("third", table["key"])):
        with RQMoEIndex.load(folder) as index:
            np.testing.assert_allclose(index.reconstruct(ids), model.decompress(codes), rtol=1e-5)
    with RQMoEIndex.load("third") as index:
        assert index.get(["k7"])[0].text == "words" and index.count({"year": {"$lt": 10}}) == 10
        assert index.settings["metric"] == "l2"
        index.remove(["k7", "k9"])
    again = ["add", "third", "table.parquet", *options[2:8], "--metadata", "year"]
    rqmoe(*again, code=1)  # ids that are there
    assert "Added 500 vectors; the index holds 500" in rqmoe(*again, "--duplicates", "skip")
    assert "third is whole" in rqmoe("verify", "third")
    shown = rqmoe("info", "third")
    assert "500" in shown and "l2" in shown and "3 (float32: 64)" in shown
    content = bytearray((tmp_path / "third" / DATABASE).read_bytes())
    content[5000] ^= 1
    (tmp_path / "third" / DATABASE).write_bytes(content)
    assert f"{DATABASE} is damaged" in rqmoe("verify", "third", code=1)


def test_a_build_that_was_stopped_continues(saved, clustered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("vectors.npy", clustered[:500])
    added = []
    add = RQMoEIndex._add

    def stopping(self, batch, *arguments):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(len(batch))
        return add(self, batch, *arguments)

    monkeypatch.setattr(RQMoEIndex, "_add", stopping)
    with pytest.raises(KeyboardInterrupt):
        RQMoEIndex(RQMoEModel.from_pretrained(saved), "index").add_from("vectors.npy", batch_size=100)
    monkeypatch.setattr(RQMoEIndex, "_add", add)
    assert "Added 200 vectors; the index holds 500" in rqmoe("build", "index", "vectors.npy", "--model", saved)
    with RQMoEIndex.load("index") as index:
        model = RQMoEModel.from_pretrained(saved)
        np.testing.assert_allclose(index.reconstruct(range(500)), model.decompress(model.compress(clustered[:500])))
    np.save("more.npy", clustered[500:520])
    assert "the index holds 520" in rqmoe("add", "index", "more.npy")


@pytest.fixture
def tables(clustered) -> dict[str, Dataset]:
    """The same vectors without and with ids."""
    plain = {"embeddings": clustered[:50]}
    return {"counted": Dataset.from_dict(plain), "named": Dataset.from_dict(plain | {"id": list(range(50))})}


@pytest.mark.parametrize("kind", ["counted", "named"])
def test_a_source_whose_vectors_were_all_removed_is_added_again(tables, kind, clustered):
    index = RQMoEIndex(MODEL)
    index.add(clustered[100:101], ids=[1000])
    assert index.add_from(tables[kind]) == 50 and index.add_from(tables[kind]) == 0
    index.remove(filter={})
    assert index.add_from(tables[kind]) == 50 and index.add_from(tables[kind]) == 0
    expected = MODEL.decompress(MODEL.compress(clustered[:50]))
    np.testing.assert_allclose(index.reconstruct([found.id for found in index.documents()]), expected, rtol=1e-5)


def test_a_source_of_which_some_vectors_were_removed_is_not_complete(tables):
    index = RQMoEIndex(MODEL)
    index.add_from(tables["named"])
    index.remove([3, 4])
    with pytest.raises(ValueError, match="48 ids are in the index already"):
        index.add_from(tables["named"])
    assert index.add_from(tables["named"], duplicates="skip") == 50
    assert sorted(found.id for found in index.documents()) == list(range(50))
    assert index.add_from(tables["named"]) == 0  # complete again
    assert index.add_from(tables["counted"]) == 50
    index.remove([50])
    with pytest.raises(ValueError, match="All 50 rows of this table .* Without a column of ids"):
        index.add_from(tables["counted"])
    assert len(index) == 99


@pytest.mark.parametrize("kind", ["counted", "named"])
def test_an_interrupted_source_goes_on_although_vectors_were_removed(tables, kind, clustered, monkeypatch):
    index, batch = RQMoEIndex(MODEL), SourceTable.batch

    def stopping(self, start, stop):
        if start == 20:
            raise KeyboardInterrupt
        return batch(self, start, stop)

    monkeypatch.setattr(SourceTable, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        index.add_from(tables[kind], batch_size=10)
    monkeypatch.setattr(SourceTable, "batch", batch)
    index.remove([3])
    assert index.add_from(tables[kind], batch_size=10) == 30
    rows = [row for row in range(50) if row != 3]
    expected = MODEL.decompress(MODEL.compress(clustered[rows]))
    np.testing.assert_allclose(index.reconstruct([found.id for found in index.documents()]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="are in the index already|Without a column of ids"):
        index.add_from(tables[kind])  # it has been read to its end, and a vector is missing


def test_search_by_texts(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["How to copy a file with shutil.", "The cat sleeps on the sofa.", "Parsing dates\nand times."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t, "n": n}) + "\n" for n, t in enumerate(texts)))
    build = ["build", "index", "texts.jsonl", "--model", "minilm-384-8-bytes", "--encoder", encoder, "--metadata", "n"]
    assert "the index holds 3" in rqmoe(*build)
    found = rqmoe("search", "index", "duplicate a document", "-k", "2")
    assert found.splitlines()[0].endswith('  0  How to copy a file with shutil.  {"n": 0}')
    filtered = rqmoe("search", "index", "a pet", "--filter", '{"n": {"$ne": 1}}')
    assert "sofa" not in filtered and "Parsing dates and times." in filtered
    asked = rqmoe("search", "index", "-k", "1", input="a pet\nwhat day is it\n\n")
    assert asked.index("sofa") < asked.index("Parsing dates")


def test_mistakes_are_messages(saved, clustered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("vectors.npy", clustered[:50])
    rqmoe("build", "index", "vectors.npy", "--model", saved)
    for arguments, message in [
        (["build", "index", "vectors.npy", "--model", saved, "--metric", "l2"], "an index with metric cosine"),
        (["build", "index", "vectors.npy", "--model", saved, "--num-codebooks", "1"], "with num_codebooks 4: choose"),
        (["build", "other", "none.npy", "--model", saved], "There is no file none.npy"),
        (["build", "other", "vectors.npy", "--model", saved, "--metadata", "x"], "There is no column 'x'"),
        (["add", "nowhere", "vectors.npy"], "holds no index"),
        (["search", "index", "words"], "Texts need an encoder"),
        (["search", "index", "words", "--filter", "{"], "--filter expects JSON"),
        (["info", "nowhere"], "holds no index"),
    ]:
        result = CliRunner().invoke(app, ["index", *arguments])
        assert isinstance(result.exception, ValueError) and message in str(result.exception), arguments
    assert verify("index") == []
