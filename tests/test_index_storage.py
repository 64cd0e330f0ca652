"""Index folders: what survives a kill, what damage is noticed."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import index_workers
import numpy as np
import pytest
from conftest import MEMBERS, SIZE, randomize
from index_workers import MODEL, text_of, vector_of, wait_for

from rqmoe_hf import RQMoEModel, bundled_quantizers
from rqmoe_hf.index import Document, RQMoEIndex, verify
from rqmoe_hf.index.documents import State
from rqmoe_hf.index.storage import DATABASE, LOCK, MANIFEST

KILLS = int(os.environ.get("INDEX_KILLS", "6"))


def contents(index: RQMoEIndex) -> dict[int, tuple[str, dict]]:
    return {document.id: (document.text, document.metadata) for document in index.documents()}


def apply(state: dict, planned: dict) -> dict:
    after, version = dict(state), planned.get("version", 0)
    for id in planned["ids"]:
        if planned["kind"] == "remove":
            del after[id]
        elif planned["kind"] != "save":
            after[id] = (text_of(id, version), {"id": id, "version": version})
    return after


def test_kill_at_random_points(tmp_path, processes):
    """After `kill -9` all that was acknowledged is there, nothing is half there, and `verify` finds no damage."""
    folder, log, rng = tmp_path / "index", tmp_path / "log", np.random.default_rng(os.getpid())
    RQMoEIndex(MODEL, folder).close()
    state: dict[int, tuple[str, dict]] = {}
    unacknowledged = 0
    for kill in range(KILLS):
        log.unlink(missing_ok=True)
        process = processes(index_workers.keep_changing, folder, log, kill)
        wait_for(log, process)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.join()
        *lines, last = log.read_text().split("\n")
        planned = [json.loads(line) for line in lines if line.startswith("{")]
        done = lines.count("acknowledged")
        for one in planned[:done]:
            state = apply(state, one)
        assert verify(folder) == []
        with RQMoEIndex.load(folder, MODEL) as index:
            found = contents(index)
            if found != state:  # only the change that was at work may be there as well, and then all of it
                assert len(planned) == done + 1, (kill, last)
                state = apply(state, planned[-1])
                unacknowledged += 1
            assert found == state and len(index) == len(state)
            if len(state) > 30:
                ids = list(state)
                expected = MODEL.decompress(MODEL.compress(np.stack([vector_of(id) for id in ids])))
                np.testing.assert_allclose(index.reconstruct(ids), expected, rtol=1e-5)
                _, hits = index.search(vector_of(1), len(ids) - 1, shortlist=len(ids) - 1)  # by the scanner
                assert set(hits.tolist()) < set(ids) and len(set(hits.tolist())) == len(ids) - 1
    assert len(state) > 50
    print(f"{KILLS} kills, {unacknowledged} committed but not acknowledged, {len(state)} documents at the end")


def test_kill_while_an_index_is_made(tmp_path, processes):
    for number in range(4):
        folder, log = tmp_path / f"index-{number}", tmp_path / f"log-{number}"
        process = processes(index_workers.make, folder, log)
        wait_for(log, process)
        time.sleep(0.004 * number)
        process.kill()
        process.join()
        if (folder / MANIFEST).exists():
            assert verify(folder) == [] and len(RQMoEIndex.load(folder, MODEL)) == 0
        else:
            with RQMoEIndex(MODEL, folder) as index:  # what is left over is no obstacle
                index.add(vector_of(1)[None])
            assert verify(folder) == []


def test_what_was_saved_is_loaded(filled, clustered):
    with RQMoEIndex.load(filled, MODEL) as index:
        assert index._ranker.scanner._mapped is not None and index._ranker.scanner.lists == 20
        loaded = index._ranker.scanner
        first = index.search(clustered[:9], 7, shortlist=100)
        assert index._ranker.scanner is loaded
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "scan-" in line]
        assert mapped
    for file in filled.glob("scan-*"):
        file.unlink()
    with RQMoEIndex.load(filled, MODEL) as index:  # without the snapshot all is made anew
        for one, other in zip(first, index.search(clustered[:9], 7, shortlist=100), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
        assert contents(index) == {n: (f"text {n}", {"n": n}) for n in range(400)}
    assert verify(filled) == []


def test_a_snapshot_is_caught_up_with_what_came_later(filled, clustered):
    with RQMoEIndex.load(filled, MODEL) as index:
        index.remove(range(0, 400, 2))
        index.add(clustered[1000:1300], ids=range(1000, 1300))
        index.update([1, 3], clustered[2000:2002])
    with RQMoEIndex.load(filled, MODEL) as index:
        loaded = index._ranker.scanner
        scores, ids = index.search(clustered[:5], 499, shortlist=499, rescore="codes", nprobe=100)
        assert index._ranker.scanner is loaded and len(loaded) == 500
        rows = {**{n: n for n in range(1, 400, 2)}, **{n: n for n in range(1000, 1300)}, 1: 2000, 3: 2001}
        restored = MODEL.decompress(MODEL.compress(clustered[list(rows.values())]))
        restored /= np.linalg.norm(restored, axis=1, keepdims=True)
        queries = clustered[:5] / np.linalg.norm(clustered[:5], axis=1, keepdims=True)
        np.testing.assert_allclose(scores[:, :400], -np.sort(-queries @ restored.T, axis=1)[:, :400], atol=1e-4)
        assert set(ids.flatten().tolist()) <= set(rows)


def test_an_emptied_index_can_be_saved_copied_and_filled_again(tmp_path, clustered, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.index.index.REMOVALS", 100)
    with RQMoEIndex(MODEL, tmp_path / "index", kind="flat") as index:
        index.add(clustered[:2000], ids=range(2000))
        index.search(clustered[:1], 5)  # makes a scanner, which then holds what is removed
        index.remove(range(2000))
        index.save(tmp_path / "copy")
        index.save()
        assert (len(index), index.search(clustered[0], 5)[1].tolist()) == (0, [])
        index.add(clustered[:1500], ids=range(1500))
        index.save()
        found = index.search(clustered[:50], 5)[1]
    assert verify(tmp_path / "copy") == verify(tmp_path / "index") == []
    with RQMoEIndex(MODEL, kind="flat") as other:
        other.add(clustered[:1500], ids=range(1500))
        assert np.array_equal(found, other.search(clustered[:50], 5)[1])


def test_a_long_record_of_removals_is_forgotten_and_others_notice(filled, clustered, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.index.index.REMOVALS", 20)
    reader = RQMoEIndex.load(filled, MODEL)
    reader.search(clustered[0], 5, shortlist=20)
    with RQMoEIndex.load(filled, MODEL) as index:
        index.remove(range(100, 400))
        index.save()
        assert index._database.removed(0)[0].tolist() == []
        _, ids = index.search(clustered[0], 100)
    np.testing.assert_array_equal(np.sort(reader.search(clustered[0], 200)[1]), np.arange(100))
    np.testing.assert_array_equal(reader.search(clustered[0], 100)[1], ids)
    reader.close()
    assert verify(filled) == []


def flipped(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(content)


def parts(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != LOCK)


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damage_in_any_part_is_noticed_and_named(filled, tmp_path, kind):
    names = parts(filled)
    assert len(names) == 3
    rng = np.random.default_rng(0)
    for name in names:
        size = (filled / name).stat().st_size
        places = [0, size - 1, size // 2, *rng.integers(0, size, 12).tolist()]
        for place in places:
            folder = tmp_path / "damaged"
            shutil.copytree(filled, folder)
            if kind == "flip":
                flipped(folder / name, place)
            else:
                os.truncate(folder / name, place)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                RQMoEIndex.load(folder, MODEL)
            found = verify(folder)
            assert found and all(name in problem for problem in found), (place, found)
            shutil.rmtree(folder)
    assert verify(filled) == []


def test_damage_after_an_unclean_end_is_noticed_by_the_checksums_of_entries(filled, tmp_path, clustered):
    """Without the checksum of the whole file, each entry still has its own."""
    index = RQMoEIndex.load(filled, MODEL)
    index.add(clustered[:60], ids=range(5000, 5060), texts=["a secret text"] * 60)
    crashed = tmp_path / "crashed"
    shutil.copytree(filled, crashed)  # as a kill would leave it
    index.close()
    assert verify(crashed) == []
    content = (crashed / DATABASE).read_bytes()
    places = [content.index(b"a secret text") + 3, content.index(MODEL.compress(clustered[:1]).tobytes()),
              content.index(b'{"n": 17}') + 6]  # fmt: skip
    for place in places:
        folder = tmp_path / "damaged"
        shutil.copytree(crashed, folder)
        flipped(folder / DATABASE, place)
        assert any("checksums of" in problem for problem in verify(folder))
        with pytest.raises(ValueError, match=f"{DATABASE} is damaged: the checksums of [1-9]"):
            RQMoEIndex.load(folder, MODEL)
        shutil.rmtree(folder)
    state = sqlite3.connect(crashed / DATABASE)
    state.execute("UPDATE state SET value = value + 1 WHERE name = 'count'")
    state.commit()
    state.close()
    assert "checksum of its state does not fit" in verify(crashed)[0]


def test_missing_parts(filled, tmp_path):
    for name, message in ((MANIFEST, "holds no index"), (DATABASE, "is missing")):
        folder = tmp_path / name
        shutil.copytree(filled, folder)
        (folder / name).unlink()
        assert message in verify(folder)[0]
        with pytest.raises(ValueError, match=message):
            RQMoEIndex.load(folder, MODEL)
    with pytest.raises(ValueError, match="holds no index"):
        RQMoEIndex.load(tmp_path / "nowhere", MODEL)


def test_hostile_files_are_refused(filled, tmp_path):
    import pickle

    from rqmoe_hf.index.storage import IndexFolder

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    def replaced(name: str, content: bytes) -> Path:
        """A copy whose manifest vouches for other content."""
        folder = tmp_path / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(filled, folder)
        (folder / name).write_bytes(content)
        place = IndexFolder(folder)
        files = dict(place.read()["files"])
        files[name] |= place.record(folder / name)
        place.write(place.manifest | {"files": files})
        return folder

    database, scan = DATABASE, next(filled.glob("scan-*")).name
    for name in (database, scan):
        for content in (pickle.dumps(Trap()), b"", b"SQLite format 3\0" + bytes(500), b"\xff" * 5000):
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                RQMoEIndex.load(replaced(name, content), MODEL)
    with_trigger = sqlite3.connect(filled / database)
    with_trigger.execute("CREATE TRIGGER trap AFTER DELETE ON vectors BEGIN DELETE FROM documents; END")
    with_trigger.commit()
    with_trigger.close()
    with pytest.raises(ValueError, match="its tables are others"):
        RQMoEIndex.load(replaced(database, (filled / database).read_bytes()), MODEL)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("different", ["rows", "codes"])
def test_a_snapshot_of_other_vectors_is_not_believed(filled, clustered, different):
    """Its sizes fit, its checksum does, and its rows, or only their codes, are not those of the database."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    from rqmoe_hf.index.storage import IndexFolder

    scan = next(filled.glob("scan-*"))
    arrays = load_file(scan)
    with safe_open(scan, "numpy") as opened:
        notes = opened.metadata()
    if different == "rows":
        arrays["lists"] = np.random.default_rng(0).integers(0, 256, arrays["lists"].shape, np.uint8)
    else:
        place, width = 0, arrays["lists"].size // arrays["sizes"].sum()
        for size in arrays["sizes"].tolist():  # codes, then row numbers of 8 bytes
            arrays["lists"][place : place + size * (width - 8) : width - 8] ^= 1
            place += size * width
    save_file(arrays, scan, notes)
    place = IndexFolder(filled)
    files = place.read()["files"] | {scan.name: place.record(scan)}
    place.write(place.manifest | {"files": files})
    with RQMoEIndex.load(filled, MODEL) as index, pytest.raises(ValueError, match=r"delete scan-\*"):
        index.search(clustered[:3], 5, shortlist=100)
    with RQMoEIndex.load(filled, MODEL) as index, pytest.raises(ValueError, match=r"delete scan-\*"):
        index.search(clustered[:3], 5, shortlist=300, filter={"n": {"$lt": 350}}, rescore="tables")


