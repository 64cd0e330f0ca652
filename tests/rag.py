"""What the tests of the RAG adapters share: a small quantizer, an encoder of real texts, and documents to filter."""

import hashlib
from pathlib import Path

import numpy as np

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.training import initialize


def make_quantizer(size: int, num_codebooks: int = 8) -> RQMoEModel:
    """An additive quantizer of random vectors, fine enough to tell a handful of documents apart."""
    model = RQMoEModel(RQMoEConfig.additive(hidden_size=size, num_codebooks=num_codebooks, codebook_size=16))
    return initialize(model, np.random.default_rng(0).normal(size=(1000, size)).astype(np.float32)).eval()


def embed(text: str, size: int) -> list[float]:
    """A vector that depends on nothing but the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=size).tolist()


def random_metadata(count: int, seed: int = 0) -> list[dict]:
    """Metadata of all kinds of values, of which some are missing, null or empty."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        fields = {
            "year": int(rng.integers(2018, 2024)),
            "rating": float(rng.integers(0, 8)) / 2,
            "lang": str(rng.choice(["en", "fr", "de"])),
            "draft": bool(rng.integers(2)),
            "note": None,
            "a.dotted key": int(rng.integers(3)),
            "tags": [str(tag) for tag in rng.choice(["red", "green", "blue"], size=rng.integers(3), replace=False)],
        }
        drawn.append({name: value for name, value in fields.items() if rng.random() < 0.8})
    return drawn


class Meanwhile:
    """An index that is asked while another one takes away from the folder what has just been found.

    Args:
        folder: Of the collection.
        quantizer: Its quantizer.
        method: Of the index; each time that it has answered, the first document of the answer is removed.
    """

    def __init__(self, folder: Path, quantizer: RQMoEModel, method: str):
        self.index, self.writer = (RQMoEIndex.load(folder, quantizer) for _ in range(2))
        self.removed: list = []
        self._ask = getattr(self.index, method)
        setattr(self.index, method, self._answer)

    def _answer(self, *args, **kwargs):
        answer = self._ask(*args, **kwargs)
        answer = answer if isinstance(answer, tuple) else list(answer)  # scores and ids, or documents
        first = answer[1].tolist()[0] if isinstance(answer, tuple) else answer[0].id
        self.removed.append(first)
        self.writer.remove([first], missing_ok=True)
        return answer
