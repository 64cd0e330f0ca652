"""Our index: scanned flat or in lists, ranked by tables, by decoded codes, or by floats that were kept."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rivals import OURS
from rivals.family import FamilyMember, Ours, OursAdditive

from rqmoe_hf.bundled import load_quantizer
from rqmoe_hf.codes import bits_per_code
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.index.first_codes import first_lists
from rqmoe_hf.saving import write_text

from .interface import BLOCK, NPROBES, Collection, mark_built

KINDS = ("flat", "ivf", "ivf-floats")
SHORTLISTS = (20, 50, 100, 400)
TABLES_SHORTLIST = 20  # the scan ranks all but the last of a shortlist as the sums do


class OwnSearcher:
    """`RQMoEIndex` over the codes of one quantizer.

    Args:
        given: A finished quantizer: bundled name or folder, and `:codes` for a prefix of its codes.
        work: Where codes are kept, since several indexes have the same.
        lists: Inverted lists; 1 scans everything.
        floats: Keep the vectors as float16 on disk, and rank by them.
        name: In tables; default the quantizer's.
        trained: Seconds of its training in this benchmark.
    """

    def __init__(
        self, given: str, work: Path, lists: int, floats: bool = False, name: str | None = None, trained: float = 0.0
    ):
        quantizer = Ours(given)
        self.source, self.codes = str(quantizer.source), quantizer.codes
        first = first_lists(quantizer.model.config, quantizer.codes) if lists > 1 else None
        lists = lists if first is None else first  # lists by first code: they tell it, so that it takes no bytes
        self.size = -(-(quantizer.code_bits - (0 if first is None else bits_per_code(first))) // 8)
        self.training_vectors, self.fingerprint = quantizer.training_vectors, quantizer.fingerprint
        self.codebook_bytes = quantizer.codebook_bytes
        self.work, self.lists, self.floats, self.trained = work, lists, floats, trained
        scanned = "flat" if lists == 1 else "IVF"
        self.name = f"{name or quantizer.name}, {scanned}{', floats kept' if floats else ''}"
        self.identity = {"weights": self.fingerprint, "lists": lists}
        self.model = self.index = None

    def build(self, data: Collection, folder: Path) -> dict:
        """See [`Searcher.build`]."""
        self.warm()
        codes, encoding = encode_once(self.model, self.codes, data, self.work / "codes", self.fingerprint)
        start = time.perf_counter()
        metric, kind = "cosine" if data.unit_norm else "l2", "flat" if self.lists == 1 else "ivf"
        settings = {"kind": kind, "num_lists": self.lists, "keep_floats": self.floats, "num_codebooks": self.codes}
        with RQMoEIndex(self.model, folder / "index", metric=metric, **settings) as index:
            for first in range(0, len(codes), BLOCK):
                _add(index, codes[first : first + BLOCK], data.database[first : first + BLOCK])
            index.save()
            scanned = index.scanned_bytes
        stored = self.size if scanned is None else scanned - 8  # without the row number
        measured = {
            "stored_bytes": stored,
            "refinement_bytes": 2 * data.train.shape[1] if self.floats else 0,
            "train_seconds": self.trained,
            "encode_seconds": round(encoding, 2),
            "add_seconds": round(time.perf_counter() - start + encoding, 2),
            "quantizer_bytes": self.codebook_bytes,
            "quantizer_trained_on": self.training_vectors,
            "database_seen_by_quantizer": data.seen_by(self.training_vectors or 0),
        }
        mark_built(folder, measured)
        return measured

    def warm(self) -> None:
        """See [`Searcher.warm`]: also the quantizer, which all indexes of a process share."""
        if self.model is None:
            self.model = load_quantizer(self.source)
        few = np.random.default_rng(0).normal(size=(300, self.model.config.hidden_size)).astype(np.float32)
        index = RQMoEIndex(self.model, kind="flat")
        index.add(few)
        index.search(few)
        index.close()

    def open(self, folder: Path) -> None:
        """See [`Searcher.open`]."""
        self.model = self.model or load_quantizer(self.source)
        self.index = RQMoEIndex.load(folder / "index", self.model)

    def settings(self) -> list[dict[str, int | str]]:
        """See [`Searcher.settings`]."""
        probed = [{}] if self.lists == 1 else [{"nprobe": count} for count in NPROBES if count <= self.lists]
        if self.floats:
            ranked = [{"shortlist": shortlist, "rescore": "floats"} for shortlist in SHORTLISTS]
        else:
            ranked = [{"shortlist": TABLES_SHORTLIST, "rescore": "tables"}]
            ranked += [{"shortlist": shortlist, "rescore": "codes"} for shortlist in SHORTLISTS]
        return [{**one, **rank} for rank in ranked for one in probed]

    def search(self, queries: np.ndarray, **setting: int | str) -> np.ndarray:
        """See [`Searcher.search`]."""
        return self.index.search(queries, **setting)[1]


def _add(index: RQMoEIndex, codes: np.ndarray, vectors: np.ndarray) -> None:
    """Adds vectors whose codes are known, with their floats if the index keeps them."""
    if not index.settings["keep_floats"]:
        index.add(codes=codes)
        return
    # The index takes codes or vectors, and encodes vectors; that takes hours here and is done once for all indexes.
    index._intake.codes = lambda *_: (codes, vectors.astype(np.float16))
    index.add(vectors)


def encode_once(model, count: int, data: Collection, folder: Path, fingerprint: str) -> tuple[np.ndarray, float]:
    """Packed codes of the database and the seconds that they took; blocks that were encoded before are read."""
    digest = hashlib.sha256(f"{fingerprint} {count} {data.checksum}".encode()).hexdigest()[:16]
    place = folder / digest
    place.mkdir(parents=True, exist_ok=True)
    parts, seconds = [], 0.0
    for first in range(0, len(data.database), BLOCK):
        file, notes = place / f"{first:09d}.npy", place / f"{first:09d}.json"
        if not notes.is_file():
            start = time.perf_counter()
            np.save(file, model.compress(data.database[first : first + BLOCK], count, show_progress_bar=False))
            write_text(notes, json.dumps(time.perf_counter() - start))  # last: now the block is complete
            if first // BLOCK % 4 == 0:
                print(f"  encoded {min(first + BLOCK, len(data.database)):,} vectors", flush=True)
        parts.append(np.load(file))
        seconds += json.loads(notes.read_text("utf-8"))
    return np.concatenate(parts), seconds


def train_own(method: str, size: int, data: Collection, work: Path) -> tuple[str, float]:
    """The folder of a quantizer of ours, trained on the collection's training vectors, and the seconds."""
    slug = method.removeprefix("ours, ").replace(" ", "-")
    folder = work / "quantizers" / f"{slug}-{size}-bytes-{data.checksum}"
    notes = folder / "seconds.json"
    if not notes.is_file():
        quantizer = OURS[method](data.train.shape[1], size)
        assert isinstance(quantizer, OursAdditive | FamilyMember)
        start = time.perf_counter()
        quantizer.train(data.train)
        seconds = round(time.perf_counter() - start, 2)
        quantizer.model.save_pretrained(folder)
        write_text(folder / "training.json", json.dumps({"vectors": len(data.train)}))
        write_text(notes, json.dumps(seconds))  # last: now the folder is complete
    return str(folder), json.loads(notes.read_text("utf-8"))


def own(
    given: str,
    work: Path,
    lists: int,
    kinds: Sequence[str] = KINDS,
    name: str | None = None,
    trained: float = 0.0,
) -> Iterator[OwnSearcher]:
    """Indexes of some kinds over the codes of one quantizer."""
    for kind, count, floats in zip(KINDS, (1, lists, lists), (False, False, True), strict=True):
        if kind in kinds:
            yield OwnSearcher(given, work, count, floats, name, trained)
