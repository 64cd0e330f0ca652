"""Error and recall of all methods at equal bytes, trained on the same vectors.

    python benchmarks/quality.py --set minilm-384
    python benchmarks/quality.py --set minilm-384 --methods PQ "RQ, beam 5" --bytes 8 16 --limit 100000
    python benchmarks/quality.py --set minilm-384 --methods --ours minilm-384-32-bytes:13 runs/mine

Every cell, a method at a number of bytes, is written to results/quality-<set>.json as soon as it is measured, and not
measured again (`--again` does): a run that was stopped continues. A cell counts for its data, its number of training
vectors and, if it is a quantizer of ours, its weights.

The database is ranked by the Euclidean distance of its reconstructions to unquantized queries.
"""

import argparse
import gc
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import environment
import faiss
import numpy as np
import tasks as text_tasks
import torch
from rivals import OURS, REFERENCES, RIVALS, Quantizer, Searcher, build
from rivals.family import RECIPES, FamilyMember, Ours
from rivals.interface import squared_error
from rivals.limits import training_vectors
from sets import SETS, EmbeddingSet, load

from rqmoe_hf import record
from rqmoe_hf.bundled import bundled_quantizers
from rqmoe_hf.evaluation import nearest_neighbors, recalls
from rqmoe_hf.record import RECORD_FILE
from rqmoe_hf.saving import write_text

BYTES = (8, 16, 32, 64)
CARD_TEXTS = "held-out English passages of dictionaries and Debian's package descriptions"
DEPTH = 100  # of the ranking: R@100


@dataclass(frozen=True)
class Cell:
    """One method at one number of bytes.

    Args:
        method: Key of `RIVALS`, `OURS`, `REFERENCES` or `RECIPES`, or what stands behind `--ours`.
        size: Bytes per vector; None for what has bytes of its own.
        ours: Whether it is a finished quantizer.
    """

    method: str
    size: int | None
    ours: bool = False


def list_cells(methods: list[str], sizes: list[int], ours: list[str]) -> list[Cell]:
    """The cells of a run, in order: small codes first."""
    unknown = [method for method in methods if method not in (*RIVALS, *OURS, *REFERENCES, *RECIPES)]
    if unknown:
        raise ValueError(f"Unknown: {unknown}. There are {', '.join((*RIVALS, *OURS, *REFERENCES, *RECIPES))}.")
    fixed = [Cell(method, None) for method in methods if method in REFERENCES]
    rated = [Cell(method, size) for size in sizes for method in methods if method not in REFERENCES]
    return [*fixed, *rated, *(Cell(given, None, ours=True) for given in ours)]


