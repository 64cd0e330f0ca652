"""Writes the tables of README.md, and the model cards with their evaluations, from the results files.

    python benchmarks/tables.py [--check]

Each table stands between the comments `<!-- table: name -->` and `<!-- end -->`. `--check` changes nothing and fails
if a table is not up to date.
"""

import argparse
import re
import sys
from pathlib import Path

import environment

from rqmoe_hf.bundled import bundled_quantizers, load_quantizer
from rqmoe_hf.hub.cards import eval_results_files, load_training, render_card
from rqmoe_hf.record import RECORD_FILE, EvaluationRecord
from rqmoe_hf.saving import write_text

ROOT = Path(__file__).parent.parent
FLOAT_BYTES = 4 * 384


def summary() -> str:
    """README's first table: bytes, memory and recall beside the uncompressed vectors."""
    results = environment.load("quality")["methods"]
    ours = [row for name, row in results.items() if name.endswith("beam 4")]
    rows = [("float32", FLOAT_BYTES, 1.0, 1.0)]
    for row in sorted(ours, key=lambda row: -row["bytes_per_vector"]):
        rows.append(("rqmoe_hf", row["bytes_per_vector"], row["recall_10_at_10"], row["recall_at_1_10"]))
    for name in ("RQ16x8, beam 5", "LSQ8x8", "RQ8x8, beam 5", "PQ8x8"):
        row = results[name]
        rows.append((f"Faiss {name}", row["bytes_per_vector"], row["recall_10_at_10"], row["recall_at_1_10"]))
    lines = ["| | bytes per vector | 10 million vectors | recall@10 | R@10 |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, size, recall, first in rows:
        memory = f"{size * 1e7 / 1e9:.1f} GB" if size > 100 else f"{size * 1e7 / 1e6:.0f} MB"
        lines.append(f"| {name} | {size:,} | {memory} | {recall:.3f} | {first:.3f} |")
    return "\n".join(lines)


def quality() -> str:
    """All methods: error and recall."""
    results = environment.load("quality")["methods"]
    lines = [
        "| method | bytes | MSE | R@1 | R@10 | recall@10 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in sorted(results.items(), key=lambda item: (item[1]["bytes_per_vector"] > 8, -item[1]["mse"])):
        subset = f" (trained on {row['training_vectors']:,})" if name.startswith("LSQ") else ""
        lines.append(
            f"| {name}{subset} | {row['bytes_per_vector']} | {row['mse']:.3f} | {row['recall_at_1_1']:.3f} | "
            f"{row['recall_at_1_10']:.3f} | {row['recall_10_at_10']:.3f} |"
        )
    return "\n".join(lines)


def engine() -> str:
    """Ratios of the engine to the algorithm as published."""
    results = environment.load("engine")
    lines = [
        "| setting | encode float32 | encode bfloat16 | search (16, 8) | its MSE | decode float32 | decode bfloat16 | "
        "training |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results["settings"].items():
        ratio = row["ratios"]
        lines.append(
            f"| {name} | {ratio['encode_float32']:.0f}x | {ratio['encode_bfloat16']:.0f}x | "
            f"{ratio['beam_16_8_speed']:.1f}x | {100 * ratio['beam_16_8_mse']:+.1f} % | "
            f"{ratio['decode_float32']:.1f}x | {ratio['decode_bfloat16']:.1f}x | {ratio['training']:.0f}x |"
        )
    return "\n".join(lines)


def qinco() -> str:
    """Decoding speed and error over QINCo's."""
    lines = ["| setting | decode float32 | decode bfloat16 | MSE |", "| --- | ---: | ---: | ---: |"]
    for name, row in environment.load("engine")["over_qinco"].items():
        lines.append(
            f"| {name} | {row['decode_float32']:.1f}x | {row['decode_bfloat16']:.1f}x | {100 * row['mse']:+.1f} % |"
        )
    return "\n".join(lines)


def tasks() -> str:
    """What similarity and retrieval keep."""
    results = environment.load("tasks")["rows"]
    lines = [
        "| | bytes | compressed | STS Spearman | known-item nDCG@10 | accuracy@1 |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, row in sorted(results.items(), key=lambda item: (-item[1]["bytes_per_vector"], item[0])):
        sides = {None: "nothing", True: "documents", False: "both sides"}[row.get("asymmetric")]
        lines.append(
            f"| {row.get('quantizer', name)} | {row['bytes_per_vector']:,} | {sides} | {row['sts_spearman']:.1f} | "
            f"{row['known_item_ndcg_at_10']:.3f} | {row['known_item_accuracy_at_1']:.3f} |"
        )
    return "\n".join(lines)


def module() -> str:
    """What the sentence-transformers module costs."""
    results = environment.load("module")
    ways = [way for way in next(iter(results["batch_sizes"].values())) if way != "encoder alone"]
    lines = [f"| batch size | encoder alone | {' | '.join(ways)} |", f"| ---: |{' ---: |' * (len(ways) + 1)}"]
    for size, row in results["batch_sizes"].items():
        alone = f"{row['encoder alone']['texts_per_second']:.0f} texts/s"
        added = [f"{100 * row[way]['over_encoder']:+.1f} %" for way in ways]
        lines.append(f"| {size} | {alone} | {' | '.join(added)} |")
    return "\n".join(lines)


def fit() -> str:
    """The bundled quantizer on texts it was not made for."""
    ways = ("as bundled", "fine-tuned", "trained anew")
    lines = [
        "| texts | error / card's | bits per code below | verdict | MSE as bundled | fine-tuned | trained anew |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, row in environment.load("fit")["collections"].items():
        found = row["fit"]
        errors = [f"{row[way]['mse']:.3f}" if way in row else "too few" for way in ways]
        lines.append(
            f"| {name} ({row['texts']:,}) | {found['mse'][0] / found['mse'][1]:.2f} | "
            f"{found['code_entropy'][1] - found['code_entropy'][0]:.1f} | {found['verdict']} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def refresh_record(name: str, file: Path) -> str:
    """The evaluation of a bundled quantizer with the comparisons that the results files hold."""
    record = EvaluationRecord.from_json(file.read_text("utf-8"))
    kept = ("bytes_per_vector", "mse", "recall_at_1_1", "recall_at_1_10", "recall_10_at_10")
    record.comparison = []
    for label, row in environment.load("quality")["methods"].items():
        if label.startswith(name) and not label.endswith("beam 4"):
            continue
        vectors = row.get("training_vectors")
        note = f" (trained on {vectors:,})" if vectors and vectors < environment.load("quality")["train"] else ""
        record.comparison.append({"method": f"{label}{note}", **{key: row[key] for key in kept}})
    record.comparison.sort(key=lambda row: (row["bytes_per_vector"] > 8, -row["mse"]))
    results = environment.load("tasks")["rows"]
    record.preserved = []
    for row in results.values():
        if row.get("quantizer") != name:
            continue
        sides = "queries exact" if row["asymmetric"] else "both sides compressed"
        for key, task, metric in (
            ("sts_spearman", "STS Benchmark", "Spearman"),
            ("known_item_ndcg_at_10", "known-item retrieval", "nDCG@10"),
        ):
            scale = 100 if key == "sts_spearman" else 1
            entry = {"task": f"{task}, {sides}", "metric": metric, "bytes_per_vector": row["bytes_per_vector"],
                     "value": row[key] / scale, "uncompressed": results["uncompressed"][key] / scale}  # fmt: skip
            if key == "sts_spearman" and not row["asymmetric"]:
                entry |= {"dataset_id": "mteb/stsbenchmark-sts", "task_id": "default"}
            record.preserved.append(entry)
    return record.to_json()


def machine() -> str:
    """One line on where and when the figures were measured."""
    where = environment.load("quality")["environment"]
    return (
        f"Measured on {where['date']} on two cores of {where['processor']}"
        f"{' with bfloat16 instructions' if where['bf16_instructions'] else ''}, torch {where['torch']}, "
        f"faiss {where['faiss']}."
    )


TABLES = {table.__name__: table for table in (summary, quality, engine, qinco, tasks, module, fit, machine)}


def fill(text: str) -> str:
    """Puts every table between its comments."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Writes, or checks, all files with tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = {ROOT / "README.md": fill((ROOT / "README.md").read_text("utf-8"))}
    for name, folder in bundled_quantizers().items():
        text = refresh_record(name, folder / RECORD_FILE)
        record, model = EvaluationRecord.from_json(text), load_quantizer(name)
        wanted |= {folder / path: content for path, content in eval_results_files(record).items()}
        wanted[folder / RECORD_FILE] = text
        wanted[folder / "README.md"] = str(render_card(model, name, record, load_training(folder)))
    for file, text in wanted.items():
        if check and (not file.is_file() or file.read_text("utf-8") != text):
            sys.exit(f"{file.relative_to(ROOT)} is not up to date: run `make tables`.")
        if not check:
            file.parent.mkdir(exist_ok=True)
            write_text(file, text)


if __name__ == "__main__":
    main()