def test_another_quantizer_is_refused(filled):
    other = randomize(RQMoEModel(MEMBERS["additive"]), seed=1)
    with pytest.raises(ValueError, match=r"These codes were made by .* load that quantizer"):
        RQMoEIndex.load(filled, other)
    with pytest.raises(ValueError, match="no quantizer"):
        RQMoEIndex.load(filled)  # this one has no name


def test_saving_an_index_that_has_no_folder(tmp_path, clustered):
    index = RQMoEIndex(MODEL)
    index.add(clustered[:300], ids=[f"id {n}" for n in range(300)], texts=["text"] * 300)
    before, scanner = index.search(clustered[:4], 5, shortlist=50), index._ranker.scanner
    index.add(-clustered[:1] * 99, ids=["late"])  # the scanner does not know it yet
    assert index.folder is None
    index.save(tmp_path / "index")
    assert index.folder == tmp_path / "index"
    for one, other in zip(before, index.search(clustered[:4], 5, shortlist=50), strict=True):
        np.testing.assert_array_equal(one, other)
    assert index._ranker.scanner is scanner  # nothing was made anew
    index.remove(["id 7"])  # lives there from now on
    index.save(tmp_path / "copy")
    index.remove(["id 8"])
    index.close()
    assert verify(tmp_path / "index") == verify(tmp_path / "copy") == []
    with RQMoEIndex.load(tmp_path / "index", MODEL) as first, RQMoEIndex.load(tmp_path / "copy", MODEL) as copy:
        assert (len(first), len(copy)) == (299, 300) and "id 8" in copy
        assert copy.get(["id 9"]) == [Document("id 9", "text", {})]
        with pytest.raises(ValueError, match="holds an index already"):
            first.save(tmp_path / "copy")
    with pytest.raises(ValueError, match="holds an index already"):
        RQMoEIndex(MODEL, tmp_path / "index")
    index.close()  # a second time is harmless
    with pytest.raises(ValueError, match="The index is closed: open its folder again"):
        len(index)


