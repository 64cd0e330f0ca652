"""What is searched in, and what a method must offer to be measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from sets import EmbeddingSet
from sets.storage import array_checksum

from rqmoe_hf.evaluation import nearest_neighbors
from rqmoe_hf.saving import write_text

BUILD_FILE = "build.json"  # written last: a folder with it is complete
TOP_K = 10
NPROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCK = 16_384


@dataclass(frozen=True)
class Collection:
    """Vectors to train with, to search in and to ask for, and the right answers.

    Args:
        name: Of the set.
        train: float32 `(n, d)`, the same for all methods that are trained here.
        database: float32 `(b, d)`: held-out vectors, then training vectors of the set that are not in `train`, then,
            if those are too few, vectors of `train`.
        queries: float32 `(q, d)`, held out.
        truth: int64 `(q, 10)`, the exact nearest neighbours.
        unit_norm: Whether all vectors have norm 1.
        held_out: Vectors of the database that no method has seen.
        reused: Vectors of the database that are in `train`, too.
        checksum: Of train, database and queries.
    """

    name: str
    train: np.ndarray
    database: np.ndarray
    queries: np.ndarray
    truth: np.ndarray
    unit_norm: bool
    held_out: int
    reused: int
    checksum: str

    def seen_by(self, trained_on: int) -> int:
        """How many vectors of the database are among the first so many training vectors of the set, at most."""
        start = len(self.train)
        between = len(self.database) - self.held_out - self.reused
        return min(max(trained_on - start, 0), between) + min(trained_on, self.reused)

    def describe(self) -> dict[str, int | str]:
        """What results record of it."""
        return {
            "training_vectors": len(self.train),
            "database": len(self.database),
            "database_held_out": self.held_out,
            "database_from_training_vectors": self.reused,
            "queries": len(self.queries),
            "checksum": self.checksum,
        }


def assemble(data: EmbeddingSet, training: int, size: int | None = None, queries: int | None = None) -> Collection:
    """Divides a set: training vectors first, the rest is the database.

    Args:
        data: The set.
        training: Vectors to train with, from the beginning.
        size: Of the database, default all vectors that are not trained with.
        queries: Only so many, default all.

    Raises:
        ValueError: If there are not enough vectors.
    """
    train, rest = data.train[:training], data.train[training:]
    size = len(data.database) + len(rest) if size is None else size
    held_out = min(size, len(data.database))
    unused = min(size - held_out, len(rest))
    reused = size - held_out - unused
    if reused > len(train) or not 1 <= training <= len(data.train) or size < TOP_K:
        most = len(data.database) + len(data.train)
        raise ValueError(
            f"The set {data.name} has {len(data.train):,} training vectors and {most:,} for the database: "
            f"{training:,} and {size:,} cannot be had."
        )
    database = np.concatenate([data.database[:held_out], rest[:unused], train[:reused]])
    asked = data.queries[:queries]
    truth = nearest_neighbors(asked, database, TOP_K)
    checksum = array_checksum([train, database, asked])[:16]
    return Collection(data.name, train, database, asked, truth, data.unit_norm, held_out, reused, checksum)


class Searcher(Protocol):
    """An index of some kind, which lies in a folder once it is built. Before it is opened it can be pickled.

    Attributes:
        name: In tables.
        size: Bytes of a code, as asked for; None where they are what they are.
        identity: What tells it from others of the same name on the same collection.
    """

    name: str
    size: int | None
    identity: dict[str, str | int | None]

    def build(self, data: Collection, folder: Path) -> dict:
        """Trains, encodes and writes the index; `train_seconds`, `add_seconds` and `stored_bytes` at least.

        `stored_bytes` are those of one vector in memory without its id, `refinement_bytes` are for what ranks
        shortlists.
        """

    def warm(self) -> None:
        """Loads libraries and whatever does not grow with the collection and is not the index's own."""

    def open(self, folder: Path) -> None:
        """Makes it ready for searching."""

    def settings(self) -> list[dict[str, int | str]]:
        """Arguments of `search` to measure, quicker ones first."""

    def search(self, queries: np.ndarray, **setting: int | str) -> np.ndarray:
        """The ten nearest vectors of each query: row numbers in the database, `(n, 10)`, -1 for none."""


def is_built(folder: Path) -> dict | None:
    """What was measured when the index in a folder was built; None if there is none."""
    file = folder / BUILD_FILE
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def mark_built(folder: Path, measured: dict) -> None:
    """Says that the index in a folder is complete."""
    write_text(folder / BUILD_FILE, json.dumps(measured, indent=1) + "\n")
