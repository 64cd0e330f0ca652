"""The tables of `quality.py`'s results: README's compare the best, RESULTS.md's have all methods."""

from collections.abc import Callable, Iterable

import environment
from sets import SETS

FLOAT_BYTES = 4 * 384
COMPARED = 100_000  # training vectors of what is trained in the benchmark, or all that a smaller set has
OTHERS = {  # where others have been compared, too: an encoder is slow, 64 bytes take hours, or more than that is quick
    ("mpnet-768", 8): 30_000,
    ("mpnet-768", 32): 30_000,
    ("mpnet-768", 64): 30_000,
    ("minilm-384", 64): 50_000,
    ("wordllama-256", 64): 50_000,
    ("sift-128", 8): 400_000,
}
SUMMARY = ("PQ", "OPQ", "RaBitQ (PCA)", "TurboQuant (PCA)", "RQ, beam 5", "RQ x10, beam 5", "LSQ", "LSQ x10")
FIXED = ("binary, rescored", "int8", "float32")  # what has a size of its own
FAMILY = ("ours", "official", "qinco")

Column = Callable[[dict], str]


def cells(name: str) -> list[dict]:
    """The cells of a set that are compared, larger errors first: trained on 100,000 vectors or `OTHERS`, or finished.

    Also what was trained on as many as its time allows, and says so.
    """
    found = environment.load(f"quality-{name}").get("cells", {}).values()
    most = max((cell["training_vectors"] or 0 for cell in found if not cell["method"].startswith("ours:")), default=0)
    best: dict[tuple, dict] = {}
    for cell in found:
        counts = (None, min(COMPARED, most), OTHERS.get((name, cell["bytes"])))
        enough = cell["training_vectors"] in counts or "note" in cell  # which says why not all
        if cell["method"].startswith("ours:") or enough:
            count = None if cell["method"].startswith("ours:") else cell["training_vectors"]
            key = cell["method"], cell["bytes"], count
            best[key] = _shown(best.get(key, cell), cell)
    return sorted(best.values(), key=lambda cell: (cell["bytes"], -cell["mse"]))


def _shown(first: dict, again: dict) -> dict:
    """Of two measurements the first, with the tasks of the one that has more; of our weights those trained last."""
    if first["method"].startswith("ours:"):
        return again
    tasks = max(first.get("tasks", {}), again.get("tasks", {}), key=len)
    return first | {"tasks": tasks} if tasks else first


def label(cell: dict) -> str:
    """The name of a method as tables show it; what is ours in bold."""
    if "epochs" in cell and not cell["method"].startswith("ours"):
        return f"{cell['method']} ({cell['epochs']:.1f} epochs)"
    if not cell["method"].startswith("ours"):
        return cell["method"]
    if not cell["method"].startswith("ours:"):
        return f"**{cell['method'].removeprefix('ours, ')}** (ours)"
    _, name, codes = cell["method"].split(":")
    return f"**{name}**, {codes} codes"


def summary() -> str:
    """README's first table: recall@10 by bytes, of the rivals, and of ours that saw as many vectors or more."""
    sizes = (8, 16, 32, 64)
    found = cells("minilm-384")
    lines = [
        f"| recall@10 | {' | '.join(f'{size} bytes' for size in sizes)} | its own size |",
        f"| --- |{' ---: |' * (len(sizes) + 1)}",
    ]
    rows = {method: [cell for cell in found if cell["method"] == method] for method in SUMMARY}
    rows["**ours**, trained on as many"] = [cell for cell in found if cell["method"].startswith("ours, ")]
    rows["**ours**, as bundled"] = [cell for cell in found if cell["method"].startswith("ours:")]
    for name, mine in rows.items():
        best = [_best(cell for cell in mine if cell["bytes"] == size) for size in sizes]
        lines.append(f"| {name} | {' | '.join(f'{best_recall(cell):.3f}' if cell else '' for cell in best)} | |")
    for method in FIXED:
        if cell := _best(cell for cell in found if cell["method"] == method):
            lines.append(f"| {method} |{' |' * len(sizes)} {best_recall(cell):.3f} at {cell['bytes']:,} bytes |")
    memory = " | ".join(f"{10 * size} MB" for size in sizes)
    lines.append(f"| memory for 10 million | {memory} | float32: {FLOAT_BYTES / 100:.1f} GB |")
    return "\n".join(lines)


