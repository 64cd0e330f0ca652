"""What the sentence-transformers module costs: encoding texts to codes beside the encoder alone.

    python benchmarks/module.py --passages data/passages/test.parquet

Both in one process, in turns, median of the rounds; the encoder in float32. Nothing else should run on the machine.
"""

import argparse
import statistics
import time
from pathlib import Path

import environment
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from rqmoe_hf.st import RQMoEQuantizer

WAYS = {
    "encoder alone": {"quantize": "none"},
    "codes, greedy": {"quantize": "codes", "num_candidates": 1, "beam_size": 1, "local_search": 0},
    "codes, default search": {"quantize": "codes"},
    "reconstructions, default search": {},
}


def main() -> None:
    """Measures every batch size and writes results/module.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--quantizer", default="minilm-384-32-bytes")
    parser.add_argument("--passages", type=Path, default=Path("data/passages/test.parquet"))
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    arguments = parser.parse_args()
    texts = pq.read_table(arguments.passages).column("text").to_pylist()[: arguments.texts]
    model = SentenceTransformer(arguments.encoder, device="cpu", model_kwargs={"dtype": torch.float32})
    model.append(RQMoEQuantizer.from_pretrained(arguments.quantizer))
    config = model[-1].model.config
    results = {
        "environment": environment.describe(),
        "quantizer": arguments.quantizer,
        "bytes_per_vector": config.bytes_per_vector,
        "threads": torch.get_num_threads(),
        "default_search": {name: getattr(config, name) for name in ("num_candidates", "beam_size", "local_search")},
        "batch_sizes": {},
    }
    for batch_size in arguments.batch_sizes:
        sample = texts if batch_size > 1 else texts[:256]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds + 1):  # the first is a warm-up
            for way, settings in WAYS.items():
                start = time.perf_counter()
                model.encode(sample, batch_size=batch_size, show_progress_bar=False, **settings)
                seconds[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
        alone = medians["encoder alone"]
        results["batch_sizes"][str(batch_size)] = {
            way: {"texts_per_second": round(len(sample) / median, 1), "over_encoder": round(median / alone - 1, 4)}
            for way, median in medians.items()
        }
        print(batch_size, results["batch_sizes"][str(batch_size)], flush=True)
        environment.save("module", results)


if __name__ == "__main__":
    main()
