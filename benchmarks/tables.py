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
from scaling.tables import costs, forecast, peaks, workers

from rqmoe_hf.bundled import bundled_quantizers, load_quantizer
from rqmoe_hf.codes import describe_sizes
from rqmoe_hf.hub.cards import eval_results_files, load_training, render_card
from rqmoe_hf.record import RECORD_FILE, EvaluationRecord
from rqmoe_hf.saving import write_text

ROOT = Path(__file__).parent.parent
FLOAT_BYTES = 4 * 384
SEARCH_RECALL = 0.5
COMPARED = 100_000  # training vectors of the methods that are trained in the benchmark


def cells(name: str) -> list[dict]:
    """The cells of a set that are compared, larger errors first: trained on 100,000 vectors, or finished."""
    best: dict[tuple, dict] = {}
    for cell in environment.load(f"quality-{name}").get("cells", {}).values():
        if cell["method"].startswith("ours:") or cell["training_vectors"] in (None, COMPARED):
            best[cell["method"], cell["bytes"]] = cell
    return sorted(best.values(), key=lambda cell: (cell["bytes"], -cell["mse"]))


def label(cell: dict) -> str:
    """The name of a method as tables show it; what is ours in bold."""
    if not cell["method"].startswith("ours"):
        return cell["method"]
    if not cell["method"].startswith("ours:"):
        return f"**{cell['method'].removeprefix('ours, ')}** (ours)"
    _, name, codes = cell["method"].split(":")
    return f"**{name}**, {codes} codes"


def summary() -> str:
    """README's first table: bytes, memory and recall beside the uncompressed vectors."""
    lines = ["| | bytes per vector | 10 million vectors | recall@10 | R@10 |", "| --- | ---: | ---: | ---: | ---: |"]
    lines.append(f"| float32 | {FLOAT_BYTES:,} | {FLOAT_BYTES / 100:.1f} GB | 1.000 | 1.000 |")
    shown = ("PQ", "OPQ", "RQ, beam 5", "LSQ", "LSQ x10")
    for cell in sorted(cells("minilm-384"), key=lambda cell: (-cell["bytes"], -cell["recall_10_at_10"])):
        if cell["bytes"] <= 32 and (cell["method"].startswith("ours:minilm-384") or cell["method"] in shown):
            lines.append(
                f"| {label(cell)} | {cell['bytes']} | {cell['bytes'] * 10:.0f} MB | {cell['recall_10_at_10']:.3f} | "
                f"{cell['recall_at_1_10']:.3f} |"
            )
    return "\n".join(lines)


def quality() -> str:
    """All methods on the embeddings of all-MiniLM-L6-v2."""
    return quality_table("minilm-384")


def quality_mpnet() -> str:
    """All methods on the embeddings of all-mpnet-base-v2."""
    return quality_table("mpnet-768")


def quality_wordllama() -> str:
    """All methods on the embeddings of WordLlama."""
    return quality_table("wordllama-256")


def quality_sift() -> str:
    """All methods on SIFT descriptors."""
    return quality_table("sift-128")


def quality_table(name: str) -> str:
    """Error, recall and, where it was measured, retrieval."""
    found = cells(name)
    columns = {
        "bytes": lambda cell: f"{cell['bytes']:,}",
        "trained on": lambda cell: f"{cell['training_vectors'] or 0:,}",
        "MSE": lambda cell: f"{cell['mse']:.3f}" if cell["mse"] < 10 else f"{cell['mse']:,.0f}",
        "R@1": lambda cell: f"{cell['recall_at_1_1']:.3f}",
        "R@10": lambda cell: f"{cell['recall_at_1_10']:.3f}",
        "recall@10": lambda cell: f"{cell['recall_10_at_10']:.3f}",
        "at norm 1": lambda cell: f"{cell['recall_10_at_10_renormalised']:.3f}",
        "nDCG@10": lambda cell: f"{cell['tasks']['known_item_ndcg_at_10_asymmetric']:.3f}" if "tasks" in cell else "",
        "codebooks": lambda cell: f"{cell['codebook_bytes'] / 1e6:.1f} MB",
    }
    if not all("recall_10_at_10_renormalised" in cell for cell in found):  # vectors that have no norm of one
        del columns["at norm 1"]
    if not any("tasks" in cell for cell in found):
        del columns["nDCG@10"]
    lines = [f"| method | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {label(cell)} | {' | '.join(show(cell) for show in columns.values())} |" for cell in found]
    return "\n".join(lines)


