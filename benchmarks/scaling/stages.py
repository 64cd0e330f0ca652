"""What is timed: one function for each stage, from a setting to seconds.

The quantizers have random weights and the vectors are random: what is computed does not depend on them, except that
Faiss keeps a heap of the best scores while it scans.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timing import median_seconds

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.training.lsq import train_lsq

Setting = dict[str, int]
VECTORS = 1_024
REPEATS = 3


@dataclass(frozen=True)
class Stage:
    """One stage: what one unit of it costs, and what the cost depends on.

    Args:
        name: In tables.
        unit: What the cost is for: "vector" or "query".
        measure: Seconds of one unit in a setting.
        base: The setting that is varied, one factor at a time.
        factors: Values of each factor; the one in `base` is among them.
        held_out: A setting that no exponent was fitted to.
    """

    name: str
    unit: str
    measure: Callable[[Setting], float]
    base: Setting
    factors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    held_out: Setting = field(default_factory=dict)


def quantizer(setting: Setting) -> RQMoEModel:
    """A quantizer with random weights: d, M, K, and N, H, A, B where it has experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": setting["d"], "num_codebooks": setting["M"], "codebook_size": setting["K"]}
    if "N" not in setting:
        search = {"beam_size": 1, "local_search": setting.get("rounds", 0)}
        model = RQMoEModel(RQMoEConfig.additive(**sizes, **search))
    else:
        search = {"beam_size": setting.get("beam", 4), "num_candidates": setting.get("candidates", 8)}
        experts = {"num_experts": setting["N"], "intermediate_size": setting["H"]}
        model = RQMoEModel(RQMoEConfig(**sizes, **search, **experts))
    with torch.no_grad():
        for step, codebook in enumerate(model.codebooks):
            codebook.normal_(std=0.8**step / setting["d"] ** 0.5)
        model.mean.zero_()
        model.scale.fill_(1.0)
        if model.instructions is not None:
            model.instructions.normal_(std=setting["d"] ** -0.5)
    return model.eval()


