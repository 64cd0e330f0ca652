"""What the processes of the tests of an index do; they are forked from a server that has imported everything."""

import ctypes
import gc
import json
import os
import time
from pathlib import Path

import numpy as np
from conftest import MEMBERS, SIZE, randomize

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.index import RQMoEIndex, verify
from rqmoe_hf.index.fitting import fit_scanner
from rqmoe_hf.index.scanning import Scanner
from rqmoe_hf.index.storage import describe

MODEL = randomize(RQMoEModel(MEMBERS["additive"]))


def vector_of(id: int) -> np.ndarray:
    """The embedding of a document: its id decides it."""
    return np.random.default_rng(id).normal(size=SIZE).astype(np.float32)


def text_of(id: int, version: int) -> str:
    """The text of a document, now and then longer than a page of the database."""
    return f"text {id} {version} " * (1 + 700 * (id % 13 == 0))


def plan(rng: np.random.Generator, known: list[int], fresh: int) -> dict:
    """A random change."""
    kind = rng.choice(["add", "add", "add", "remove", "update", "save"])
    if kind == "add" or len(known) < 20:
        return {"kind": "add", "ids": list(range(fresh, fresh + int(rng.integers(1, 60))))}
    count = 0 if kind == "save" else int(rng.integers(1, 20))
    return {"kind": kind, "ids": rng.choice(known, count, replace=False).tolist(), "version": int(rng.integers(1000))}


def change(index: RQMoEIndex, planned: dict) -> None:
    """Carries a change out."""
    ids, version = planned["ids"], planned.get("version", 0)
    if planned["kind"] == "save":
        index.save()
    elif planned["kind"] == "remove":
        index.remove(ids)
    else:
        vectors, texts = np.stack([vector_of(id) for id in ids]), [text_of(id, version) for id in ids]
        metadata = [{"id": id, "version": version} for id in ids]
        if planned["kind"] == "add":
            index.add(vectors, ids=ids, texts=texts, metadata=metadata)
        else:
            index.update(ids, vectors, texts=texts, metadata=metadata)


def keep_changing(folder: Path, log: Path, seed: int) -> None:
    """Plans a change, notes it, carries it out, acknowledges it, and so on until killed."""
    rng = np.random.default_rng(seed)
    with open(log, "w", buffering=1) as notes:
        while True:
            with RQMoEIndex.load(folder, MODEL) as index:
                for _ in range(int(rng.integers(1, 12))):
                    known = [document.id for document in index.documents()]
                    planned = plan(rng, known, max(known, default=0) + 1)
                    notes.write(json.dumps(planned) + "\n")
                    change(index, planned)
                    notes.write("acknowledged\n")
                    if rng.random() < 0.3 and len(index):
                        index.search(vector_of(1), 5, shortlist=10)


def make(folder: Path, log: Path) -> None:
    """Makes an index from nothing."""
    log.write_text("begun")
    RQMoEIndex(MODEL, folder)
    log.write_text("made")
    time.sleep(60)


def hold(folder: Path, log: Path) -> None:
    """Writes, and does not let go."""
    index = RQMoEIndex.load(folder, MODEL)
    change(index, {"kind": "add", "ids": [8000]})
    log.write_text("held")
    time.sleep(60)


def obey_permissions() -> None:
    """Lets the permissions of files bind this thread as they bind others, where it is root's (capset(2))."""
    libc, version = ctypes.CDLL(None), 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for effective_or_permitted in (0, 1):
        sets[effective_or_permitted] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(header, sets)


def only_read(folder: Path, log: Path) -> None:
    """Does all that a folder allows that cannot be written, and tries to write."""
    obey_permissions()
    found: dict = {"may write": os.access(folder, os.W_OK), "damage": verify(folder)}
    try:
        found["vectors"] = describe(folder)["vectors"]
        with RQMoEIndex.load(folder, MODEL) as index:
            found["hits"] = index.search(vector_of(1), 5, shortlist=50)[1].tolist()
            found["text"] = index.get([3])[0].text
            index.remove([3])
    except (ValueError, OSError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    scratch = log.with_suffix(".part")
    scratch.write_text(json.dumps(found))
    scratch.rename(log)


def wait_for(file: Path, process) -> None:
    """Waits until a process has written something."""
    deadline = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < deadline and process.exitcode is None, f"no {file.name}: {process.exitcode}"
        time.sleep(0.005)


def write_tens(folder: Path, log: Path) -> None:
    """Adds and removes ten documents at a time."""
    with RQMoEIndex.load(folder, MODEL) as index:
        for start in range(1000, 1600, 10):
            change(index, {"kind": "add", "ids": list(range(start, start + 10))})
            if start % 50 == 0:
                index.remove(range(start, start + 10))
            if start % 100 == 0:
                index.save()
    log.write_text("written")


def read_tens(folder: Path, log: Path) -> None:
    """Reads until the last ten are there; whatever it sees is whole, and what was there stays there."""
    seen, searches = 0, 0
    with RQMoEIndex.load(folder, MODEL) as index:
        while 1599 not in index:
            documents = list(index.documents({"version": 0}))
            assert all(document.text == text_of(document.id, 0) for document in documents)
            count = len(index)
            assert count % 10 == 0, count
            scores, ids = index.search(vector_of(1001 + 10 * searches % 500), 7, shortlist=20)
            assert len(ids) == 7 and np.isfinite(scores).all()
            seen, searches = max(seen, count), searches + 1
        final = len(index)
    log.write_text(json.dumps([final, seen, searches]))


def come_and_go(folder: Path, stop: Path) -> None:
    """Opens an index and closes it, again and again: each close may think that it is the last."""
    while not stop.exists():
        with RQMoEIndex.load(folder, MODEL) as index:
            assert len(index) % 10 == 0


def filled(count: int, lists: int) -> Scanner:
    """A scanner of random codes of 16 bytes, which has been searched."""
    model = RQMoEModel(RQMoEConfig.additive(hidden_size=8, num_codebooks=16, codebook_size=256)).eval()
    model.scale.fill_(1.0)
    rng = np.random.default_rng(0)

    def some():
        return rng.integers(0, 256, (20_000, 16), np.uint8)

    scanner = fit_scanner(model, some(), 16, "cosine", lists)
    scanner.add([(np.arange(start, start + 20_000), some()) for start in range(0, count, 20_000)])
    scanner.search(np.ones((1, 8), np.float32), 10, lists)
    return scanner


def resident() -> int:
    """Bytes of memory that this process uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def measure_memory(log: Path, count: int) -> None:
    """Resident bytes per vector, flat and in lists."""
    filled(20_000, 64)  # after it the libraries have what they need
    measured = []
    for lists in (1, 500):
        before = resident()
        scanner = filled(count, lists)
        measured.append((resident() - before) / count)
        del scanner
    log.write_text(json.dumps(measured))
