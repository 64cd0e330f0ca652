"""Builds the set fashion-mnist-784: the grey values of 28 x 28 pictures of clothes, 0 to 255.

    python benchmarks/sets/fashion_mnist.py --output data/fashion-mnist-784

The pictures are those of the benchmark "fashion-mnist-784-euclidean" of ann-benchmarks. There all 60,000 are the
database and the 10,000 others the queries; here the error is measured on vectors that nothing was trained on, so
10,000 of the 60,000, drawn with a fixed seed, are kept from training: 2,000 for validation, 8,000 as the database.
The 1,000 queries are drawn from the 10,000. Needs ``apt-get`` and ``dpkg-deb`` and a Debian or Ubuntu mirror.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
from downloads import unpack_debian
from storage import write_set
from tqdm import tqdm

PACKAGE = "dataset-fashion-mnist"
VALIDATION, QUERIES, DATABASE = 2_000, 1_000, 8_000


def read_pictures(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of pictures as uint8 ``(n, height * width)``."""
    data = gzip.decompress(path.read_bytes())
    magic, count, height, width = np.frombuffer(data, ">i4", 4)
    if magic != 0x803:  # bytes in three dimensions
        raise ValueError(f"{path.name} is no IDX file of pictures: it begins with {magic:#x}, not 0x803.")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width)


def build(output: Path, seed: int) -> None:
    """Downloads the pictures and writes the set."""
    pictures = {}
    with tempfile.TemporaryDirectory() as scratch:
        version = unpack_debian((PACKAGE,), Path(scratch))[PACKAGE]
        folder = Path(scratch) / "root/usr/share/datasets/fashion-mnist"
        for part in tqdm(("train", "t10k"), desc="read", unit="file"):
            pictures[part] = read_pictures(folder / f"{part}-images-idx3-ubyte.gz")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pictures["train"]))
    validation, database, train = np.split(pictures["train"][order], [VALIDATION, VALIDATION + DATABASE])
    queries = pictures["t10k"][generator.permutation(len(pictures["t10k"]))[:QUERIES]]
    write_set(
        output,
        train,
        np.concatenate([validation, queries, database]),
        (VALIDATION, QUERIES),
        [{"name": f"Debian package {PACKAGE}", "version": version, "licence": "MIT"}],
        f"python benchmarks/sets/fashion_mnist.py --seed {seed}",
        seed=seed,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/fashion-mnist-784"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed)
