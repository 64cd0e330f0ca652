"""The sets of vectors that the benchmarks are run on: what they are, and how to load them.

    from sets import SETS, load
    vectors = load("sift-128")

Each set is built by a script beside this file (`make benchmark-sets` builds all) and lies in `<root>/<name>`, as
`train.npy`, `test.npy` and `manifest.json`, or, of texts embedded by `rqmoe embed`, as folders of parquet shards.
Nothing is trained on test vectors: the first of them are for validation, the next are queries, the rest the database.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rqmoe_hf.data import as_array, load_embeddings

from .storage import MANIFEST, array_checksum, file_checksum

VALIDATION, QUERIES = 5_000, 1_000  # where no manifest says otherwise
JOB = "rqmoe_job.json"


@dataclass(frozen=True)
class Description:
    """What is known of a set before it is loaded.

    Args:
        text: In words, for tables and cards.
        dimension: Length of a vector.
        shards: Whether the vectors are parquet shards of `rqmoe embed`.
    """

    text: str
    dimension: int
    shards: bool = False


SETS = {
    "minilm-384": Description("English passages, all-MiniLM-L6-v2", 384, shards=True),
    "mpnet-768": Description("English passages, all-mpnet-base-v2", 768, shards=True),
    "wordllama-256": Description("English passages, WordLlama l2_supercat (a static encoder)", 256),
    "sift-128": Description("SIFT descriptors of Debian's wallpapers and textures", 128),
    "fashion-mnist-784": Description("Fashion-MNIST, grey values of pictures of clothes", 784),
}


@dataclass(frozen=True)
class EmbeddingSet:
    """Vectors to train, choose and measure quantizers with.

    Args:
        name: One of `SETS`.
        description: In words.
        train: float32 `(n, d)`.
        validation: float32 `(m, d)`, to choose checkpoints and settings with.
        database: float32 `(b, d)`, what is searched in.
        queries: float32 `(q, d)`.
        checksum: The first 16 hexadecimal digits of the sha256 of the four arrays.
        unit_norm: Whether all vectors have norm one, so that the order by distance is that by cosine.
    """

    name: str
    description: str
    train: np.ndarray
    validation: np.ndarray
    database: np.ndarray
    queries: np.ndarray
    checksum: str
    unit_norm: bool

    def limited(self, count: int) -> "EmbeddingSet":
        """The same set with the first `count` training vectors, and the checksum of that."""
        if count >= len(self.train):
            return self
        train = self.train[:count]
        parts = (train, self.validation, self.database, self.queries)
        return replace(self, train=train, checksum=array_checksum(parts)[:16])


def load(name: str, root: str | Path = "data", limit: int | None = None) -> EmbeddingSet:
    """Loads a set that was built before.

    Args:
        name: One of `SETS`.
        root: Folder of all sets.
        limit: Only so many training vectors, from the beginning: every set is in random order.

    Raises:
        ValueError: If there is no such set, or it was not built, or not to the end, or its files were changed.
    """
    if name not in SETS:
        raise ValueError(f"There is no set {name!r}; the sets are {', '.join(SETS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is the number of training vectors, at least 1, not {limit}.")
    folder = Path(root) / name
    if SETS[name].shards:
        train, test = (_read_shards(folder / part, name) for part in ("train", "test"))
        held_out = VALIDATION, QUERIES
    else:
        train, test, held_out = _read_arrays(folder, name)
    return _assemble(name, train[:limit], test, held_out)


def _assemble(name: str, train: np.ndarray, test: np.ndarray, held_out: tuple[int, int]) -> EmbeddingSet:
    """Splits the test vectors and adds what is known of all."""
    if len(test) <= sum(held_out) or train.shape[1:] != test.shape[1:] or train.shape[1] != SETS[name].dimension:
        raise ValueError(
            f"The set {name} has {train.shape} training and {test.shape} test vectors; expected are more than "
            f"{sum(held_out):,} test vectors and {SETS[name].dimension} dimensions. {_advice(name)}"
        )
    validation, queries, database = np.split(test, np.cumsum(held_out))
    parts = {"train": train, "validation": validation, "database": database, "queries": queries}
    parts = {part: np.array(vectors, np.float32, order="C") for part, vectors in parts.items()}
    squares = np.concatenate([np.einsum("nd,nd->n", vectors, vectors) for vectors in parts.values()])
    unit_norm = bool(np.abs(squares - 1).max() < 1e-3)
    checksum = array_checksum(parts.values())[:16]
    return EmbeddingSet(name, SETS[name].text, **parts, checksum=checksum, unit_norm=unit_norm)


def _read_arrays(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Training and test vectors, and how many of the latter are for validation and how many are queries."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"The set {name} is not in {folder}. {_advice(name)}")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for file, expected in manifest["sha256"].items():
        if not (folder / file).is_file() or file_checksum(folder / file) != expected:
            raise ValueError(f"{folder / file} is not what {MANIFEST} says: delete {folder}. {_advice(name)}")
    train, test = (np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("train", "test"))
    return train, test, (manifest["validation"], manifest["queries"])


def _read_shards(folder: Path, name: str) -> np.ndarray:
    """The vectors that `rqmoe embed` wrote."""
    if not (folder / JOB).is_file():
        raise ValueError(f"The set {name} is not in {folder}. {_advice(name)}")
    rows = json.loads((folder / JOB).read_text("utf-8"))["rows"]
    vectors = as_array(load_embeddings(folder)) if list(folder.glob("*.parquet")) else np.zeros((0, 0), np.float32)
    if len(vectors) != rows:
        raise ValueError(
            f"{folder} has {len(vectors):,} of {rows:,} vectors; a repeated run continues. {_advice(name)}"
        )
    return vectors


def _advice(name: str) -> str:
    return f"`make {name}` builds it in data/{name}."