def test_relative_names_mean_what_they_did_when_they_were_given(tmp_path, monkeypatch, clustered):
    """A process may change its working directory, and another one have another."""
    monkeypatch.chdir(tmp_path)
    MODEL.save_pretrained("quantizer")
    (tmp_path / "elsewhere").mkdir()
    with RQMoEIndex("quantizer", "index", encoder="quantizer") as index:
        index.add(clustered[:150])
        monkeypatch.chdir("elsewhere")
        index.add(clustered[150:200])
        index.save()
        assert index.folder == tmp_path / "index" and index.settings["encoder"] == str(tmp_path / "quantizer")
    with RQMoEIndex.load("../index") as index:  # finds the quantizer by itself
        assert len(index) == 200
    assert verify(tmp_path / "index") == [] and list(Path().iterdir()) == []


def test_a_quantizer_is_given_by_its_path(tmp_path):
    name = "minilm-384-8-bytes"
    folder = bundled_quantizers()[name]
    with RQMoEIndex(folder, tmp_path / "index") as index:
        assert index.settings["quantizer"]["model"] == name
    with RQMoEIndex.load(tmp_path / "index", folder) as index:
        assert index.quantizer.name_or_path == str(folder)


def test_nothing_unfinished_is_left_over(filled, clustered):
    (filled / ".scan-99.safetensors.tmp").write_bytes(b"unfinished")
    (filled / "scan-98.safetensors").write_bytes(b"of a save that was killed before its manifest")
    with RQMoEIndex.load(filled, MODEL) as index:
        index.add(clustered[:1], ids=[777])
        index.save()
    assert len(parts(filled)) == 3 and verify(filled) == []


