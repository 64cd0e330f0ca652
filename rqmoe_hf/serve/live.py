"""An index as the page sees it: searched with any shortlist and number of codes, and compared with exact search."""

import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..blocks_rqmoe import cuts_of
from ..codes import bytes_per_vector, truncate_codes
from ..index import Document, RQMoEIndex
from ..index.documents import Id
from ..index.intake import Encoder, TextEncoder
from ..index.settings import Rescore
from ..index.storage import describe
from ..modeling_rqmoe import RQMoEModel

COMPARED = 10  # hits that recall counts
REMEMBERED = 256  # queries whose embeddings and exact hits are kept
JOINT = (
    "The codes of this quantizer were found together, and only make sense together: they cannot be cut to fewer bytes."
)
IN_BLOCKS = (
    "The codes of this quantizer were found together, block by block: they can be cut to whole blocks, nowhere else."
)
TOO_LARGE = "Exact search, and search with fewer codes, are offered up to {:,} vectors (--exact-up-to)."


class Refused(ValueError):
    """Something was asked for that this index does not do; the text says why."""


@dataclass(frozen=True)
class Setting:
    """How to search.

    Args:
        shortlist: Vectors that the scan hands on to be ranked.
        num_codebooks: Codes of each vector that are used; None for all.
        rescore: What ranks the shortlist: "floats", "codes" or "tables"; None for the best that there is.
    """

    shortlist: int = 100
    num_codebooks: int | None = None
    rescore: Rescore | None = None


@dataclass
class Hits:
    """Documents with their scores, best first, and what finding them took."""

    documents: list[Document]
    scores: list[float]
    embedding_seconds: float
    search_seconds: float


@dataclass
class Comparison:
    """The exact hits, and which of them a setting finds."""

    exact: list[Document]
    found: list[bool]
    seconds: float

    @property
    def recall(self) -> float | None:
        """The share of the exact hits that is found; None if there are none."""
        return sum(self.found) / len(self.found) if self.found else None


def check_size(vector: np.ndarray, size: int) -> None:
    """Raises a ValueError unless an encoder's first embedding has the quantizer's dimensions."""
    if vector.shape != (size,):
        raise ValueError(
            f"The encoder's embeddings have {vector.shape[-1]} dimensions, those of the index {size}: name the "
            "encoder of its texts with --encoder."
        )


def ways_to_rescore(settings: dict[str, Any]) -> list[Rescore]:
    """What can rank a shortlist of a collection; the first is the default."""
    ways: list[Rescore] = ["floats", "codes", "tables"]
    return ways if settings["keep_floats"] else ways[1:]


def check_query(query: str, rescore: Rescore, rescores: list[Rescore]) -> None:
    """Raises [`Refused`] if the query is empty or the collection has not what should rank."""
    if not query.strip():
        raise Refused("The query is empty: give it some text.")
    if rescore not in rescores:
        raise Refused(f"rescore must be one of {', '.join(rescores)}, got {rescore}.")


def describe_quantizer(quantizer: RQMoEModel, settings: dict[str, Any], scanned: int | None) -> dict[str, Any]:
    """What the page says of a collection's quantizer and settings.

    Args:
        quantizer: The quantizer.
        settings: Of the collection.
        scanned: Bytes in memory for each vector; None while nothing is scanned.
    """
    steps, config = settings["quantizer"]["num_codebooks"], quantizer.config
    sizes = [bytes_per_vector(step + 1, config.code_sizes) for step in range(steps)]
    return {
        "dimensions": config.hidden_size,
        "quantizer": Path(settings["quantizer"]["model"]).name or "without a name",
        "metric": settings["metric"].replace("_", " "),
        "bytes_by_codes": sizes,
        "scan_bytes": 0 if scanned is None else scanned - sizes[-1],
        "quantizer_bytes": sum(weights.numel() * weights.element_size() for weights in quantizer.parameters()),
        "rescores": ways_to_rescore(settings),
    }


