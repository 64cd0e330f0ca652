"""Ways to search in compressed vectors, behind one interface, for comparisons at equal bytes per vector.

from searchers import assemble, rivals
data = assemble(load("minilm-384"), training=131_072)
for searcher in rivals(data, sizes=[16, 32], lists=700):
searcher.build(data, folder)
"""

from . import timing
from .faiss_indexes import FaissSearcher, fixed, rated
from .interface import BUILD_FILE, TOP_K, Collection, Searcher, assemble, is_built
from .lance import LanceSearcher, is_installed
from .own import KINDS, OwnSearcher, own, train_own


def rivals(data: Collection, sizes: list[int], lists: int, metric: int) -> list[Searcher]:
    """All rivals at all sizes, and those with bytes of their own; LanceDB if it is installed."""
    dimension = data.train.shape[1]
    found: list[Searcher] = []
    for size in sizes:
        found += rated(dimension, size, lists, metric)
        if is_installed() and dimension % size == 0:
            found += [LanceSearcher(size, lists), LanceSearcher(size, lists, refined=True)]
    return found + fixed(dimension, lists, metric)


__all__ = [
    "BUILD_FILE",
    "KINDS",
    "TOP_K",
    "Collection",
    "FaissSearcher",
    "LanceSearcher",
    "OwnSearcher",
    "Searcher",
    "assemble",
    "fixed",
    "is_built",
    "is_installed",
    "own",
    "rated",
    "rivals",
    "timing",
    "train_own",
]
