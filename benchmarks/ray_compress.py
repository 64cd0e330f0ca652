"""`rqmoe compress` in one process, on one worker of Ray and on two, one of which is killed in the middle.

    python benchmarks/ray_compress.py

Random unit vectors in 64 parquet files, one output file each. Every run is a whole command, start-up included. All
outputs must be the same bytes. The search is a quick one: it makes reading and hand-over, which more workers share
worse than arithmetic, weigh most.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import environment
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from rqmoe_hf import load_quantizer
from rqmoe_hf.data.shards import fixed_size_column

FILES = 64
SEARCH = ["--num-candidates", "4", "--beam-size", "1", "--local-search", "0"]


def write_vectors(folder: Path, count: int, dimension: int) -> None:
    """Writes the vectors with ids, the same ones every time."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, rows in enumerate(tqdm(np.array_split(np.arange(count), FILES), desc="vectors")):
        vectors = generator.standard_normal((len(rows), dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        table = pa.table({"id": rows, "embeddings": fixed_size_column(vectors)})
        pq.write_table(table, folder / f"{part:03d}.parquet")


def run(command: list[str], watch: Callable[[subprocess.Popen], None] = lambda process: None) -> dict:
    """Runs a command to its end: seconds, peak memory of its own process and of its workers, in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch(process)
    output = process.stdout.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed.")
    peaks = re.search(r"Peak memory of the workers: (.*)\.$", output, re.MULTILINE)
    megabytes = re.findall(r"([\d,]+) MB", peaks[1]) if peaks else []
    return {
        "seconds": seconds,
        "peak_memory": usage.ru_maxrss * 1024,
        "workers_peak_memory": [int(peak.replace(",", "")) * 1_000_000 for peak in megabytes],
    }


def after_start(output: Path) -> float:
    """Seconds from the first file to the last: the run without the start of processes and the loading of models."""
    times = [file.stat().st_mtime for file in output.glob("part-*.parquet")]
    return max(times) - min(times)


def kill_a_worker(process: subprocess.Popen, output: Path) -> int:
    """Kills a worker when a third of the files is written; returns how many there were."""
    while process.poll() is None and len(list(output.glob("part-*.parquet"))) < FILES // 3:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "MapWorker" in " ".join(child.cmdline())]
    done = len(list(output.glob("part-*.parquet")))
    workers[0].kill()
    return done


def compare(output: Path, reference: Path) -> None:
    """Ends the benchmark unless two folders hold the same files with the same bytes."""
    for file in sorted({file.name for folder in (output, reference) for file in folder.iterdir()}):
        pair = [folder / file for folder in (output, reference)]
        if not all(path.exists() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes():
            sys.exit(f"{pair[0]} is not the file of the one-process command.")


def measure(folder: Path, vectors: int, model: str, search: list[str]) -> dict[str, dict]:
    """All runs."""
    write_vectors(folder / "vectors", vectors, load_quantizer(model).config.hidden_size)
    command = [sys.executable, "-m", "rqmoe_hf", "compress", str(folder / "vectors"), "--model", model, *search,
               "--shard-size", str(-(-vectors // FILES))]  # fmt: skip
    runs: dict[str, dict] = {}
    settings = {"one process": 0, "1 worker": 1, "2 workers": 2, "2 workers, one killed": 2}
    for name, workers in settings.items():
        output = folder / name
        engine = ["--engine", "ray", "--workers", str(workers)] if workers else []
        killed: list[int] = []

        def watch(process: subprocess.Popen, output: Path = output, killed: list = killed, name: str = name) -> None:
            if name.endswith("killed"):
                killed.append(kill_a_worker(process, output))

        runs[name] = run([*command, "--output", str(output), *engine], watch)
        compare(output, folder / "one process")
        if killed:
            runs[name]["files_when_killed"] = killed[0]
        runs[name]["vectors_per_second"] = vectors / runs[name]["seconds"]
        runs[name]["seconds_after_start"] = after_start(output)
        print(name, runs[name], flush=True)
    return runs


def main() -> None:
    """Measures and writes results/ray.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--model", default="minilm-384-8-bytes")
    parser.add_argument("--search", nargs="*", default=SEARCH, help="options of rqmoe compress, after a space: ' --x'")
    parser.add_argument("--dry-run", action="store_true", help="do not write the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        search = [part for option in arguments.search for part in option.split()]
        runs = measure(Path(folder), arguments.vectors, arguments.model, search)
    results = {"environment": environment.describe(), "vectors": arguments.vectors, "files": FILES,
               "quantizer": arguments.model, "search": " ".join(search), "runs": runs,
               "speedup": {name: runs["1 worker"][name] / runs["2 workers"][name]
                           for name in ("seconds", "seconds_after_start")}}  # fmt: skip
    print("2 workers against one:", results["speedup"])
    if not arguments.dry_run:
        environment.save("ray", results)


if __name__ == "__main__":
    main()
