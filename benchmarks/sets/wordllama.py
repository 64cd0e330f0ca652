"""Builds the set wordllama-256: the passages, embedded by the static encoder WordLlama l2_supercat.

    python benchmarks/sets/wordllama.py --passages data/passages --output data/wordllama-256

An embedding is the mean of the token embeddings of a passage, with norm one. The weights are read from the wheel of
the package ``wordllama`` (MIT), which is neither installed nor imported: it would be this very module.
"""

import argparse
from pathlib import Path

import numpy as np
import passages
import safetensors.numpy
from downloads import open_wheel
from storage import text_checksum, write_set
from tokenizers import Tokenizer
from tqdm import tqdm

REQUIREMENT = "wordllama==0.4.0.post1"
WEIGHTS = "wordllama/weights/l2_supercat_256.safetensors"
TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
VALIDATION, QUERIES = 5_000, 1_000
BATCH = 1_024


class StaticEncoder:
    """Embeds a text as the mean of its tokens' embeddings, with norm one."""

    def __init__(self, wheels: Path):
        with open_wheel(REQUIREMENT, wheels) as archive:
            self.weights = safetensors.numpy.load(archive.read(WEIGHTS))["embedding.weight"].astype(np.float32)
            self.tokenizer = Tokenizer.from_str(archive.read(TOKENIZER).decode("utf-8"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeds texts, none of them empty, as float32 ``(len(texts), 256)``."""
        found = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        starts = np.cumsum([0, *map(len, found)])[:-1]
        tokens = np.minimum(np.concatenate(found), len(self.weights) - 1)
        sums = np.add.reduceat(self.weights[tokens], starts)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def embed(encoder: StaticEncoder, texts: list[str], description: str) -> np.ndarray:
    """Embeds many texts with a progress bar, float32 ``(len(texts), 256)``."""
    with tqdm(total=len(texts), desc=description, unit="text") as bar:
        parts = []
        for start in range(0, len(texts), BATCH):
            parts.append(encoder.encode(texts[start : start + BATCH]))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def build(source: Path, output: Path, wheels: Path) -> None:
    """Embeds both splits of the passages and writes the set."""
    encoder = StaticEncoder(wheels)
    texts = {split: passages.read(source, split) for split in ("train", "test")}
    write_set(
        output,
        embed(encoder, texts["train"], "train"),
        embed(encoder, texts["test"], "test"),
        (VALIDATION, QUERIES),
        [*passages.SOURCES, {"name": "PyPI package wordllama", "version": REQUIREMENT[11:], "licence": "MIT"}],
        "python benchmarks/sets/wordllama.py",
        ("tokenizers",),
        sha256_of_texts={split: text_checksum(texts[split]) for split in texts},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path, default=Path("data/passages"))
    parser.add_argument("--output", type=Path, default=Path("data/wordllama-256"))
    parser.add_argument("--wheels", type=Path, default=Path("data/wheels"), help="Folder for the downloaded wheel.")
    arguments = parser.parse_args()
    build(arguments.passages, arguments.output, arguments.wheels)