def prepare(cell: Cell, data: EmbeddingSet, minutes: float) -> tuple[Quantizer | None, dict]:
    """The untrained quantizer of a cell, and the fields that identify the cell."""
    available, dimension = data.train.shape
    identity = {"method": cell.method, "bytes": cell.size, "training_vectors": available, "checksum": data.checksum}
    if cell.ours:
        finished = Ours(cell.method)
        known = {"method": finished.name, "bytes": -(-finished.code_bits // 8), "weights": finished.fingerprint}
        checksum = data.limited(0).checksum  # of what it is measured on: it was trained elsewhere
        return finished, identity | known | {"training_vectors": finished.training_vectors, "checksum": checksum}
    if cell.method in RECIPES:
        assert cell.size is not None
        member = FamilyMember(RECIPES[cell.method], dimension, cell.size, 60 * minutes)
        return member, identity | {"method": f"{cell.method}, {minutes:g} minutes"}
    quantizer = build(cell.method, dimension, cell.size or 0)
    if cell.size is None:
        assert quantizer is not None
        if cell.method.startswith("binary") and data.train.min() >= 0:
            print(f"{cell.method}: no value is negative, so that all signs are the same", flush=True)
            return None, identity
        return quantizer, identity | {"bytes": -(-quantizer.code_bits // 8)}
    count, reason = training_vectors(cell.method, cell.size, dimension, available)
    if count == 0 or quantizer is None:
        print(f"{cell.method} at {cell.size} bytes: {reason or 'does not exist'}", flush=True)
        return None, identity
    known = {"training_vectors": count, "checksum": data.limited(count).checksum}
    return quantizer, identity | known | ({"note": reason} if reason else {})


def key_of(identity: dict) -> str:
    """The name of a cell in the results file."""
    parts = [identity["method"], f"{identity['bytes']} bytes", f"{identity['training_vectors']} training vectors"]
    return " | ".join([*parts, *(identity[part] for part in ("weights", "checksum") if part in identity)])


def ranking(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """R@1, R@10, R@100 and recall@10 of ranked neighbours, both `(n, 100)` or as many as there are."""
    first, tenth, recall = recalls(truth, found)
    hundredth = float((found == truth[:, :1]).any(axis=1).mean())
    return {
        "recall_at_1_1": first,
        "recall_at_1_10": tenth,
        "recall_at_1_100": hundredth,
        "recall_10_at_10": recall,
    }


def measure(
    quantizer: Quantizer, train: np.ndarray, data: EmbeddingSet, truth: np.ndarray, share: bool = False
) -> dict:
    """Trains, encodes and decodes; times each and compares with the truth, `(n_queries, 100)`."""
    started = time.perf_counter()
    quantizer.train(train)
    trained = time.perf_counter()
    codes = quantizer.encode(data.database)
    encoded = time.perf_counter()
    restored = np.ascontiguousarray(quantizer.decode(codes), np.float32)
    decoded = time.perf_counter()
    norms = np.linalg.norm(restored, axis=1)
    products = np.einsum("nd,nd->n", data.database, restored)
    cosines = products / np.maximum(np.linalg.norm(data.database, axis=1) * norms, 1e-12)
    depth = truth.shape[1]
    row = {
        "bits": quantizer.code_bits,
        "codebook_bytes": quantizer.codebook_bytes,
        "mse": squared_error(data.database, restored),
        "cosine": float(cosines.mean()),
        **ranking(truth, nearest_neighbors(data.queries, restored, depth)),
        "train_seconds": round(trained - started, 1),
        "encode_per_second": round(len(codes) / (encoded - trained)),
        "decode_per_second": round(len(codes) / (decoded - encoded)),
        "threads": {"torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads()},
        "faiss_gpus": faiss.get_num_gpus(),
    }
    if data.unit_norm:
        renormalised = restored / np.maximum(norms, 1e-12)[:, None]
        row["recall_10_at_10_renormalised"] = recalls(truth, nearest_neighbors(data.queries, renormalised, 10))[2]
    if isinstance(quantizer, Searcher):
        row["recall_10_at_10_own_search"] = recalls(truth, quantizer.search(data.queries, codes, 10))[2]
    if share and isinstance(quantizer, Ours):
        row |= quantizer.experts_share(data.train, data.database, codes) or {}
    if isinstance(quantizer, FamilyMember):
        row["epochs"] = round(quantizer.epochs, 2)
    return row


def run(cells: list[Cell], data: EmbeddingSet, arguments: argparse.Namespace) -> list[str]:
    """Measures the cells that are missing, and gives the names of those that failed."""
    file = f"quality-{data.name}"
    results = environment.load(file)
    results |= {"environment": environment.describe(), "set": data.name, "description": data.description}
    results |= {"database": len(data.database), "queries": len(data.queries), "unit_norm": data.unit_norm}
    measured = results.setdefault("cells", {})
    tasks = text_tasks.open_tasks(data.name, arguments.root, arguments.encoder) if arguments.tasks else None
    truth, failed = nearest_neighbors(data.queries, data.database, min(DEPTH, len(data.database))), []
    for number, cell in enumerate(cells, 1):
        label = cell.method if cell.size is None else f"{cell.method}, {cell.size} bytes"
        try:
            quantizer, identity = prepare(cell, data, arguments.minutes)
            key = key_of(identity)
            known = measured.get(key, {})
            if quantizer is None or (known and not arguments.again and (tasks is None or "tasks" in known)):
                continue
            print(f"[{number}/{len(cells)}] {label}", flush=True)
            row = identity | measure(
                quantizer, data.train[: identity["training_vectors"]], data, truth, arguments.share
            )
            if tasks is not None:
                row["tasks"] = text_tasks.measure(quantizer, tasks)
        except Exception:  # hours of other cells must not be lost
            traceback.print_exc()
            failed.append(label)
            continue
        if isinstance(quantizer, Ours):
            refresh_card(quantizer, data)
        measured[key] = row | {name: results["environment"][name] for name in ("date", "processor", "cores", "gpu")}
        found = environment.load(file).get("cells", {})  # another run may have added cells meanwhile
        environment.save(file, results | {"cells": found | {key: measured[key]}})
        short = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
        print(f"[{number}/{len(cells)}] {label}: {short}, {row['train_seconds']} s of training", flush=True)
        del quantizer
        gc.collect()
    return failed


def refresh_card(quantizer: Ours, data: EmbeddingSet) -> None:
    """Measures a bundled quantizer for its card, and for the fit checks that compare with it."""
    folder = bundled_quantizers().get(quantizer.source.name)
    if folder == quantizer.source and quantizer.codes == quantizer.model.config.num_codebooks:
        vectors = np.concatenate([data.queries, data.database])
        write_text(folder / RECORD_FILE, record.measure(quantizer.model, vectors, CARD_TEXTS).to_json())


def main() -> None:
    """Reads the arguments and runs the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(SETS), default="minilm-384")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--methods", nargs="*", default=[*REFERENCES, *RIVALS], help="default: all rivals")
    parser.add_argument("--bytes", nargs="*", type=int, default=list(BYTES))
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME[:CODES]", help="trained quantizers")
    parser.add_argument("--limit", type=int, help="use only the first so many training vectors")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time of qinco and official")
    parser.add_argument("--share", action="store_true", help="also what experts of ours earn over the best tables")
    parser.add_argument("--tasks", action="store_true", help="also measure similarity and retrieval of texts")
    parser.add_argument("--encoder", help="folder or Hub id of the set's encoder, for --tasks")
    parser.add_argument("--again", action="store_true", help="measure what is in the results file too")
    arguments = parser.parse_args()
    cells = list_cells(arguments.methods, arguments.bytes, arguments.ours)
    failed = run(cells, load(arguments.set, arguments.root, arguments.limit), arguments)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
