"""What is kept in memory: a formula for each thing, and what a process of its own takes at its peak."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rqmoe_hf.training.lsq import train_lsq

from .stages import Setting, filled, quantizer, vectors

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """One thing that takes memory.

    Args:
        name: In tables.
        formula: In words.
        predicted: Bytes in a setting.
        work: Gives a function that makes it; what is called before that function is not counted.
        setting: Where it is measured.
    """

    name: str
    formula: str
    predicted: Callable[[Setting], float]
    work: Callable[[Setting], Callable[[], object]]
    setting: Setting


def peak() -> int:
    """Bytes of this process in memory, at most since the last reset."""
    line = next(line for line in STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(number: int) -> int:
    """Bytes that one of `MEMORIES` takes at its peak, in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grown, (number,))


def _grown(number: int) -> int:
    memory = MEMORIES[number]
    work = memory.work(memory.setting)
    PEAK.write_text("5")
    before = peak()
    kept = work()
    grown = peak() - before
    del kept
    return grown


def _encoder(setting: Setting) -> Callable[[], object]:
    small = {**setting, "K": 16}
    quantizer(small).compress(vectors(64, setting["d"]), show_progress_bar=False)  # loads what is loaded once
    model, given = quantizer(setting), vectors(64, setting["d"])
    return lambda: model.compress(given, show_progress_bar=False)


def _lsq(setting: Setting) -> Callable[[], object]:
    given = vectors(setting["n"], setting["d"])
    sizes = [setting["K"]] * setting["M"]
    settings = {"rounds": 1, "final_rounds": 1, "show_progress_bar": False, "batch_size": 8_192}
    train_lsq(given[:2_048], [4] * 2, **settings)
    return lambda: train_lsq(given, sizes, **settings)


def _index(setting: Setting) -> Callable[[], object]:
    small, _ = filled({**setting, "n": 1_000})
    small.search(vectors(1, setting["d"]), top_k=10)
    return lambda: filled(setting)


def _code_bytes(setting: Setting) -> int:
    return -(-setting["M"] * (setting["K"] - 1).bit_length() // 8)


def _codewords(setting: Setting) -> int:
    return setting["M"] * setting["K"]


MEMORIES = [
    Memory(
        "encoder with local search: pairs of codewords", "2 (M K)^2",
        lambda s: 2 * _codewords(s) ** 2, _encoder, {"d": 384, "M": 8, "K": 1024, "rounds": 1},
    ),
    Memory(
        "LSQ: pairs and their sums, in float32 twice during a fit", "(2 + 2 * 4) (M K)^2",
        lambda s: 10 * _codewords(s) ** 2, _lsq, {"d": 64, "M": 8, "K": 1024, "n": 16_384},
    ),
    Memory(
        "index in memory, by its vectors", "n (bytes + 1 + 8)",
        lambda s: s["n"] * (_code_bytes(s) + 9), _index, {"d": 64, "M": 16, "K": 256, "n": 2_000_000},
    ),
]  # fmt: skip
