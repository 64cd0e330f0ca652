"""What each lever of the additive quantizers gives: annealing, its rounds, the size of the codebooks, the search.

    python benchmarks/levers.py --set wordllama-256 --limit 60000

trains quantizers of 8 bytes on the same vectors, encodes held-out ones with more and more rounds of
local search, and writes results/levers-<set>.json after each. Settings that are there already are not run again.
"""

import argparse
import time
from pathlib import Path

import environment
import numpy as np
import torch
from rivals.interface import squared_error
from sets import SETS, load

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.training.lsq import train_lsq

SEARCHES = (0, 1, 2, 4, 8, 16, 32)  # rounds of local search
HELD_OUT = 4_000
# Name: codebook sizes, and settings of `train_lsq`. Those without annealing have as many rounds.
SETTINGS: dict[str, tuple[list[int], dict]] = {
    "8 x 256, no annealing": ([256] * 8, {"rounds": 0, "final_rounds": 31}),
    "8 x 256": ([256] * 8, {}),
    "8 x 256, twice the rounds": ([256] * 8, {"rounds": 50}),
    "7 x 512 + 2": ([512] * 7 + [2], {}),
    "6 x 1024 + 16": ([1024] * 6 + [16], {}),
    "5 x 2048 + 512": ([2048] * 5 + [512], {}),
}


def quantizer(sizes: list[int], codebooks: list[np.ndarray]) -> RQMoEModel:
    """An additive quantizer of centred vectors with given codebooks."""
    settings = {"num_codebooks": len(sizes), "codebook_size": max(sizes), "codebook_sizes": sizes}
    model = RQMoEModel(RQMoEConfig.additive(hidden_size=codebooks[0].shape[1], **settings)).eval()
    with torch.no_grad():
        model.scale.fill_(1.0)
        model.codebooks.zero_()
        for target, codebook in zip(model.codebooks, codebooks, strict=True):
            target[: len(codebook)] = torch.from_numpy(codebook)
    return model


def measure(model: RQMoEModel, vectors: np.ndarray) -> dict:
    """Error and speed of the encoder for every number of rounds of local search."""
    rows = {}
    for rounds in SEARCHES:
        model.compress(vectors[:64], local_search=rounds)  # builds the tables
        start = time.perf_counter()
        codes = model.compress(vectors, local_search=rounds)
        seconds = time.perf_counter() - start
        error = squared_error(vectors, model.decompress(codes))
        rows[str(rounds)] = {"mse": error, "encode_per_second": round(len(vectors) / seconds)}
    return rows


def main() -> None:
    """Runs the settings that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(SETS), default="wordllama-256")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=60_000, help="training vectors")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    arguments = parser.parse_args()
    data = load(arguments.set, arguments.root, arguments.limit)
    mean = data.train.mean(axis=0)
    held_out = data.database[:HELD_OUT] - mean
    file = f"levers-{arguments.set}"
    for name in arguments.settings:
        results = environment.load(file)
        rows = results.setdefault("settings", {})
        key = f"{name} | {len(data.train)} training vectors | {data.checksum}"
        if key in rows:
            continue
        sizes, settings = SETTINGS[name]
        start = time.perf_counter()
        codebooks, codes = train_lsq(data.train - mean, sizes, **settings)
        seconds = time.perf_counter() - start
        trained = sum(codebook[column] for codebook, column in zip(codebooks, codes.T, strict=True))
        rows[key] = {
            "train_mse": squared_error(data.train[: len(trained)] - mean, trained),
            "train_seconds": round(seconds, 1),
            "searches": measure(quantizer(sizes, codebooks), held_out),
        }
        environment.save(file, results | {"environment": environment.describe(), "settings": rows})
        print(name, rows[key], flush=True)


if __name__ == "__main__":
    main()