def test_an_experts_snapshot_brings_its_tables(tmp_path, clustered):
    model = randomize(RQMoEModel(MEMBERS["paper"]))
    for metric in ("cosine", "inner_product"):
        with RQMoEIndex(model, tmp_path / metric, metric=metric) as index:
            index.add(clustered[:500])
            index.save()
            before = index.search(clustered[:5], 20, shortlist=40, rescore="tables")
        with RQMoEIndex.load(tmp_path / metric, model) as index:
            assert index._ranker.scanner is not None
            after = index.search(clustered[:5], 20, shortlist=40, rescore="tables")
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)


def test_sizes(filled):
    assert (filled / DATABASE).stat().st_size < 400 * (3 + 2 * SIZE + 40) + 100_000


@pytest.mark.parametrize(
    ("damage", "count"),
    [
        ("DELETE FROM vectors WHERE row > 15", 20),
        ("DELETE FROM vectors", 20),
        ("UPDATE state SET value = 0 WHERE name = 'count'", 0),
    ],
)
def test_a_state_that_counts_other_rows_than_there_are_is_refused(damage, count, tmp_path, clustered, monkeypatch):
    monkeypatch.setattr(State, "checksum", 7)  # so that the count alone can be changed
    with RQMoEIndex(MODEL, tmp_path / "index", metric="l2") as index:
        index.add(clustered[:20], metadata=[{"n": number} for number in range(20)])
        with closing(sqlite3.connect(tmp_path / "index" / DATABASE)) as connection:
            connection.execute(damage)
            connection.commit()
        settings = {"rescore": "tables", "shortlist": 5, "filter": {"n": {"$gte": 0}} if not count else None}
        with pytest.raises(ValueError, match=f"{DATABASE} is damaged: its state counts {count} rows"):
            index.search(clustered[:1], 3, **settings)
