"""Speed of the engine against the algorithm as published, on trained weights, in one run.

    python benchmarks/engine.py
    python benchmarks/engine.py --device cuda --settings "d=384, 8x256" "QINCo, d=384, 8x256, 16 layers"

Each setting is trained on 44,000 vectors for five epochs, or on more for two where these are too few for it, then
encoded and decoded by the engine in float32 and bfloat16 and by `plain.py`, which evaluates all codewords with all
experts. The 768-dimensional vectors are those pixels of Fashion-MNIST that vary most. Run it on a quiet machine: every
figure is a median, and only ratios within the run count. On a GPU there are more vectors, so that it has enough to do,
and the results are another file's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import environment
import numpy as np
import torch
from plain import PlainRQMoE
from sets import load
from timing import clock, median_seconds

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.training import RQMoETrainer, RQMoETrainingArguments, initialize

BASE = {"num_experts": 2, "num_expert_layers": 1, "intermediate_size": 256, "num_candidates": 2, "beam_size": 2}
SETTINGS = {
    "d=384, 8x256": RQMoEConfig(**BASE),
    "d=384, 8x256, 2 layers": RQMoEConfig(**{**BASE, "num_expert_layers": 2}),
    "d=384, 6x1024": RQMoEConfig(**BASE, num_codebooks=6, codebook_size=1024),
    "d=384, 5x4096": RQMoEConfig(**BASE, num_codebooks=5, codebook_size=4096),
    "d=768, 8x256": RQMoEConfig(**BASE, hidden_size=768),
    "QINCo, d=384, 8x256, 16 layers": RQMoEConfig.qinco(
        num_expert_layers=16, intermediate_size=256, num_candidates=2, beam_size=1
    ),
}
TRAINING = 44_000, 5.0  # vectors, and epochs
MORE_TRAINING = {  # 44,000 vectors are eleven for each of 4,096 codewords, of which greedy codes and a beam lose alike
    "d=384, 5x4096": (262_144, 2.0),
}
SETS = {384: "minilm-384", 768: "fashion-mnist-784"}  # by dimension of a setting
ERROR_VECTORS = 1_024  # held out, the same in every setting of one dimension, so that their errors compare
TEST_VECTORS = {"cpu": 8_192, "cuda": 65_536}  # a test set with fewer is repeated
PLAIN_CODEWORDS = {"cpu": 65_536, "cuda": 1 << 20}  # evaluated by the plain algorithm in one call
BATCH_SIZES = {"cpu": 512, "cuda": 1_024}  # of the training
CPU_VECTORS = 2_000  # whose codes on the GPU are compared with those on the processor


def train(
    config: RQMoEConfig, vectors: np.ndarray, epochs: float, folder: Path, device: str
) -> tuple[RQMoEModel, float]:
    """Initialises and trains one setting; returns the model and the vectors per second of the training itself."""
    model = initialize(RQMoEModel(config), vectors, sample_size=20_000, beam_size=1)
    args = RQMoETrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZES[device],
        learning_rate=2e-3,
        bf16=True,
        use_cpu=device == "cpu",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    start = time.perf_counter()
    RQMoETrainer(model=model, args=args, train_dataset=load_embeddings(vectors)).train()
    return model.eval(), len(vectors) * epochs / (time.perf_counter() - start)


def data(size: int, count: int, test_count: int, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a dimension to train with and held-out ones, of which a set with fewer is repeated."""
    vectors = load(SETS[size], root)
    kept = np.sort(np.argsort(-vectors.train.var(axis=0), kind="stable")[:size])
    held_out = np.concatenate([vectors.validation, vectors.queries, vectors.database])[:, kept]
    return vectors.train[:count, kept], np.resize(held_out, (test_count, size))


def plain_training_rate(model: RQMoEModel, plain: PlainRQMoE, batch: torch.Tensor) -> float:
    """Vectors per second of a training step as published: encode without shortcuts, then one gradient pass."""
    start = clock(batch.device)
    with torch.no_grad():
        codes, _ = plain.encode(batch)
    partial = model.contributions(codes).cumsum(dim=1)
    target = model._standardize(batch)
    model._loss(target, (target[:, None] - partial).square().sum(-1)).backward()
    model.zero_grad()
    return len(batch) / (clock(batch.device) - start)


def mse(vectors: torch.Tensor, restored: torch.Tensor) -> float:
    """Squared error, summed over dimensions, averaged over vectors."""
    return float((vectors - restored).square().sum(dim=1).mean())


