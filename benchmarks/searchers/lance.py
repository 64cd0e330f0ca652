"""LanceDB's IVF-PQ, an embedded store on disk. It trains on vectors of its table, as it has no other way."""

import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from .interface import BLOCK, NPROBES, TOP_K, Collection, mark_built

TABLE = "vectors"
SHORTLISTS = (20, 100, 400)


def is_installed() -> bool:
    """Whether `lancedb` is there; the benchmark does without it."""
    return find_spec("lancedb") is not None


class LanceSearcher:
    """IVF-PQ of LanceDB; with refinement it reads the float32 vectors of the shortlist from disk.

    Args:
        size: Bytes of a code.
        lists: Inverted lists.
        refined: Rank the shortlist by float32 vectors.
    """

    def __init__(self, size: int, lists: int, refined: bool = False):
        self.name = f"lancedb IVF_PQ{', refined with float32' if refined else ''}"
        self.size, self.lists, self.refined = size, lists, refined
        self.identity = {"lists": lists}
        self.table = None

    def build(self, data: Collection, folder: Path) -> dict:
        """See [`Searcher.build`]."""
        import lancedb

        start = time.perf_counter()
        connection = lancedb.connect(str(folder))
        table = None
        for first in range(0, len(data.database), BLOCK):
            batch = _batch(data.database[first : first + BLOCK], first)
            if table is None:
                table = connection.create_table(TABLE, batch, mode="overwrite")
            else:
                table.add(batch)
        written = time.perf_counter()
        table.create_index("l2", num_partitions=self.lists, num_sub_vectors=self.size, index_type="IVF_PQ")
        measured = {
            "stored_bytes": self.size,
            "refinement_bytes": 4 * data.train.shape[1] if self.refined else 0,
            "trained_on": "a sample of the database",
            "lancedb": lancedb.__version__,
            "train_seconds": 0.0,
            "add_seconds": round(time.perf_counter() - start, 2),
            "index_seconds": round(time.perf_counter() - written, 2),
        }
        mark_built(folder, measured)
        return measured

    def warm(self) -> None:
        """See [`Searcher.warm`]."""
        import lancedb  # noqa: F401

    def open(self, folder: Path) -> None:
        """See [`Searcher.open`]."""
        import lancedb

        self.table = lancedb.connect(str(folder)).open_table(TABLE)
        self.table.prewarm_index("vector_idx")

    def settings(self) -> list[dict[str, int | str]]:
        """See [`Searcher.settings`]."""
        probed = [{"nprobe": count} for count in NPROBES if count <= self.lists]
        if not self.refined:
            return probed
        return [{**one, "shortlist": shortlist} for shortlist in SHORTLISTS for one in probed]

    def search(self, queries: np.ndarray, **setting: int | str) -> np.ndarray:
        """See [`Searcher.search`]."""
        found = np.full((len(queries), TOP_K), -1, np.int64)
        query = self.table.search(list(queries) if len(queries) > 1 else queries[0])
        query = query.nprobes(setting["nprobe"]).limit(TOP_K).select(["id", "_distance"])
        if self.refined:
            query = query.refine_factor(setting["shortlist"] // TOP_K)
        hits = query.to_arrow()
        asked = hits["query_index"].to_numpy() if "query_index" in hits.column_names else np.zeros(len(hits), int)
        order = np.lexsort((hits["_distance"].to_numpy(), asked))
        asked, ids = asked[order], hits["id"].to_numpy()[order]
        places = np.arange(len(asked)) - np.searchsorted(asked, asked)
        found[asked, places] = ids
        return found


def _batch(vectors: np.ndarray, first: int) -> pa.Table:
    ids = pa.array(np.arange(first, first + len(vectors), dtype=np.int64))
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