def _best(found: Iterable[dict]) -> dict | None:
    """The cell with the highest recall, if there is any."""
    return max(found, key=best_recall, default=None)


def error_of(cell: dict) -> str:
    """The error in the units of the vectors, whose norm is one or hundreds."""
    return f"{cell['mse']:.3f}" if cell["mse"] < 10 else f"{cell['mse']:,.0f}"


def on_gpu(cell: dict) -> bool:
    """Whether a method has run on the machine's GPU; of Faiss's only RQ and LSQ can, where Faiss was built for it."""
    searched = cell["method"].startswith(("RQ", "LSQ")) and cell.get("faiss_gpus", 0) > 0
    return bool(cell.get("gpu")) and (searched or cell["method"].startswith(FAMILY))


def columns_of(found: list[dict]) -> dict[str, Column]:
    """The columns that cells have in common, or that some of them have."""

    def number(key: str) -> Column:
        return lambda cell: f"{cell[key]:.3f}" if key in cell else ""

    def task(key: str, digits: int) -> Column:
        return lambda cell: f"{cell['tasks'][key]:.{digits}f}" if key in cell.get("tasks", {}) else ""

    columns: dict[str, Column] = {
        "bytes": lambda cell: f"{cell['bytes']:,}",
        "trained on": lambda cell: f"{cell['training_vectors'] or 0:,}",
        "MSE": error_of,
        "R@1": number("recall_at_1_1"),
        "R@10": number("recall_at_1_10"),
        "recall@10": number("recall_10_at_10"),
        "at norm 1": number("recall_10_at_10_renormalised"),
        "own search": number("recall_10_at_10_own_search"),
        "nDCG@10": task("known_item_ndcg_at_10_asymmetric", 3),
        "packages": task("package_ndcg_at_10_asymmetric", 3),
        "STS": task("sts_spearman_asymmetric", 1),
        "R@100": number("recall_at_1_100"),
        "cosine": number("cosine"),
        "bits": lambda cell: f"{cell['bits']:,}",
        "training": lambda cell: f"{cell['train_seconds']:,.0f} s" if cell["train_seconds"] else "",
        "encoded/s": lambda cell: f"{cell['encode_per_second']:,}",
        "decoded/s": lambda cell: f"{cell['decode_per_second']:,}",
        "threads": lambda cell: "GPU" if on_gpu(cell) else str(cell["threads"]["faiss"]),
        "codebooks": lambda cell: f"{cell['codebook_bytes'] / 1e6:.1f} MB",
        "note": lambda cell: cell.get("note", ""),
    }
    return {name: show for name, show in columns.items() if any(show(cell) for cell in found)}


def quality_table(found: list[dict]) -> str:
    """Error, recall, speed and, where it was measured, what tasks keep."""
    columns = columns_of(found)
    lines = [f"| method | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {label(cell)} | {' | '.join(show(cell) for show in columns.values())} |" for cell in found]
    return "\n".join(lines)


def everything(name: str) -> Callable[[], str]:
    """A function that makes the table of all methods on a set."""
    return lambda: quality_table(cells(name))


def best_recall(cell: dict) -> float:
    """recall@10 ranked in the way that suits a method best: as it is, at norm 1, or by its authors' estimator."""
    return max(cell.get(f"recall_10_at_10{way}", 0.0) for way in ("", "_renormalised", "_own_search"))


