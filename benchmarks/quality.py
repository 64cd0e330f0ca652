"""Error and recall at equal bytes: the bundled quantizer and Faiss's, trained on the same vectors.

    python benchmarks/quality.py --train data/embeddings/train --test data/embeddings/test

The first 5,000 test vectors chose the bundled quantizer's checkpoint and are left out; of the rest, 1,000 are queries
and the others the database. Methods that are in the results file already are not run again (`--again` does).
"""

import argparse
import time

import environment
import faiss
import numpy as np

from rqmoe_hf import bytes_per_vector
from rqmoe_hf.bundled import bundled_quantizers, load_quantizer
from rqmoe_hf.data import as_array, load_embeddings
from rqmoe_hf.evaluation import evaluate, nearest_neighbors, recalls, split_queries
from rqmoe_hf.record import RECORD_FILE, measure
from rqmoe_hf.saving import write_text

TEXTS = "held-out English passages of dictionaries and Debian's package descriptions"
VALIDATION = 5_000  # evaluation_size of the bundled quantizer's recipe
SUBSETS = {"LSQ8x8": 100_000}  # methods that would take more than two hours on all vectors: on this many
FAISS = {
    "PQ8x8": lambda d: faiss.IndexPQ(d, 8, 8),
    "PQ16x8": lambda d: faiss.IndexPQ(d, 16, 8),
    "RQ8x8, beam 5": lambda d: faiss.IndexResidualQuantizer(d, 8, 8),
    "RQ16x8, beam 5": lambda d: faiss.IndexResidualQuantizer(d, 16, 8),
    "LSQ8x8": lambda d: faiss.IndexLocalSearchQuantizer(d, 8, 8),
}


def measure_faiss(name: str, train: np.ndarray, test: np.ndarray) -> dict:
    """Trains one Faiss quantizer and measures it."""
    index = FAISS[name](train.shape[1])
    if isinstance(index, faiss.IndexResidualQuantizer):
        index.rq.max_beam_size = 5
    vectors = train[: SUBSETS.get(name, len(train))]
    start = time.perf_counter()
    index.train(np.ascontiguousarray(vectors))
    trained = time.perf_counter()
    queries, database = split_queries(test)
    codes = index.sa_encode(np.ascontiguousarray(database))
    encoded = time.perf_counter()
    restored = index.sa_decode(codes)
    truth, found = nearest_neighbors(queries, database, 10), nearest_neighbors(queries, restored, 10)
    return {
        "bytes_per_vector": index.sa_code_size(),
        "training_vectors": len(vectors),
        "mse": float(np.square(database - restored).sum(axis=1).mean()),
        **dict(zip(("recall_at_1_1", "recall_at_1_10", "recall_10_at_10"), recalls(truth, found), strict=True)),
        "train_seconds": round(trained - start, 1),
        "encode_per_second": round(len(database) / (encoded - trained)),
    }


def measure_bundled(name: str, test: np.ndarray, beams: tuple[int, ...]) -> dict[str, dict]:
    """The bundled quantizer at 8 bytes and at full length; shorter codes are encoded as such, not cut."""
    model = load_quantizer(name)
    queries, database = split_queries(test)
    truth = nearest_neighbors(queries, database, 10)
    results = {}
    for steps in (model.config.num_codebooks // 2, model.config.num_codebooks):
        for beam in beams:
            start = time.perf_counter()
            restored = model.decompress(model.compress(database, num_codebooks=steps, beam_size=beam), steps)
            seconds = time.perf_counter() - start
            found = nearest_neighbors(queries, restored, 10)
            results[f"{name}, {steps} codes, beam {beam}"] = {
                "bytes_per_vector": bytes_per_vector(steps, model.config.codebook_size),
                "bits": steps * model.config.bits_per_code,
                "mse": float(np.square(database - restored).sum(axis=1).mean()),
                **dict(
                    zip(("recall_at_1_1", "recall_at_1_10", "recall_10_at_10"), recalls(truth, found), strict=True)
                ),
                "encode_per_second": round(len(database) / seconds),
            }
    cut = evaluate(model, database, queries, [model.config.num_codebooks // 2])[0].as_dict()
    keys = ("bytes_per_vector", "mse", "recall_at_1_1", "recall_at_1_10", "recall_10_at_10")
    results[f"{name}, {cut['num_codebooks']} codes cut from the whole"] = {key: cut[key] for key in keys}
    return results


def main() -> None:
    """Runs what is asked for and writes results/quality.json after every method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="data/embeddings/train")
    parser.add_argument("--test", default="data/embeddings/test")
    parser.add_argument("--methods", nargs="*", default=[*FAISS, "minilm-384"])
    parser.add_argument("--beams", nargs="*", type=int, default=[1, 4, 8, 32])
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    train = as_array(load_embeddings(arguments.train))
    test = as_array(load_embeddings(arguments.test))[VALIDATION:]
    results = environment.load("quality")
    results |= {"environment": environment.describe(), "train": len(train), "test": len(test)}
    methods = results.setdefault("methods", {})
    for name in arguments.methods:
        if any(found.startswith(name) for found in methods) and not arguments.again:
            continue
        measured = (
            {name: measure_faiss(name, train, test)} if name in FAISS else measure_bundled(name, test, arguments.beams)
        )
        methods |= measured
        for label, row in measured.items():
            print(label, row, flush=True)
        environment.save("quality", results)
        if name not in FAISS:  # what the card shows and fit checks compare with
            record = measure(load_quantizer(name), test, TEXTS)
            write_text(bundled_quantizers()[name] / RECORD_FILE, record.to_json())


if __name__ == "__main__":
    main()
