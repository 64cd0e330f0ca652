"""Peak memory of training, compressing, indexing and searching, and how it grows with the number of vectors.

    python benchmarks/memory.py /tmp/memory [--sizes 1000000 10000000] [--stages compress ...] [--keep]

A set larger than the disk has room for is made of one file under many names (`--distinct-files`). Fifty gigabytes, in
a control group or container that is allowed four:

    python benchmarks/memory.py /tmp/memory --sizes 32600000 --dimension 384 --distinct-files 8 --results memory-50-gb

Each stage is a command in a process of its own, over parquet files that are made for it. While it runs, the resident
memory of the process and its children is read every 50 ms: anonymous memory, which the system cannot take back, and
pages of files, which it can. Results go to results/memory.json; the table of docs/scaling.md is made from them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import environment
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rqmoe_hf.codes import bytes_per_vector
from rqmoe_hf.data.shards import fixed_size_column

CODEBOOKS, CODEWORDS = 8, 256
FILE_ROWS = 200_000  # one row group each, as pyarrow writes them
HELD_OUT = 5_000
INTERVAL = 0.05
KINDS = ("anonymous", "file", "total")
SEARCH = """
import sys
import numpy as np
from rqmoe_hf.index import RQMoEIndex
folder, quantizer, dimension = sys.argv[1], sys.argv[2], int(sys.argv[3])
with RQMoEIndex.load(folder, quantizer) as index:
    index.search(np.random.default_rng(1).standard_normal((64, dimension), np.float32), top_k=10)
"""


@dataclass(frozen=True)
class Place:
    """Where everything of one size lies.

    Args:
        root: The work folder.
        count: Vectors.
        dimension: Of the vectors.
    """

    root: Path
    count: int
    dimension: int

    def __truediv__(self, name: str) -> Path:
        return self.root / f"{name}-{self.count}"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        command: Arguments of Python in a place.
        held: Bytes of each vector that must be in anonymous memory: those of an index that is not memory-mapped.
        output: Name of the folder that it makes.
    """

    command: Callable[[Place], list[str]]
    held: int = 0
    output: str | None = None


def rqmoe(*arguments: object) -> list[str]:
    """A command of the package."""
    return ["-m", "rqmoe_hf", *map(str, arguments)]


def train(place: Place, name: str, *more: object) -> list[str]:
    """Training with few steps."""
    return rqmoe("train", "--embeddings", place / "vectors", "--output", place / name, "--num-codebooks", CODEBOOKS,
                 "--codebook-size", CODEWORDS, "--beam-size", 1, *more)  # fmt: skip


def build(place: Place, kind: str) -> list[str]:
    """An index of the codes."""
    return rqmoe("index", "build", place / f"index-{kind}", place / "codes", "--model", place.root / "quantizer",
                 "--metric", "cosine", "--kind", kind)  # fmt: skip


def search(place: Place, kind: str) -> list[str]:
    """64 queries to an index that is opened for them."""
    return ["-c", SEARCH, str(place / f"index-{kind}"), str(place.root / "quantizer"), str(place.dimension)]


INDEXED = bytes_per_vector(CODEBOOKS, CODEWORDS) + 9  # code, code of the norm, row number
FEW_STEPS = ("--member", "additive", "--max-steps", 20, "--init-sample-size", 16_384)
STAGES = {
    "train, streaming": Stage(
        lambda place: train(place, "streamed", *FEW_STEPS, "--streaming", "--evaluation", place.root / "held.parquet"),
        output="streamed",
    ),
    "train": Stage(lambda place: train(place, "trained", *FEW_STEPS), output="trained"),
    "train, LSQ": Stage(
        lambda place: train(place, "lsq", "--additive", "--init-rounds", 1, "--local-search", 1), output="lsq"
    ),
    "compress": Stage(
        lambda place: rqmoe("compress", place / "vectors", "--model", place.root / "quantizer", "-o", place / "codes",
                            "--beam-size", 1, "--local-search", 0),
        output="codes",
    ),
    "index, flat": Stage(lambda place: build(place, "flat"), INDEXED, "index-flat"),
    "search, flat": Stage(lambda place: search(place, "flat")),
    "index, ivf": Stage(lambda place: build(place, "ivf"), INDEXED, "index-ivf"),
    "search, ivf": Stage(lambda place: search(place, "ivf")),
}  # fmt: skip