def measure(model: RQMoEModel, vectors: torch.Tensor, training_rate: float) -> dict:
    """All figures of one setting."""
    config, plain, device = model.config, PlainRQMoE(model), vectors.device
    most = PLAIN_CODEWORDS[device.type]
    few = vectors[: max(8, min(most // 512, most // (config.codebook_size * config.num_expert_layers)))]
    with torch.no_grad():
        plain_rate = len(few) / median_seconds(lambda: plain.encode(few), 3, device)
        same = float((plain.encode(few)[0] == model.encode(few, exact=True, beam_size=1).codes).float().mean())
    some = vectors[:ERROR_VECTORS]
    exact = model.encode(some, exact=True, beam_size=1)
    row = {
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "plain": {"encode_per_second": plain_rate, "mse": mse(some, exact.reconstruction)},
        "codes_equal_to_plain": same,
        "plain_training_per_second": plain_training_rate(model, plain, few),
        "training_per_second": training_rate,
        "searches": [],
    }
    with torch.no_grad():
        codes = model.encode(vectors, num_candidates=2, beam_size=1).codes
        row["plain"]["decode_per_second"] = len(codes) / median_seconds(lambda: plain.decode(codes), device=device)
    half = RQMoEModel(config).to(device).eval()
    half.load_state_dict(model.state_dict())
    half.experts.to(torch.bfloat16)
    if half.instructions is not None:
        half.instructions.data = half.instructions.data.to(torch.bfloat16)
    for dtype, engine in (("float32", model), ("bfloat16", half)):
        row[f"decode_per_second_{dtype}"] = len(codes) / median_seconds(
            lambda engine=engine: engine.decode(codes), device=device
        )
        for candidates, beam in ((1, 1), (2, 1), (4, 1), (2, 4), (1, 8), (2, 8), (16, 8)):
            part = vectors[: max(512, len(vectors) // (candidates * beam))]
            search = {"num_candidates": candidates, "beam_size": beam}
            seconds = median_seconds(lambda e=engine, p=part, s=search: e.encode(p, **s), 3, device)
            found = mse(some, engine.encode(some, **search).reconstruction)
            row["searches"].append({"dtype": dtype, **search, "encode_per_second": len(part) / seconds, "mse": found})
    if device.type != "cpu":
        some = vectors[:CPU_VECTORS]
        found, same = model.encode(some).codes.cpu(), model.cpu().encode(some.cpu()).codes
        row["codes_equal_to_cpu"] = float((found == same).float().mean())
    return row


def summarize(row: dict) -> dict:
    """The ratios that the engine is judged by."""
    plain, searches = row["plain"], row["searches"]

    def fastest(dtype: str, limit: float) -> float:
        rates = [s["encode_per_second"] for s in searches if s["dtype"] == dtype and s["mse"] <= limit * plain["mse"]]
        return max(rates, default=float("nan")) / plain["encode_per_second"]

    wide = next(s for s in searches if (s["dtype"], s["num_candidates"], s["beam_size"]) == ("bfloat16", 16, 8))
    return {
        "encode_float32": fastest("float32", 1.005),
        "encode_bfloat16": fastest("bfloat16", 1.005),
        "beam_16_8_speed": wide["encode_per_second"] / plain["encode_per_second"],
        "beam_16_8_mse": wide["mse"] / plain["mse"] - 1,
        "encode_bfloat16_at_3_percent_lower_mse": fastest("bfloat16", 0.97),
        "decode_float32": row["decode_per_second_float32"] / plain["decode_per_second"],
        "decode_bfloat16": row["decode_per_second_bfloat16"] / plain["decode_per_second"],
        "training": row["training_per_second"] / row["plain_training_per_second"],
    }


def compare_with_qinco(settings: dict[str, dict]) -> dict[str, dict]:
    """Decoding speed and lowest error of each setting of 60 to 64 bits, over those of QINCo in the same dtype."""
    qinco = next((row for name, row in settings.items() if name.startswith("QINCo")), None)
    if qinco is None:
        return {}
    lowest = {name: min(search["mse"] for search in row["searches"]) for name, row in settings.items()}
    return {
        name: {
            "decode_float32": row["decode_per_second_float32"] / qinco["decode_per_second_float32"],
            "decode_bfloat16": row["decode_per_second_bfloat16"] / qinco["decode_per_second_bfloat16"],
            "mse": lowest[name] / min(search["mse"] for search in qinco["searches"]) - 1,
        }
        for name, row in settings.items()
        if row is not qinco and "d=384" in name
    }


def main() -> None:
    """Trains and measures the settings; writes results/engine.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--device", choices=list(TEST_VECTORS), default="cpu")
    arguments = parser.parse_args()
    file = "engine" if arguments.device == "cpu" else f"engine-{arguments.device}"
    results = environment.load(file) | {"environment": environment.describe()}
    print(f"{torch.get_num_threads()} threads", flush=True)
    for name in arguments.settings:
        config, (count, epochs) = SETTINGS[name], MORE_TRAINING.get(name, TRAINING)
        vectors, held_out = data(config.hidden_size, count, TEST_VECTORS[arguments.device], arguments.root)
        with tempfile.TemporaryDirectory() as folder:
            model, rate = train(config, vectors, epochs, Path(folder), arguments.device)
        row = measure(model, torch.from_numpy(held_out).to(arguments.device), rate)
        row |= {"training_vectors": len(vectors), "epochs": epochs, "date": results["environment"]["date"]}
        row["ratios"] = summarize(row)
        results.setdefault("settings", {})[name] = row
        results["over_qinco"] = compare_with_qinco(results["settings"])
        print(name, row["ratios"], flush=True)
        environment.save(file, results)


if __name__ == "__main__":
    main()
