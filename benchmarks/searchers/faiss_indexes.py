"""Faiss's inverted lists and graphs, with its defaults unless a comment says otherwise."""

import time
from pathlib import Path

import faiss
import numpy as np

from .interface import BLOCK, NPROBES, TOP_K, Collection, mark_built

FILE = "index.faiss"
RABITQ_FACTOR_BYTES = 8
SHORTLISTS = (20, 100, 400)
EF_SEARCH = (16, 32, 64, 128, 256, 512)
LINKS = 16


class FaissSearcher:
    """An index that Faiss's factory makes.

    Args:
        name: In tables.
        factory: Faiss's description; `{lists}` is the number of inverted lists.
        size: Bytes of a code; None where they are what they are.
        lists: Inverted lists; None for a graph.
        refinement: Faiss's description of an index that ranks shortlists, and is counted in bytes.
        metric: Of Faiss.
    """

    def __init__(
        self,
        name: str,
        factory: str,
        size: int | None,
        lists: int | None = None,
        refinement: str | None = None,
        metric: int = faiss.METRIC_L2,
    ):
        self.name, self.size, self.lists, self.refined = name, size, lists, refinement is not None
        self.factory = factory.format(lists=lists)
        self.refinement, self.metric = refinement, metric
        if metric == faiss.METRIC_INNER_PRODUCT:
            self.name += " (inner product)"
        self.identity = {"factory": self.factory, "refinement": refinement, "lists": lists}
        self.index: faiss.Index | None = None

    def build(self, data: Collection, folder: Path) -> dict:
        """See [`Searcher.build`]."""
        dimension = data.train.shape[1]
        index = faiss.index_factory(dimension, self.factory, self.metric)
        kept = None
        if self.refinement is not None:
            kept = faiss.index_factory(dimension, self.refinement, self.metric)
            index = faiss.IndexRefine(index, kept)
        start = time.perf_counter()
        index.train(data.train)
        trained = time.perf_counter()
        for first in range(0, len(data.database), BLOCK):
            index.add(data.database[first : first + BLOCK])
        added = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(folder / FILE))
        base = faiss.downcast_index(index.base_index) if kept is not None else index
        measured = {
            "stored_bytes": round(_code_bytes(base, len(data.database)), 1),
            "refinement_bytes": kept.sa_code_size() if kept is not None else 0,
            "train_seconds": round(trained - start, 2),
            "add_seconds": round(added - trained, 2),
        }
        mark_built(folder, measured)
        return measured

    def warm(self) -> None:
        """See [`Searcher.warm`]."""
        few = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
        index = faiss.index_factory(8, "IVF2,Flat")
        index.train(few)
        index.add(few)
        index.search(few, 1)

    def open(self, folder: Path) -> None:
        """See [`Searcher.open`]."""
        self.index = faiss.read_index(str(folder / FILE))

    def settings(self) -> list[dict[str, int | str]]:
        """See [`Searcher.settings`]."""
        if self.lists is None:
            return [{"efSearch": width} for width in EF_SEARCH]
        probed = [{"nprobe": count} for count in NPROBES if count <= self.lists]
        if not self.refined:
            return probed
        return [{**one, "shortlist": shortlist} for shortlist in SHORTLISTS for one in probed]

    def search(self, queries: np.ndarray, **setting: int | str) -> np.ndarray:
        """See [`Searcher.search`]."""
        index = self.index
        if self.refined:
            index.k_factor = setting["shortlist"] / TOP_K
        base = faiss.downcast_index(index.base_index) if self.refined else index
        if self.lists is None:
            faiss.downcast_index(base.index if hasattr(base, "chain") else base).hnsw.efSearch = setting["efSearch"]
        else:
            faiss.extract_index_ivf(base).nprobe = setting["nprobe"]
        return index.search(queries, TOP_K)[1]


def _code_bytes(index: faiss.Index, count: int) -> float:
    """Bytes of one vector in an index, without its id: its code and, in a graph, its links."""
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    if hasattr(inner, "hnsw"):
        links = 4 * inner.hnsw.neighbors.size() + 8 * inner.hnsw.offsets.size() + 4 * inner.hnsw.levels.size()
        return inner.storage.sa_code_size() + links / count
    return inner.code_size


def rated(dimension: int, size: int, lists: int, metric: int) -> list[FaissSearcher]:
    """All that keep to a number of bytes per vector."""
    padded = -(-dimension // size) * size  # the rotation adds dimensions until the slices are equal
    narrow = -(-dimension // (2 * size)) * 2 * size
    slices = f"PQ{size}" if padded == dimension else None
    rotation = f"OPQ{size}_{padded}"
    bits = min(8 * (size - RABITQ_FACTOR_BYTES), dimension)
    made = [
        ("IVF-PQ", f"IVF{{lists}},{slices}x8", None) if slices else None,
        ("IVF-OPQ-PQ", f"{rotation},IVF{{lists}},PQ{size}x8", None),
        ("IVF-OPQ-PQ, fast scan", f"OPQ{2 * size}_{narrow},IVF{{lists}},PQ{2 * size}x4fs", None),
        # Its norm is one byte more, as in ours.
        ("IVF-RQ", f"IVF{{lists}},RQ{size}x8_Nqint8", None),
        # The random rotation that the method needs follows the PCA.
        ("IVF-RaBitQ", f"PCAR{bits},IVF{{lists}},RaBitQ", None) if bits > 0 else None,
        ("IVF-OPQ-PQ, refined with float16", f"{rotation},IVF{{lists}},PQ{size}x8", "SQfp16"),
        ("IVF-RaBitQ, refined with float16", f"PCAR{bits},IVF{{lists}},RaBitQ", "SQfp16") if bits > 0 else None,
    ]
    half = size // 2
    if half > RABITQ_FACTOR_BYTES:  # equal bytes with refinement: half of them scan, the others rank
        first = f"PCAR{min(8 * (half - RABITQ_FACTOR_BYTES), dimension)},IVF{{lists}},RaBitQ"
        second = f"OPQ{half}_{-(-dimension // half) * half},PQ{half}x8"
        made.append(("IVF-RaBitQ, refined with OPQ-PQ", first, second))
    return [FaissSearcher(one[0], one[1], size, lists, one[2], metric) for one in made if one]


def fixed(dimension: int, lists: int, metric: int) -> list[FaissSearcher]:
    """Those whose bytes are what they are: graphs have links, and RaBitQ one bit for each dimension."""
    least = min(32, dimension)
    return [
        FaissSearcher("IVF-RaBitQ, all dimensions", f"RR{dimension},IVF{{lists}},RaBitQ", None, lists, None, metric),
        FaissSearcher("HNSW, 8-bit codes", f"HNSW{LINKS},SQ8", None, metric=metric),
        FaissSearcher(f"HNSW, 4-bit codes of {least}", f"PCA{least},HNSW{LINKS // 2},SQ4", None, metric=metric),
    ]