def curve() -> str:
    """The least error at 8 bytes by the number of training vectors, of Faiss's LSQ and of ours."""
    best: dict[int, dict[str, dict]] = {}
    for cell in environment.load("quality-minilm-384").get("cells", {}).values():
        if cell["bytes"] == 8 and cell["method"].startswith(("LSQ", "ours, ")):
            family = cell["method"].partition(" ")[0].rstrip(",")
            rows = best.setdefault(cell["training_vectors"], {})
            if family not in rows or cell["mse"] < rows[family]["mse"]:
                rows[family] = cell
    lines = [
        "| training vectors | LSQ | MSE | recall@10 | ours | MSE | recall@10 | less error |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for count, rows in sorted(best.items()):
        parts = [f"{count:,}"]
        for row in (rows.get("LSQ"), rows.get("ours")):
            numbers = [f"{row[key]:.3f}" for key in ("mse", "recall_10_at_10")] if row else ["", ""]
            parts += [row["method"].removeprefix("ours, ") if row else "", *numbers]
        parts.append(f"{100 * (1 - rows['ours']['mse'] / rows['LSQ']['mse']):.0f} %" if len(rows) == 2 else "")
        lines.append(f"| {' | '.join(parts)} |")
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
            if cell["method"] == "ours, additive x10" and cell.get("gpu"):
                lines.append(
                    f"| {name} | {cell['bytes']} | {cell['training_vectors']:,} | {cell['train_seconds']:.0f} s | "
                    f"{cell['encode_per_second']:,} | {cell['decode_per_second']:,} |"
                )
    return "\n".join(lines)


def tasks() -> str:
    """What similarity and retrieval keep."""
    lines = [
        "| | bytes | compressed | STS Spearman | known-item nDCG@10 | accuracy@1 |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for cell in reversed(cells("minilm-384")):
        found = cell.get("tasks", {})
        if not cell["method"].startswith(("ours:", "float32")) or not found:
            continue
        for side, words in (("asymmetric", "documents"), ("symmetric", "both sides")):
            exact = cell["method"] == "float32"
            if not exact or side == "asymmetric":
                lines.append(
                    f"| {'uncompressed' if exact else label(cell)} | {cell['bytes']:,} | "
                    f"{'nothing' if exact else words} | {found[f'sts_spearman_{side}']:.1f} | "
                    f"{found[f'known_item_ndcg_at_10_{side}']:.3f} | {found[f'known_item_accuracy_at_1_{side}']:.3f} |"
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
        if cell in own or (cell["bytes"] in sizes and not cell["method"].startswith("ours"))
    ]
    exact = next(cell["tasks"] for cell in measured if cell["method"] == "float32")
    record.preserved = []
    for cell in own:
        for side, sides in (("asymmetric", "queries exact"), ("symmetric", "both sides compressed")):
            for key, task, metric, scale in (
                ("sts_spearman", "STS Benchmark", "Spearman", 100),
                ("known_item_ndcg_at_10", "known-item retrieval", "nDCG@10", 1),
            ):
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


def search() -> str:
    """Search in embeddings of texts."""
    return search_table("search-minilm-384")


def search_sift() -> str:
    """Search in descriptors of pictures."""
    return search_table("search-sift-128")


def search_table(name: str) -> str:
    """The best recall of every index and, of all that reach a recall, the quickest setting; one thread."""
    results = environment.load(name)
    lines = [
        "| index | bytes | with refinement | memory | best recall@10 | at queries/s | queries/s at recall@10 of "
        f"{SEARCH_RECALL} | latency | vectors added/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = []
    for key, built in results.get("builds", {}).items():
        measured = [cell for cell in results["cells"].values() if cell["build"] == key and cell["threads"] == 1]
        if measured:
            rows.append((built["stored_bytes"] + built["refinement_bytes"], built, measured))
    for total, built, measured in sorted(rows, key=lambda row: row[0]):
        best = max(measured, key=lambda cell: (cell["recall_10_at_10"], cell["queries_per_second"]))
        enough = [cell["queries_per_second"] for cell in measured if cell["recall_10_at_10"] >= SEARCH_RECALL]
        lines.append(
            f"| {search_label(built)} | {built['stored_bytes']:.0f} | {total:,.0f} | "
            f"{built['resident_bytes_all']:.0f} | {best['recall_10_at_10']:.3f} | {best['queries_per_second']:,.0f} | "
            f"{f'{max(enough):,.0f}' if enough else ''} | {best['latency_ms']:.1f} ms | "
            f"{built['database'] / max(built['add_seconds'], 0.01):,.0f} |"
        )
    return "\n".join(lines)


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
        quality,
        quality_mpnet,
        quality_wordllama,
        quality_sift,
        curve,
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
        search,
        search_sift,
        machine,
        costs,
        forecast,
        peaks,
        workers,
    )
}


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
    documents = (ROOT / "README.md", ROOT / "benchmarks" / "LEVERS.md", ROOT / "docs" / "scaling.md")
    wanted = {file: fill(file.read_text("utf-8")) for file in documents}
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
