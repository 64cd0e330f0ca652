"""What encoding with local search costs on a processor: few and many vectors at a time, with Numba and without it.

    python benchmarks/encoding.py

And what a beam is worth beside rounds of local search, in error and time. Held-out passages, bundled quantizers, one
process; nothing else should run on the machine.
"""

import argparse
import time
from pathlib import Path

import environment
import numpy as np
import torch
from rivals.interface import squared_error
from sets import load
from timing import median_seconds

from rqmoe_hf import RQMoEModel, local_search_rqmoe
from rqmoe_hf.bundled import load_quantizer

BATCHES = (1, 16, 256, 4096)
SEARCHES = ((4, 16), (1, 16), (1, 32), (1, 64), (2, 32), (4, 32), (4, 64))  # beam, rounds
CALLS = 20  # that are timed; three of the largest batch


def load_without_numba(name: str) -> RQMoEModel:
    """A quantizer whose tables are made for PyTorch's operations."""
    compiled, local_search_rqmoe.can_sweep = local_search_rqmoe.can_sweep, lambda *_: False
    try:
        model = load_quantizer(name)
        model.compress(np.zeros((1, model.config.hidden_size), np.float32))  # builds them
    finally:
        local_search_rqmoe.can_sweep = compiled
    return model


def seconds_per_vector(model: RQMoEModel, vectors: np.ndarray, batch: int) -> float:
    """Median time of a vector among `batch`, each call with other vectors."""
    calls = iter(range(10**9))

    def work() -> None:
        start = next(calls) * batch % len(vectors)
        model.compress(vectors[start : start + batch], show_progress_bar=False)

    return median_seconds(work, CALLS if batch < BATCHES[-1] else 3) / batch


def main() -> None:
    """Measures and writes results/encoding.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizers", nargs="+", default=["minilm-384-8-bytes", "minilm-384-32-bytes"])
    parser.add_argument("--set", default="minilm-384")
    parser.add_argument("--root", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    vectors = load(arguments.set, arguments.root, 1_000).database[: BATCHES[-1]]
    results = {"environment": environment.describe(), "threads": torch.get_num_threads(), "quantizers": {}}
    for name in arguments.quantizers:
        models = {"numba": load_quantizer(name), "torch": load_without_numba(name)}
        codes = [model.compress(vectors[:256], show_progress_bar=False) for model in models.values()]
        speeds = {
            kind: {str(batch): seconds_per_vector(model, vectors, batch) for batch in BATCHES}
            for kind, model in models.items()
        }
        searches = []
        for beam, rounds in SEARCHES:
            settings = {"beam_size": beam, "local_search": rounds, "show_progress_bar": False}
            start = time.perf_counter()
            found = models["numba"].compress(vectors, **settings)
            seconds = (time.perf_counter() - start) / len(vectors)
            error = squared_error(vectors, models["numba"].decompress(found))
            searches.append({"beam_size": beam, "local_search": rounds, "mse": error, "seconds_per_vector": seconds})
        row = {"same_codes": bool((codes[0] == codes[1]).all()), "seconds_per_vector": speeds, "searches": searches}
        results["quantizers"][name] = row
        print(name, row, flush=True)
        environment.save("encoding", results)


if __name__ == "__main__":
    main()
