"""Writes the tables of all documents, and the model cards with their evaluations, from the results files.

    python benchmarks/tables.py [--check]

Each table stands between the comments `<!-- table: name -->` and `<!-- end -->`. `--check` changes nothing and fails
if a table is not up to date.
"""

import argparse
import re
import sys
from pathlib import Path

import environment
from rivals.tables import SUMMARY, cells, curve, curve_wordllama, everything, floor, on_gpu, summary, tasks
from scaling.tables import costs, forecast, peaks, peaks_50_gb, workers
from sets import SETS

from rqmoe_hf.bundled import bundled_quantizers, load_quantizer
from rqmoe_hf.codes import describe_sizes
from rqmoe_hf.hub.cards import eval_results_files, load_training, render_card
from rqmoe_hf.record import RECORD_FILE, EvaluationRecord
from rqmoe_hf.saving import write_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "benchmarks/RESULTS.md", "benchmarks/LEVERS.md", "docs/scaling.md", "docs/speed.md")
SEARCH_RECALL = 0.5


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


def engine_cuda() -> str:
    """Vectors per second on a GPU, and over the algorithm as published there."""
    lines = [
        "| setting | encoded/s, greedy | over published | encoded/s, (1, 8) | its MSE | decoded/s | over published |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in environment.load("engine-cuda").get("settings", {}).items():
        plain, ratio = row["plain"], row["ratios"]
        wanted = {"dtype": "bfloat16", "num_candidates": 1, "beam_size": 8}
        wide = next(search for search in row["searches"] if wanted.items() <= search.items())
        lines.append(
            f"| {name} | {ratio['encode_bfloat16'] * plain['encode_per_second']:,.0f} | "
            f"{ratio['encode_bfloat16']:.0f}x | {wide['encode_per_second']:,.0f} | "
            f"{100 * (wide['mse'] / plain['mse'] - 1):+.1f} % | {row['decode_per_second_bfloat16']:,.0f} | "
            f"{ratio['decode_bfloat16']:.1f}x |"
        )
    return "\n".join(lines)


def additive_cuda() -> str:
    """Training and encoding of additive quantizers on a GPU, beside the processor's."""
    lines = [
        "| set | bytes | trained on | training | encoded/s | decoded/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("minilm-384", "mpnet-768", "wordllama-256"):
        for cell in environment.load(f"quality-{name}").get("cells", {}).values():
            if cell["method"] == "ours, additive x10" and on_gpu(cell):
                lines.append(
                    f"| {name} | {cell['bytes']} | {cell['training_vectors']:,} | {cell['train_seconds']:.0f} s | "
                    f"{cell['encode_per_second']:,} | {cell['decode_per_second']:,} |"
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


def encoding() -> str:
    """What a vector's codes cost on a processor, with and without Numba."""
    quantizers = environment.load("encoding")["quantizers"]
    batches = next(iter(quantizers.values()))["seconds_per_vector"]["numba"]
    lines = [
        f"| milliseconds per vector, among | {' | '.join(f'{int(batch):,}' for batch in batches)} |",
        f"| --- |{' ---: |' * len(batches)}",
    ]
    for name, row in quantizers.items():
        for kind, label in (("numba", "with Numba"), ("torch", "without")):
            times = [f"{1e3 * seconds:.1f}" for seconds in row["seconds_per_vector"][kind].values()]
            lines.append(f"| `{name}`, {label} | {' | '.join(times)} |")
    return "\n".join(lines)


def searches() -> str:
    """Error and time of beams and rounds of local search."""
    lines = ["| quantizer | beam | rounds | MSE | ms per vector |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in environment.load("encoding")["quantizers"].items():
        for found in row["searches"]:
            lines.append(
                f"| {name} | {found['beam_size']} | {found['local_search']} | {found['mse']:.4f} | "
                f"{1e3 * found['seconds_per_vector']:.2f} |"
            )
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
    kept = ("mse", "recall_at_1_1", "recall_at_1_10", "recall_10_at_10")
    measured = cells("-".join(name.split("-")[:2]))
    own = [cell for cell in measured if cell["method"].startswith(f"ours:{name}:")]
    sizes = {cell["bytes"] for cell in own}
    record.comparison = [
        {"method": _method(cell), "bytes_per_vector": cell["bytes"], **{key: cell[key] for key in kept}}
        for cell in measured
        if cell in own or (cell["bytes"] in sizes and cell["method"] in SUMMARY)
    ]
    exact = next(cell["tasks"] for cell in measured if cell["method"] == "float32")
    record.preserved = []
    for cell in own:
        for side, sides in (("asymmetric", "queries exact"), ("symmetric", "both sides compressed")):
            for key, task, metric, scale in (
                ("sts_spearman", "STS Benchmark", "Spearman", 100),
                ("known_item_ndcg_at_10", "known-item retrieval", "nDCG@10", 1),
                ("package_ndcg_at_10", "package retrieval", "nDCG@10", 1),
            ):
                if f"{key}_{side}" not in cell["tasks"]:
                    continue
                values = {
                    "value": cell["tasks"][f"{key}_{side}"] / scale,
                    "uncompressed": exact[f"{key}_{side}"] / scale,
                }
                entry = {"task": f"{task}, {sides}", "metric": metric, "bytes_per_vector": cell["bytes"], **values}
                if key == "sts_spearman" and side == "symmetric":
                    entry |= {"dataset_id": "mteb/stsbenchmark-sts", "task_id": "default"}
                record.preserved.append(entry)
    return record.to_json()


def _method(cell: dict) -> str:
    """A method and, for what was trained in the benchmark, on how many vectors."""
    if cell["method"].startswith("ours:"):
        _, name, codes = cell["method"].split(":")
        return f"{name}, {codes} codes"
    return f"{cell['method']} (trained on {cell['training_vectors']:,})"


def bundled() -> str:
    """The quantizers that come with the package."""
    lines = [
        "| name | kind | bytes | MSE | R@1 | recall@10 | encoded/s | decoded/s | weights |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, folder in bundled_quantizers().items():
        record = EvaluationRecord.from_json((folder / RECORD_FILE).read_text("utf-8"))
        config, whole = load_quantizer(name).config, record.whole
        kind = f"RQ-MoE, {describe_sizes(config.num_codebooks, config.code_sizes)}"
        if not config.has_experts:
            kind = kind.replace("RQ-MoE", "LSQ")
        lines.append(
            f"| `{name}` | {kind} | {whole['bytes_per_vector']} | {whole['mse']:.3f} | {whole['recall_at_1_1']:.3f} | "
            f"{whole['recall_10_at_10']:.3f} | {record.speed['encode_per_second']:,} | "
            f"{record.speed['decode_per_second']:,} | {(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def levers() -> str:
    """What keeps the noise of the training vectors out of the codebooks, and what local search gives."""
    settings = environment.load("levers-minilm-384").get("settings", {})
    rounds = list(next(iter(settings.values()))["searches"]) if settings else []
    lines = [
        f"| | {' | '.join(rounds)} | error of the training vectors | training |",
        f"| --- |{' ---: |' * (len(rounds) + 2)}",
    ]
    for key, row in settings.items():
        errors = " | ".join(f"{row['searches'][number]['mse']:.4f}" for number in rounds)
        lines.append(f"| {key.split(' | ')[0]} | {errors} | {row['train_mse']:.4f} | {row['train_seconds']:.0f} s |")
    return "\n".join(lines)


def experts() -> str:
    """What settings of experts give."""
    lines = ["| | weights | MSE, greedy | MSE, beam of 16 |", "| --- | ---: | ---: | ---: |"]
    for name, row in environment.load("experts-sift-128").get("settings", {}).items():
        lines.append(f"| {name} | {row['weights']:,} | {row['mse']['greedy']:,.0f} | {row['mse']['beam']:,.0f} |")
    return "\n".join(lines)


def search() -> str:
    """Search in embeddings of texts."""
    return search_table("search-minilm-384")


def search_sift() -> str:
    """Search in descriptors of pictures."""
    return search_table("search-sift-128")


def search_table(name: str) -> str:
    """The best recall of every index and, of all that reach a recall, the quickest setting; one thread if not said."""
    results = environment.load(name)
    lines = [
        "| index | bytes | with refinement | memory | best recall@10 | at queries/s | queries/s at recall@10 of "
        f"{SEARCH_RECALL} | with two threads | latency | vectors added/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = []
    for key, built in results.get("builds", {}).items():
        mine = [cell for cell in results["cells"].values() if cell["build"] == key]
        measured = [cell for cell in mine if cell["threads"] == 1]
        if measured:
            total, both = built["stored_bytes"] + built["refinement_bytes"], [c for c in mine if c["threads"] == 2]
            rows.append((total, built, measured, both))
    for total, built, measured, both in sorted(rows, key=lambda row: row[0]):
        best = max(measured, key=lambda cell: (cell["recall_10_at_10"], cell["queries_per_second"]))
        lines.append(
            f"| {search_label(built)} | {built['stored_bytes']:.0f} | {total:,.0f} | "
            f"{built['resident_bytes_all']:.0f} | {best['recall_10_at_10']:.3f} | {best['queries_per_second']:,.0f} | "
            f"{_soonest(measured)} | {_soonest(both)} | {best['latency_ms']:.1f} ms | "
            f"{built['database'] / max(built['add_seconds'], 0.01):,.0f} |"
        )
    return "\n".join(lines)


def _soonest(measured: list[dict]) -> str:
    """Queries per second of the quickest cell that finds enough; nothing if there is none."""
    enough = [cell["queries_per_second"] for cell in measured if cell["recall_10_at_10"] >= SEARCH_RECALL]
    return f"{max(enough):,.0f}" if enough else ""


def search_label(built: dict) -> str:
    """The name of an index; what is ours in bold, and without its number of codes."""
    if not built["method"].startswith("ours"):
        return built["method"]
    name, _, rest = built["method"].removeprefix("ours:").removeprefix("ours, ").partition(", ")
    return f"**{name.rpartition(':')[0] or name}**, {rest}"


def machine() -> str:
    """One line on where and when the figures were measured."""
    where = environment.load("quality-minilm-384")["environment"]
    return (
        f"Measured on {where['date']} on two cores of {where['processor']}"
        f"{' with bfloat16 instructions' if where['bf16_instructions'] else ''}, torch {where['torch']}, "
        f"faiss {where['faiss']}."
    )


TABLES = {
    table.__name__: table
    for table in (
        summary,
        floor,
        curve,
        curve_wordllama,
        engine,
        engine_cuda,
        additive_cuda,
        qinco,
        tasks,
        module,
        encoding,
        searches,
        fit,
        bundled,
        levers,
        experts,
        search,
        search_sift,
        machine,
        costs,
        forecast,
        peaks,
        peaks_50_gb,
        workers,
    )
} | {f"all_{name.replace('-', '_')}": everything(name) for name in SETS}


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
    wanted = {ROOT / name: fill((ROOT / name).read_text("utf-8")) for name in DOCUMENTS}
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
