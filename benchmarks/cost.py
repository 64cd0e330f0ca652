"""What each stage costs, how that grows, and whether the exponents predict a setting that they were not fitted to.

    python benchmarks/cost.py --encoder sentence-transformers/all-MiniLM-L6-v2

Each factor is varied by itself; its exponent is the slope of a line through the logarithms. A prediction multiplies
the base by the powers of all factors. Run it on a quiet machine. Results go to results/cost.json and
results/cost.svg; the tables of docs/scaling.md are made from them (`make tables`).
"""

import argparse

import environment
import faiss
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from scaling import MEMORIES, STAGES, Stage
from scaling.memory import measure as measure_memory
from scaling.tables import predict
from timing import median_seconds

from rqmoe_hf.data.batches import encode_batches, load_encoder
from rqmoe_hf.demo import collect_documentation

TEXTS, BATCH_SIZE = 2_048, 64


def exponent(values: list[float], taken: list[float]) -> float:
    """The power with which a cost grows: the slope of its logarithm."""
    return float(np.polyfit(np.log(values), np.log(taken), 1)[0])


def measure(stage: Stage) -> dict:
    """Base, points and exponents of a stage, and the held-out setting beside its prediction."""
    row: dict = {"unit": stage.unit, "base": stage.base, "seconds": stage.measure(stage.base), "points": {}}
    for factor, values in stage.factors.items():
        taken = [
            row["seconds"] if value == stage.base[factor] else stage.measure({**stage.base, factor: value})
            for value in values
        ]
        row["points"][factor] = dict(zip(map(str, values), taken, strict=True))
    row["exponents"] = {
        factor: exponent([float(value) for value in points], list(points.values()))
        for factor, points in row["points"].items()
    }
    predicted, measured = predict(row, stage.held_out), stage.measure(stage.held_out)
    row["held_out"] = {"setting": stage.held_out, "predicted": predicted, "measured": measured}
    return row


def embed(encoder: str) -> dict:
    """Seconds for a text of Python's documentation, cut off where the encoder does; also by sentence-transformers."""
    texts = collect_documentation()[1][:TEXTS]
    model = load_encoder(encoder, "bfloat16")
    ways = {
        "seconds": lambda: encode_batches(model, texts, BATCH_SIZE),
        "seconds_by_sentence_transformers": lambda: model.encode(texts, batch_size=BATCH_SIZE),
    }
    taken = {name: median_seconds(way, repeats=3) / len(texts) for name, way in ways.items()}
    words = float(np.mean([len(text.split()) for text in texts]))
    return {"unit": "text", **taken, "words": round(words, 1), "dtype": "bfloat16"}


def draw(stages: dict[str, dict]) -> None:
    """One panel for each stage: cost against each factor, both in units of the base."""
    matplotlib.rcParams["svg.hashsalt"] = "cost"
    shown = {name: row for name, row in stages.items() if row.get("points")}
    figure, panels = pyplot.subplots(2, -(-len(shown) // 2), figsize=(15, 7), layout="constrained", sharey=True)
    for panel in panels.flat[len(shown) :]:
        panel.remove()
    for panel, (name, row) in zip(panels.flat, shown.items(), strict=False):
        for factor, points in row["points"].items():
            across = [float(value) / row["base"][factor] for value in points]
            up = [taken / row["seconds"] for taken in points.values()]
            panel.plot(across, up, marker="o", label=f"{factor}  {row['exponents'][factor]:.2f}")
        panel.set(title=name, xscale="log", yscale="log", xlabel="factor over its base", ylabel="cost over the base's")
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(environment.RESULTS / "cost.svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Measures everything, and writes the results after each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--stages", nargs="*", help="beginnings of names, or embed; default all, and memory")
    arguments = parser.parse_args()
    results = environment.load("cost") | {"environment": environment.describe()}
    results["threads"] = {"torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads()}
    found = results.setdefault("stages", {})
    for stage in STAGES:
        if arguments.stages is None or any(stage.name.startswith(name) for name in arguments.stages):
            found[stage.name] = measure(stage)
            held_out = found[stage.name]["held_out"]
            print(f"{stage.name}: {found[stage.name]['seconds'] * 1e6:.1f} us, held out predicted / measured "
                  f"{held_out['predicted'] / held_out['measured']:.2f}", flush=True)  # fmt: skip
            environment.save("cost", results)
    if arguments.stages is None or "embed" in arguments.stages:
        found["embed"] = embed(arguments.encoder)
    if arguments.stages is None:
        results["memory"] = {
            memory.name: {
                "formula": memory.formula,
                "setting": memory.setting,
                "predicted": memory.predicted(memory.setting),
                "measured": measure_memory(number),
            }
            for number, memory in enumerate(MEMORIES)
        }
    environment.save("cost", results)
    draw(found)


if __name__ == "__main__":
    main()