def vectors(count: int, dimension: int) -> np.ndarray:
    """Random vectors of norm 1, float32."""
    drawn = np.random.default_rng(0).standard_normal((count, dimension), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def compress(setting: Setting) -> float:
    """Encoding."""
    model, given = quantizer(setting), vectors(VECTORS, setting["d"])
    return median_seconds(lambda: model.compress(given, show_progress_bar=False), REPEATS) / VECTORS


def decompress(setting: Setting) -> float:
    """Decoding."""
    model, count = quantizer(setting), 8 * VECTORS
    width = -(-setting["M"] * model.config.bits_per_code // 8)
    codes = np.random.default_rng(0).integers(0, 256, (count, width), np.uint8)
    return median_seconds(lambda: model.decompress(codes, show_progress_bar=False), REPEATS) / count


def train(setting: Setting) -> float:
    """One vector in one epoch of gradient training: encode it, forward, backward, and its share of a step."""
    model, batch = quantizer(setting).train(), torch.from_numpy(vectors(1_024, setting["d"]))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()

    return median_seconds(step, REPEATS) / len(batch)


def lsq_round(setting: Setting) -> float:
    """One vector in one round of LSQ's local search, without what a round costs for any number of vectors."""
    given, sizes = vectors(8_192, setting["d"]), [setting["K"]] * setting["M"]

    def rounds(count: int, batch: int) -> float:
        start = time.perf_counter()
        settings = {"final_rounds": 0, "jitter": 0.0, "show_progress_bar": False}
        train_lsq(given, sizes, rounds=count, batch_size=batch, **settings)
        return time.perf_counter() - start

    # Rounds of a quarter of the vectors cost the fit as well.
    large, small = (min((rounds(3, size) - rounds(1, size)) / 2 for _ in range(2)) for size in (8_192, 2_048))
    return (large - small) / (8_192 - 2_048)


def lsq_fit(setting: Setting) -> float:
    """The least squares of a round, for any number of vectors: what a round of very few vectors costs."""
    given, sizes = vectors(2_048, setting["d"]), [setting["K"]] * setting["M"]
    settings = {"final_rounds": 0, "jitter": 0.0, "show_progress_bar": False, "search_rounds": 1, "batch_size": 64}

    def rounds(count: int) -> float:
        start = time.perf_counter()
        train_lsq(given, sizes, rounds=count, **settings)
        return time.perf_counter() - start

    return min((rounds(3) - rounds(1)) / 2 for _ in range(2))


def filled(setting: Setting, folder: Path | None = None) -> tuple[RQMoEIndex, float]:
    """An index of random codes, and the seconds that adding them took."""
    model = quantizer(setting)
    width = -(-setting["M"] * model.config.bits_per_code // 8)
    codes = np.random.default_rng(0).integers(0, 256, (setting["n"], width), np.uint8)
    index = RQMoEIndex(model, folder, metric="l2", kind="flat")
    start = time.perf_counter()
    for first in range(0, setting["n"], 16_384):
        index.add(codes=codes[first : first + 16_384])
    return index, time.perf_counter() - start


def build(setting: Setting) -> float:
    """Adding codes to an index on disk; the median, because what the disk does differs from time to time."""
    return statistics.median(_build_once(setting) for _ in range(REPEATS)) / setting["n"]


def _build_once(setting: Setting) -> float:
    with tempfile.TemporaryDirectory() as folder:
        index, taken = filled(setting, Path(folder) / "index")
        start = time.perf_counter()
        index.save()
        taken += time.perf_counter() - start
        index.close()
    return taken


def search(setting: Setting) -> float:
    """One of many queries over a flat index in memory, with a shortlist of 100."""
    index, _ = filled(setting)
    asked = vectors(64, setting["d"])
    with index:
        return median_seconds(lambda: index.search(asked, top_k=10, shortlist=100), REPEATS) / len(asked)


EXPERTS = {"d": 384, "M": 8, "K": 256, "N": 2, "H": 256, "beam": 4, "candidates": 8}
MORE_EXPERTS = {
    "d": (192, 384, 768), "M": (4, 8, 16), "K": (64, 256, 1024), "N": (1, 2, 4), "H": (128, 256, 512),
    "beam": (2, 4, 8), "candidates": (4, 8, 16),
}  # fmt: skip
DECODER = {key: EXPERTS[key] for key in ("d", "M", "K", "N", "H")}
ADDITIVE = {"d": 384, "M": 8, "K": 256, "rounds": 32}
MORE_ADDITIVE = {"d": (192, 384, 768), "M": (4, 8, 16), "K": (128, 256, 512), "rounds": (16, 32, 64)}
INDEX = {"d": 384, "M": 16, "K": 256, "n": 200_000}
SCANNED = {"d": 384, "M": 16, "K": 256, "n": 1_000_000}  # so many that the scan is most of it
LSQ = {"d": 384, "M": 8, "K": 256}
MORE_LSQ = {"d": (192, 384, 768), "M": (4, 8, 16), "K": (128, 256, 512)}
OTHER = {"d": 512, "M": 12}

STAGES = [
    Stage("compress, additive", "vector", compress, ADDITIVE, MORE_ADDITIVE, ADDITIVE | OTHER | {"rounds": 24}),
    Stage("compress, experts", "vector", compress, EXPERTS, MORE_EXPERTS, EXPERTS | OTHER | {"beam": 6}),
    Stage("decompress, experts", "vector", decompress, DECODER, {key: MORE_EXPERTS[key] for key in DECODER},
          DECODER | OTHER),
    Stage("train by gradients, an epoch", "vector", train, EXPERTS, MORE_EXPERTS, EXPERTS | OTHER | {"H": 384}),
    Stage("train LSQ, a round", "vector", lsq_round, LSQ, MORE_LSQ, LSQ | OTHER),
    Stage("train LSQ, a round's fit", "round", lsq_fit, LSQ, MORE_LSQ, LSQ | OTHER),
    Stage("index", "vector", build, INDEX, {"M": (8, 16, 32), "n": (100_000, 200_000, 400_000)},
          INDEX | {"M": 12, "n": 300_000}),
    Stage("search, flat", "query", search, SCANNED, {"d": (192, 384, 768), "M": (8, 16, 32),
          "n": (500_000, 1_000_000, 2_000_000)}, SCANNED | OTHER | {"n": 1_500_000}),
]  # fmt: skip
