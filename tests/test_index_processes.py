"""Index folders: who reads and writes at once, in one process and in several."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import index_workers
import pytest
from index_workers import MODEL, vector_of, wait_for

from rqmoe_hf.index import RQMoEIndex, verify
from rqmoe_hf.index.storage import DATABASE


def test_one_writer_at_a_time(filled, clustered):
    first, second = RQMoEIndex.load(filled, MODEL), RQMoEIndex.load(filled, MODEL)
    first.add(clustered[:1], ids=[9000])
    for change in (lambda: second.add(clustered[:1]), lambda: second.remove([1]), second.save,
                   lambda: second.update([1], metadata=[{}])):  # fmt: skip
        with pytest.raises(BlockingIOError, match=r"writes to .* one writer at a time"):
            change()
    assert 9000 in second and len(second) == 401  # reading goes on
    first.close()
    second.add(clustered[:1], ids=[9001])
    second.close()
    assert verify(filled) == []
    with RQMoEIndex.load(filled, MODEL) as third:
        assert 9000 in third and 9001 in third


def test_the_writer_is_the_index_and_not_a_thread(filled, clustered):
    """All threads of an index may write, also several at once for the first time; other indexes are refused."""
    with RQMoEIndex.load(filled, MODEL) as index, RQMoEIndex.load(filled, MODEL) as other:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: index.add(clustered[n : n + 1], ids=[9000 + n]), range(20)))
        index.remove([9000])  # from here as well
        with ThreadPoolExecutor(1) as pool, pytest.raises(BlockingIOError, match="one writer at a time"):
            pool.submit(other.remove, [1]).result()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(index.close).result()
        other.remove([9001])
        assert len(other) == 418
    assert verify(filled) == []


def test_another_process_is_refused_too_until_it_is_killed(filled, tmp_path, processes, clustered):
    log = tmp_path / "log"
    process = processes(index_workers.hold, filled, log)
    wait_for(log, process)
    index = RQMoEIndex.load(filled, MODEL)
    assert len(index) == 401
    with pytest.raises(BlockingIOError, match="one writer at a time"):
        index.add(clustered[:1])
    process.kill()
    process.join()
    index.add(clustered[:1], ids=[10**9])
    index.close()
    assert verify(filled) == []


def test_two_readers_and_a_writer(tmp_path, processes):
    folder = tmp_path / "index"
    with RQMoEIndex(MODEL, folder) as index:
        index_workers.change(index, {"kind": "add", "ids": list(range(30))})
        index.save()
    readers = [processes(index_workers.read_tens, folder, tmp_path / f"reader {number}") for number in range(2)]
    writer = processes(index_workers.write_tens, folder, tmp_path / "writer")
    others = [processes(index_workers.come_and_go, folder, tmp_path / "stop") for _ in range(2)]
    for process in (writer, *readers):
        process.join(120)
        assert process.exitcode == 0
    (tmp_path / "stop").touch()
    for process in others:
        process.join(120)
        assert process.exitcode == 0
    for number in range(2):
        final, seen, searches = json.loads((tmp_path / f"reader {number}").read_text())
        assert final == 30 + 600 - 120 and seen > 30 and searches > 0
    assert verify(folder) == []


LAST_TO_CLOSE = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM vectors'); c.close()"


@pytest.fixture
def only_read(tmp_path, processes):
    """What a process finds in a folder in which it may write nothing."""

    def run(folder):
        log, files = tmp_path / "log", [folder, *folder.iterdir()]
        log.unlink(missing_ok=True)
        modes = [file.stat().st_mode for file in files]
        for file, mode in zip(files, modes, strict=True):
            file.chmod(mode & ~0o222)
        try:
            wait_for(log, processes(index_workers.only_read, folder, log))
        finally:
            for file, mode in zip(files, modes, strict=True):
                file.chmod(mode)
        return json.loads(log.read_text())

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="gives up root's rights as Linux has them")
@pytest.mark.parametrize("writer", ["none", "has it open", "was killed"])
def test_a_folder_that_cannot_be_written_is_searched(filled, only_read, clustered, tmp_path, writer):
    index, folder = RQMoEIndex.load(filled, MODEL), filled
    if writer != "none":
        index.add(vector_of(1)[None], ids=[7000])
    if writer == "was killed":
        folder = tmp_path / "left over"
        shutil.copytree(filled, folder)
    expected = index.search(vector_of(1), 5, shortlist=50)[1].tolist()
    count = len(index)
    if writer == "none":
        index.close()
    found = only_read(folder)
    assert found.pop("error").startswith(("PermissionError", "OSError"))
    assert found == {"may write": False, "damage": [], "vectors": str(count), "hits": expected, "text": "text 3"}
    index.close()


@pytest.mark.skipif(sys.platform != "linux", reason="gives up root's rights as Linux has them")
def test_a_log_that_cannot_be_read_is_no_damage(filled, only_read, clustered, tmp_path):
    folder = tmp_path / "left over"
    index, reader = RQMoEIndex.load(filled, MODEL), RQMoEIndex.load(filled, MODEL)
    with index, reader, reader._database.reading():  # so that the log cannot be emptied
        index.add(clustered[:1], ids=[7000])
        shutil.copytree(filled, folder, ignore=shutil.ignore_patterns("*-shm"))
    found = only_read(folder)
    for message in (*found["damage"], found["error"]):
        assert f"{DATABASE} cannot be opened: unable to open" in message and "(-wal)" in message
        assert "damaged" not in message
    assert found["damage"] and verify(folder) == []  # whoever may write can open it
    found = only_read(folder)
    assert found["damage"] == [] and found["vectors"] == "401"


@pytest.mark.parametrize("what", ["loading", "saving", "checking"])
def test_locks_outlast_reading_the_file(filled, clustered, what):
    """Closing a file takes away all locks of the process on it; SQLite in another then deletes the log in use."""
    log = Path(f"{filled / DATABASE}-wal")
    index = RQMoEIndex.load(filled, MODEL, check=what == "loading")
    if what == "saving":
        index.save()
    elif what == "checking":
        assert verify(filled) == []
    assert len(index) == 400
    subprocess.run([sys.executable, "-c", LAST_TO_CLOSE, filled / DATABASE], check=True)
    assert log.exists()
    index.add(clustered[:1], ids=[9000])
    index.close()
    assert not log.exists()  # this one was the last
    assert verify(filled) == []


def test_descriptors_are_given_back(filled):
    """One descriptor for all connections of the process, and none after the last, however it ends."""

    def count() -> int:
        gc.collect()
        names = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
                 and os.path.islink(f"/proc/self/fd/{name}")]  # fmt: skip
        return sum(name.startswith(str(filled)) and DATABASE in name for name in names)

    indexes = [RQMoEIndex.load(filled, MODEL) for _ in range(4)]
    indexes.pop().close()
    assert count() > 0
    del indexes
    assert count() == 0
    for damage in (b"", b"none" * 5000):
        (filled / DATABASE).write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            RQMoEIndex.load(filled, MODEL)
        assert count() == 0


@pytest.mark.parametrize("when", ["before the database is opened", "while it is checked"])
def test_opening_while_another_process_saves(filled, clustered, monkeypatch, when):
    """The writer replaces the snapshot after the reader has read which one there is."""
    from rqmoe_hf.index.storage import IndexFolder

    name = "open" if when.startswith("before") else "damage"
    writer, step, done = RQMoEIndex.load(filled, MODEL), getattr(IndexFolder, name), []

    def late(self, *arguments, **options):
        if len(done) < 2 and not self.is_writer:
            done.append(1)
            writer.add(clustered[:1])
            writer.save()
        return step(self, *arguments, **options)

    monkeypatch.setattr(IndexFolder, name, late)
    with RQMoEIndex.load(filled, MODEL) as index:
        assert len(index) == 402 and len(done) == 2
        assert index._ranker.scanner is not None
    done.clear()
    assert verify(filled) == [] and done
    writer.close()


def test_an_index_that_is_collected_while_another_is_opened(filled, monkeypatch):
    """A collection of garbage at any moment of opening neither waits for itself nor closes what is being opened."""
    forgotten = RQMoEIndex.load(filled, MODEL)
    forgotten.itself = forgotten  # only a collection finds it

    def collecting(*arguments, **options):
        gc.collect()
        return os.stat(*arguments, **options)

    monkeypatch.setattr("rqmoe_hf.index.held.os", SimpleNamespace(**vars(os) | {"stat": collecting}))
    gc.disable()
    del forgotten
    opened = []
    thread = threading.Thread(target=lambda: opened.append(RQMoEIndex.load(filled, MODEL)), daemon=True)
    thread.start()
    thread.join(30)
    gc.enable()
    (index,) = opened
    assert len(index) == 400
    index.close()
    assert verify(filled) == []
