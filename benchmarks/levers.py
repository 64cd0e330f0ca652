"""What each lever of the additive quantizers gives: the size of the codebooks, the search, what keeps noise out.

    python benchmarks/levers.py --set minilm-384

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
from sets import load

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.training.augmentation import NeighborJitter
from rqmoe_hf.training.lsq import train_lsq

SEARCHES = (0, 1, 2, 4, 8, 16, 32)  # rounds of local search
HELD_OUT = 4_000
Settings = dict[str, tuple[list[int], dict]]  # by name: codebook sizes, and settings of `train_lsq`
BYTES = [256] * 8

# What is tried on which set, and on how many vectors. Settings without annealing have as many rounds.
FORGETFUL = {"keep": (0.0, 0.0)}
NOISE: Settings = {
    "vectors as they are, each fit to one round (LSQ++)": (BYTES, {"jitter": 0.0} | FORGETFUL),
    "moved vectors, each fit to one round": (BYTES, FORGETFUL),
    "vectors as they are, running fit": (BYTES, {"jitter": 0.0}),
    "moved vectors, running fit": (BYTES, {}),
    "the same, twice the rounds": (BYTES, {"rounds": 100}),
    "the same, no annealing": (BYTES, {"rounds": 0, "final_rounds": 60}),
    "the same, temperature 0.5": (BYTES, {"temperature": 0.5}),
    "the same, temperature 1.5": (BYTES, {"temperature": 1.5}),
    "the same, moved with half the energy": (BYTES, {"jitter": 0.19}),
    "the same, moved with twice the energy": (BYTES, {"jitter": 0.75}),
    "the same, four times the rounds": (BYTES, {"rounds": 200}),
    "the same, 7 x 512 + 2": ([512] * 7 + [2], {}),
    "the same, 6 x 1024 + 16": ([1024] * 6 + [16], {}),
}
LEVERS: dict[str, tuple[Settings, int]] = {"minilm-384": (NOISE, 16_384)}


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
    parser.add_argument("--set", choices=list(LEVERS), default="minilm-384")
    parser.add_argument("--root", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    tried, limit = LEVERS[arguments.set]
    data = load(arguments.set, arguments.root, limit)
    mean = data.train.mean(axis=0)
    held_out = data.database[:HELD_OUT] - mean
    file = f"levers-{arguments.set}"
    for name, (sizes, settings) in tried.items():
        results = environment.load(file)
        rows = results.setdefault("settings", {})
        key = f"{name} | {len(data.train)} training vectors | {data.checksum}"
        if key in rows:
            continue
        start = time.perf_counter()
        codebooks, _ = train_lsq(data.train - mean, sizes, source=NeighborJitter(data.train - mean, mean), **settings)
        seconds = time.perf_counter() - start
        model, trained = quantizer(sizes, codebooks), data.train[:HELD_OUT] - mean
        rows[key] = {
            "train_mse": squared_error(trained, model.decompress(model.compress(trained, local_search=SEARCHES[-1]))),
            "train_seconds": round(seconds, 1),
            "searches": measure(model, held_out),
        }
        environment.save(file, results | {"environment": environment.describe(), "settings": rows})
        print(name, rows[key], flush=True)


if __name__ == "__main__":
    main()