def resident(process: int) -> dict[str, int]:
    """Bytes of a process and its children in memory now."""
    found, waiting = dict.fromkeys(KINDS, 0), [process]
    while waiting:
        number = waiting.pop()
        try:
            lines = Path(f"/proc/{number}/status").read_text("utf-8").splitlines()
            waiting += [int(child) for file in Path(f"/proc/{number}/task").glob("*/children")
                        for child in file.read_text("utf-8").split()]  # fmt: skip
        except OSError:  # it has ended
            continue
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
        found["anonymous"] += sizes.get("RssAnon", 0)  # none of one that is ending
        found["file"] += sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
    found["total"] = found["anonymous"] + found["file"]
    return found


class Watcher(threading.Thread):
    """Keeps the peaks of a process's memory while it runs.

    Args:
        process: Its number.
    """

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process, self.peaks, self.ended = process, dict.fromkeys(KINDS, 0), threading.Event()

    def run(self) -> None:
        """Looks at short intervals."""
        while not self.ended.wait(INTERVAL):
            for kind, size in resident(self.process).items():
                self.peaks[kind] = max(self.peaks[kind], size)


def measure(stage: Stage, place: Place) -> dict:
    """Peaks and seconds of one stage, which begins without anything of an earlier run."""
    if stage.output is not None:
        shutil.rmtree(place / stage.output, ignore_errors=True)
    cache = place.root / "cache"
    variables = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    log = place.root / "log.txt"
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as written:
        process = subprocess.Popen(
            [sys.executable, *stage.command(place)], env=variables, stdout=written, stderr=written
        )
        watcher = Watcher(process.pid)
        watcher.start()
        status = process.wait()
    watcher.ended.set()
    watcher.join()
    shutil.rmtree(cache, ignore_errors=True)
    if status:
        raise RuntimeError(f"The command ended with {status}:\n{log.read_text('utf-8')[-3000:]}")
    return watcher.peaks | {"held": stage.held * place.count, "seconds": round(time.perf_counter() - start, 1)}


def vectors(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Vectors around a few hundred centres, float32 `(rows, dimension)`."""
    centres = np.random.default_rng(0).standard_normal((256, dimension), np.float32)
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((rows, dimension), np.float32)
    return centres[generator.integers(len(centres), size=rows)] + 0.5 * noise


def write_vectors(place: Place, distinct: int | None = None) -> None:
    """Parquet files of vectors, unless they are there; from the `distinct` + 1st on they are links to earlier ones."""
    folder = place / "vectors"
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for number, start in enumerate(range(0, place.count, FILE_ROWS)):
        file = scratch / f"{number:05d}.parquet"
        if distinct is not None and number >= distinct:
            os.link(scratch / f"{number % distinct:05d}.parquet", file)
            continue
        block = vectors(min(FILE_ROWS, place.count - start), place.dimension, number + 1)
        pq.write_table(pa.table({"embeddings": fixed_size_column(block)}), file)
    scratch.rename(folder)


def prepare(root: Path, dimension: int) -> None:
    """Held-out vectors, and the quantizer that makes all codes."""
    held = root / "held.parquet"
    pq.write_table(pa.table({"embeddings": fixed_size_column(vectors(HELD_OUT, dimension, 1_000_000))}), held)
    if not (root / "quantizer").exists():
        first = Place(root, FILE_ROWS, dimension)
        write_vectors(first)
        measure(STAGES["train, streaming"], first)
        (first / "streamed").rename(root / "quantizer")


def main() -> None:
    """Measures the stages, all of one size after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for parquet files, codes and indexes; about 7 GB for 10 million")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000_000, 10_000_000], help="numbers of vectors")
    parser.add_argument("--dimension", type=int, default=32, help="of the vectors")
    parser.add_argument("--distinct-files", type=int, help="files of 200,000 vectors, of which the others are links")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--results", default="memory", help="name of the file in results")
    parser.add_argument("--keep", action="store_true", help="leave the folder's content there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    prepare(arguments.folder, arguments.dimension)
    results = environment.load(arguments.results) | {"environment": environment.describe()}
    results["setting"] = {"dimension": arguments.dimension, "num_codebooks": CODEBOOKS, "codebook_size": CODEWORDS}
    for count in arguments.sizes:
        place = Place(arguments.folder, count, arguments.dimension)
        write_vectors(place, arguments.distinct_files)
        for name in arguments.stages:
            row = measure(STAGES[name], place)
            results.setdefault("stages", {}).setdefault(name, {})[str(count)] = row
            shown = ", ".join(f"{kind} {row[kind] / 1e6:,.0f} MB" for kind in KINDS)
            print(f"{name}, {count:,}: {shown}; {row['seconds']} s", flush=True)
            environment.save(arguments.results, results)
        if not arguments.keep:
            for made in arguments.folder.glob(f"*-{count}"):
                shutil.rmtree(made)
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