def sides(name: str) -> dict[int, tuple[list[dict], list[dict]]]:
    """For each number of bytes the rivals, and what of ours was trained on as many vectors as one of them."""
    found: dict[int, tuple[list[dict], list[dict]]] = {}
    for cell in cells(name):
        if not cell["method"].startswith("ours:"):
            found.setdefault(cell["bytes"], ([], []))[cell["method"].startswith("ours, ")].append(cell)
    counts = {size: {cell["training_vectors"] for cell in rivals} for size, (rivals, _) in found.items()}
    return {
        size: (rivals, [cell for cell in ours if cell["training_vectors"] in counts[size]])
        for size, (rivals, ours) in found.items()
    }


def _member(cell: dict) -> str:
    """The name of a method where its column says whose it is."""
    return cell["method"].removeprefix("ours, ")


def floor() -> str:
    """The least error and the highest recall of rivals and of ours, at every rate of every set."""
    lines = [
        "| set | bytes | best rival | MSE | ours | MSE | less error | best rival | recall@10 | ours | recall@10 |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for name in SETS:
        for size, (rivals, ours) in sides(name).items():
            if not rivals or not ours:
                continue
            rival, own = (min(cells, key=lambda cell: cell["mse"]) for cells in (rivals, ours))
            parts = [name, str(size), _member(rival), error_of(rival), _member(own), error_of(own)]
            parts.append(f"{100 * (1 - own['mse'] / rival['mse']):.0f} %")
            for best in (max(rivals, key=best_recall), max(ours, key=best_recall)):
                parts += [_member(best), f"{best_recall(best):.3f}"]
            lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def curve() -> str:
    """How many training vectors it takes on the embeddings of all-MiniLM-L6-v2."""
    return by_training_vectors("minilm-384")


def curve_wordllama() -> str:
    """How many training vectors it takes on the embeddings of WordLlama."""
    return by_training_vectors("wordllama-256")


def by_training_vectors(name: str) -> str:
    """The least error at 8 bytes by the number of training vectors, of Faiss's LSQ and of ours."""
    best: dict[int, dict[str, dict]] = {}
    for cell in environment.load(f"quality-{name}").get("cells", {}).values():
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
            parts += [_member(row), error_of(row), f"{best_recall(row):.3f}"] if row else [""] * 3
        parts.append(f"{100 * (1 - rows['ours']['mse'] / rows['LSQ']['mse']):.0f} %" if len(rows) == 2 else "")
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def tasks() -> str:
    """What similarity and retrieval keep: ours, and for each number of bytes the rivals that keep most of one task."""
    lines = [
        "| | bytes | compressed | STS Spearman | headwords, nDCG@10 | accuracy@1 | packages, nDCG@10 | accuracy@1 |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    measured = [cell for cell in reversed(cells("minilm-384")) if "tasks" in cell]
    exact = next(cell for cell in measured if cell["method"] == "float32")
    lines.append(_task_row("uncompressed", exact, "asymmetric", "nothing"))
    own = [cell for cell in measured if cell["method"].startswith("ours:")]
    for size in dict.fromkeys(cell["bytes"] for cell in own):
        rivals = [cell for cell in measured if cell["bytes"] == size and not cell["method"].startswith("ours")]
        for side, words in (("asymmetric", "documents"), ("symmetric", "both sides")):
            keys = [f"{key}_{side}" for key in ("sts_spearman", "known_item_ndcg_at_10", "package_ndcg_at_10")]
            best = [max(rivals, key=lambda cell: cell["tasks"].get(key, 0.0))["method"] for key in keys]
            shown = [cell for cell in measured if cell["bytes"] == size and (cell in own or cell["method"] in best)]
            lines += [_task_row(label(cell), cell, side, words) for cell in shown]
    return "\n".join(lines)


def _task_row(name: str, cell: dict, side: str, compressed: str) -> str:
    """One line of the table of tasks."""
    values = [f"{cell['tasks'][f'sts_spearman_{side}']:.1f}"]
    for kind in ("known_item", "package"):
        keys = [f"{kind}_{key}_{side}" for key in ("ndcg_at_10", "accuracy_at_1")]
        values += [f"{cell['tasks'][key]:.3f}" if key in cell["tasks"] else "" for key in keys]
    return f"| {name} | {cell['bytes']:,} | {compressed} | {' | '.join(values)} |"
