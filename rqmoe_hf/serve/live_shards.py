"""Shards as the page sees them: searched as one index, without the comparisons that need all vectors in one place."""

import time
from typing import Any, NoReturn

import numpy as np

from ..index import RQMoEShards
from ..index.settings import Rescore
from .live import Hits, Refused, Setting, check_query, check_size, describe_quantizer, ways_to_rescore

WHOLE = "Shards are searched with all codes of each vector."
NOT_COMPARED = "Searches of shards are not compared with exact ones."


class LiveShards:
    """Shards that are searched with texts. Methods may be called from any thread.

    Args:
        shards: The shards; they must have an encoder.
        name: What the page calls them.

    Raises:
        ValueError: If there is no encoder, or it is not the quantizer's.
    """

    def __init__(self, shards: RQMoEShards, name: str):
        self.shards, self.name = shards, name
        self._encoder, self.settings = shards._intake.encoder, shards.settings
        vector = self._encoder.queries(["a first query"])[0]
        check_size(vector, shards.quantizer.config.hidden_size)
        shards.search(vector, 1, shortlist=1)

    @property
    def rescores(self) -> list[Rescore]:
        """What can rank a shortlist; the first is the default."""
        return ways_to_rescore(self.settings)

    @property
    def num_codebooks(self) -> int:
        """Codes of each vector."""
        return self.settings["quantizer"]["num_codebooks"]

    def describe(self) -> dict[str, Any]:
        """What the page says of the shards, as JSON."""
        scanner = self.shards._rescorer.scanner
        scanned = None if scanner is None else scanner.bytes_per_vector
        return describe_quantizer(self.shards.quantizer, self.settings, scanned) | {
            "name": self.name,
            "vectors": len(self.shards),
            "on_disk": f"{len(self.shards._shards)} shards",
            "cuts": [self.num_codebooks],
            "why_not_shorter": WHOLE,
            "exact": None,
            "why_not_exact": NOT_COMPARED,
        }

    def search(self, query: str, top_k: int, setting: Setting) -> Hits:
        """Finds documents for a text.

        Raises:
            Refused: If the query is empty, or the setting is none for these shards.
        """
        rescore = setting.rescore or self.rescores[0]
        check_query(query, rescore, self.rescores)
        if setting.num_codebooks not in (None, self.num_codebooks):
            raise Refused(f"num_codebooks must be {self.num_codebooks}, got {setting.num_codebooks}. {WHOLE}")
        start = time.perf_counter()
        vector: np.ndarray = self._encoder.queries([query])[0]
        embedded = time.perf_counter()
        scores, ids = self.shards.search(vector, top_k, shortlist=setting.shortlist, rescore=rescore)
        score_of = dict(zip(ids.tolist(), scores.tolist(), strict=True))
        documents = self.shards.get(ids, missing_ok=True)
        seconds = time.perf_counter() - embedded
        return Hits(documents, [score_of[document.id] for document in documents], embedded - start, seconds)

    def compare(self, query: str, setting: Setting) -> NoReturn:
        """Refused."""
        raise Refused(NOT_COMPARED)
