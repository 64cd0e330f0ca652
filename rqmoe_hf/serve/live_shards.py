"""Shards as the page sees them: searched as one index, without the comparisons that need all vectors in one place."""

import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..codes import bytes_per_vector
from ..index import RQMoEShards
from ..index.settings import Rescore
from .live import Hits, Refused, Setting

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
        size = shards.quantizer.config.hidden_size
        if vector.shape != (size,):
            raise ValueError(
                f"The encoder's embeddings have {vector.shape[-1]} dimensions, those of the shards {size}: name the "
                "encoder of their texts with --encoder."
            )
        shards.search(vector, 1, shortlist=1)

    @property
    def rescores(self) -> list[Rescore]:
        """What can rank a shortlist; the first is the default."""
        ways: list[Rescore] = ["floats", "codes", "tables"]
        return ways if self.settings["keep_floats"] else ways[1:]

    @property
    def num_codebooks(self) -> int:
        """Codes of each vector."""
        return self.settings["quantizer"]["num_codebooks"]

    def describe(self) -> dict[str, Any]:
        """What the page says of the shards, as JSON."""
        config, parameters = self.shards.quantizer.config, self.shards.quantizer.parameters()
        sizes = [bytes_per_vector(steps + 1, config.code_sizes) for steps in range(self.num_codebooks)]
        scanner = self.shards._rescorer.scanner
        return {
            "name": self.name,
            "vectors": len(self.shards),
            "dimensions": config.hidden_size,
            "quantizer": Path(self.settings["quantizer"]["model"]).name or "without a name",
            "metric": self.settings["metric"].replace("_", " "),
            "on_disk": f"{len(self.shards._shards)} shards",
            "bytes_by_codes": sizes,
            "scan_bytes": 0 if scanner is None else scanner.bytes_per_vector - sizes[-1],
            "quantizer_bytes": sum(weights.numel() * weights.element_size() for weights in parameters),
            "shortest": self.num_codebooks,
            "why_not_shorter": WHOLE,
            "rescores": self.rescores,
            "exact": None,
            "why_not_exact": NOT_COMPARED,
        }

    def search(self, query: str, top_k: int, setting: Setting) -> Hits:
        """Finds documents for a text.

        Raises:
            Refused: If the query is empty, or the setting is none for these shards.
        """
        if not query.strip():
            raise Refused("The query is empty: give it some text.")
        if setting.num_codebooks not in (None, self.num_codebooks):
            raise Refused(f"num_codebooks must be {self.num_codebooks}, got {setting.num_codebooks}. {WHOLE}")
        rescore = setting.rescore or self.rescores[0]
        if rescore not in self.rescores:
            raise Refused(f"rescore must be one of {', '.join(self.rescores)}, got {rescore}.")
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