class LiveIndex:
    """An index that is searched with texts, and whose searches are compared with exact ones.

    Exact search ranks all vectors: by their floats if the index keeps them, otherwise by what all their codes decode
    to. What fewer codes would find is searched in a second index that holds only these codes, made when it is first
    asked for. Methods may be called from any thread.

    Args:
        folder: Of the index.
        quantizer: See `RQMoEIndex.load`.
        encoder: Embeds queries; default the one that the index or the quantizer names.
        exact_up_to: Vectors up to which exact search, and search with fewer codes, are offered.

    Raises:
        ValueError: If there is no index, no encoder, or the encoder is not the quantizer's.
    """

    def __init__(
        self,
        folder: Path,
        quantizer: RQMoEModel | str | None = None,
        encoder: Encoder | None = None,
        exact_up_to: int = 100_000,
    ):
        self.folder, self.exact_up_to = folder, exact_up_to
        self.index = RQMoEIndex.load(folder, quantizer)
        # Exact searches take long and would make others wait for the connection that they read from.
        self._apart = RQMoEIndex.load(folder, self.index.quantizer, check=False)
        self.config, self.settings = self.index.quantizer.config, self.index.settings
        self.num_codebooks: int = self.settings["quantizer"]["num_codebooks"]
        self._encoder = TextEncoder(encoder or self.settings["encoder"] or self.config.base_model)
        self._shortening = threading.Lock()
        self._shortened: dict[int, tuple[int, RQMoEIndex]] = {}
        self.embed = lru_cache(REMEMBERED)(self._embed)
        self._exact = lru_cache(REMEMBERED)(self._find_exact)
        self._prepare()

    def _prepare(self) -> None:
        """Loads the encoder and makes the scanner, so that mistakes show at once and the first query is quick."""
        vector, _ = self._embed("a first query")
        check_size(vector, self.config.hidden_size)
        self.index.search(vector, 1, shortlist=1)

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def rescores(self) -> list[Rescore]:
        """What can rank a shortlist; the first is the default."""
        return ways_to_rescore(self.settings)

    @property
    def is_large(self) -> bool:
        """Whether there are too many vectors to rank them all for every query."""
        return len(self.index) > self.exact_up_to

    @property
    def cuts(self) -> list[int]:
        """Numbers of codes per vector that can be searched with; the last is all of them."""
        return [self.num_codebooks] if self.is_large else cuts_of(self.config, self.num_codebooks)

    @property
    def _why_not_shorter(self) -> str | None:
        """What keeps codes from being cut after any of them."""
        blocks = len(cuts_of(self.config, self.num_codebooks))
        if blocks == 1 < self.num_codebooks:
            return JOINT
        if self.is_large:
            return TOO_LARGE.format(self.exact_up_to)
        return IN_BLOCKS if blocks < self.num_codebooks else None

    def describe(self) -> dict[str, Any]:
        """What the page says of the index, as JSON."""
        too_large = TOO_LARGE.format(self.exact_up_to) if self.is_large else None
        return describe_quantizer(self.index.quantizer, self.settings, self.index.scanned_bytes) | {
            "name": self.folder.resolve().name,
            "vectors": len(self.index),
            "on_disk": describe(self.folder)["on disk"],
            "cuts": self.cuts,
            "why_not_shorter": self._why_not_shorter,
            "exact": None if self.is_large else self.rescores[0],
            "why_not_exact": too_large,
        }

    # --- searching -----------------------------------------------------------------------------------------------

    def search(self, query: str, top_k: int, setting: Setting) -> Hits:
        """Finds documents for a text.

        Raises:
            Refused: If the query is empty, or the setting is none for this index.
        """
        steps, rescore = self._checked(query, setting)
        vector, embedding_seconds = self.embed(query)
        index = self._holding(steps)  # made when it is first needed, which is no part of the search
        start = time.perf_counter()
        scores, ids = self._find(index, vector, top_k, setting.shortlist, rescore)
        seconds = time.perf_counter() - start
        score_of = dict(zip(ids.tolist(), scores.tolist(), strict=True))
        documents = self.index.get(ids, missing_ok=True)
        return Hits(documents, [score_of[document.id] for document in documents], embedding_seconds, seconds)

    def compare(self, query: str, setting: Setting) -> Comparison:
        """Finds the ten exact hits of a text, and which of them a setting finds.

        Raises:
            Refused: As [`search`], or because the index is too large.
        """
        steps, rescore = self._checked(query, setting)
        if self.is_large:
            raise Refused(TOO_LARGE.format(self.exact_up_to))
        ids, seconds = self._exact(query, self.index.version)
        vector, _ = self.embed(query)
        found = set(self._find(self._holding(steps), vector, COMPARED, setting.shortlist, rescore)[1].tolist())
        exact = self.index.get(ids, missing_ok=True)
        return Comparison(exact, [document.id in found for document in exact], seconds)

    def _checked(self, query: str, setting: Setting) -> tuple[int, Rescore]:
        """Number of codes and what ranks, as a setting and the defaults give them."""
        steps, rescore = setting.num_codebooks or self.num_codebooks, setting.rescore or self.rescores[0]
        check_query(query, rescore, self.rescores)
        cuts = self.cuts
        if steps not in cuts:
            every = len(cuts) == self.num_codebooks
            allowed = f"lie between 1 and {cuts[-1]}" if every else f"be {' or '.join(map(str, cuts))}"
            raise Refused(f"num_codebooks must {allowed}, got {steps}.")
        return steps, rescore

    def _find(
        self, index: RQMoEIndex, vector: np.ndarray, top_k: int, shortlist: int, rescore: Rescore
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of one query."""
        if rescore != "floats" or index is self.index:
            return index.search(vector, top_k, shortlist=shortlist, rescore=rescore)
        _, ids = index.search(vector, max(shortlist, top_k), shortlist=shortlist, rescore="tables")
        return self.index.search(vector, top_k, ids=ids, shortlist=max(len(ids), 1), rescore="floats")

    def _holding(self, steps: int) -> RQMoEIndex:
        """The index that holds so many codes of each vector."""
        if steps == self.num_codebooks:
            return self.index
        with self._shortening:
            version, index = self._shortened.get(steps, (-1, None))
            if index is None or version != self.index.version:
                version, index = self._shortened[steps] = self._shorten(steps)
            return index

    def _shorten(self, steps: int) -> tuple[int, RQMoEIndex]:
        """An index in this process with the first codes of all vectors, and the version that it is of."""
        made = self.settings
        index = RQMoEIndex(self.index.quantizer, metric=made["metric"], kind=made["kind"],
                           num_lists=made["num_lists"], num_codebooks=steps)  # fmt: skip
        version = self._apart.version  # before the codes: a change meanwhile only makes it be made once more
        for ids, codes in self._apart.codes():
            index.add(codes=truncate_codes(codes, self.num_codebooks, steps, self.config.code_sizes), ids=ids.tolist())
        index.search(np.ones(self.config.hidden_size, np.float32), 1, shortlist=1)
        return version, index

    def _find_exact(self, query: str, version: int) -> tuple[list[Id], float]:
        """Ids of the exact hits, and the seconds taken; the version keeps a changed index from old answers."""
        vector, start = self.embed(query)[0], time.perf_counter()
        _, ids = self._apart.search(vector, COMPARED, shortlist=max(len(self._apart), 1), rescore=self.rescores[0])
        return ids.tolist(), time.perf_counter() - start

    def _embed(self, query: str) -> tuple[np.ndarray, float]:
        """The embedding of a query, and the seconds taken."""
        start = time.perf_counter()
        vector = self._encoder.queries([query])[0]
        return vector, time.perf_counter() - start
