"""What settings of experts give: the width of instructions, what codebooks are conditioned on, the learning rate.

    python benchmarks/experts.py --set sift-128

trains quantizers of 8 bytes (8 x 256, one expert per step of two layers) on the same 100,000 vectors for six epochs,
measures held-out ones, and writes results/experts-<set>.json after each. Settings that are there already are not run
again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import environment
from rivals.family import EXPERTS, FamilyMember
from rivals.interface import squared_error
from sets import load

TRAINED_ON = 100_000
HELD_OUT = 2_000
BYTES = 8
SEARCH = {"num_candidates": 16, "beam_size": 16}
INSTRUCTED = {"conditioning": "instruction"}

# By name: the learning rate, and fields of the config.
SETTINGS: dict[str, tuple[float, dict]] = {
    **{f"instructions of {size}": (8e-3, INSTRUCTED | {"instruction_size": size}) for size in (8, 32, 64, 128, 256)},
    **{f"reconstruction, learning rate {rate}": (rate, {}) for rate in (1e-3, 4e-3, 8e-3)},
}


def main() -> None:
    """Trains and measures the settings that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="sift-128")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    arguments = parser.parse_args()
    data = load(arguments.set, arguments.root, TRAINED_ON)
    held_out = data.database[:HELD_OUT]
    file = f"experts-{arguments.set}"
    for name in arguments.settings:
        results = environment.load(file)
        rows = results.setdefault("settings", {})
        if name in rows:
            continue
        rate, overrides = SETTINGS[name]
        recipe = replace(EXPERTS, learning_rate=rate, epochs=6, weight_decay=0.0)
        member = FamilyMember(recipe, data.train.shape[1], BYTES, **overrides)
        start = time.perf_counter()
        member.train(data.train)
        seconds = time.perf_counter() - start
        searches = {"greedy": {"num_candidates": 16, "beam_size": 1}, "beam": SEARCH}
        errors = {
            search: squared_error(held_out, member.model.decompress(member.model.compress(held_out, **settings)))
            for search, settings in searches.items()
        }
        rows[name] = {"train_seconds": round(seconds, 1), "weights": member.codebook_bytes // 4, "mse": errors}
        environment.save(file, results | {"environment": environment.describe(), "settings": rows})
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
