"""Draws the results of `quality.py`: rate against distortion, recall against bytes, error against encoding time.

    python benchmarks/plots.py --set minilm-384

writes results/quality-<set>.svg; and of `search.py`, recall against queries per second,

    python benchmarks/plots.py --set --search minilm-384

in results/search-<set>.svg.
"""

import argparse
import re

import environment
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator
from rivals.tables import best_recall, cells, label
from tables import search_label

MAX_BYTES = 64
MARKERS = "osv^D<>pX*hPd"


def draw(name: str) -> None:
    """One figure of three panels; what is ours is drawn last and thicker."""
    methods: dict[str, list[dict]] = {}
    for cell in cells(name):
        if cell["bytes"] <= MAX_BYTES:
            methods.setdefault(re.sub(r"\*\*|, \d+ codes$", "", label(cell)), []).append(cell)
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    ordered = sorted(methods.items(), key=lambda item: item[1][0]["method"].startswith("ours"))
    for number, (method, rows) in enumerate(ordered):
        own = rows[0]["method"].startswith("ours")
        style = {"marker": MARKERS[number % len(MARKERS)], "linewidth": 2.2 if own else 1, "label": method}
        style |= {"color": f"C{number % 10}", "linestyle": "-" if own else "--", "markersize": 7 if own else 5}
        rows = sorted({row["bytes"]: row for row in rows}.values(), key=lambda row: row["bytes"])  # the least error
        size = [row["bytes"] for row in rows]
        panels[0].plot(size, [row["mse"] for row in rows], **style)
        panels[1].plot(size, [best_recall(row) for row in rows], **style)
        timed = [row for row in rows if row.get("gpu") is None]  # on processors
        panels[2].plot([1e6 / row["encode_per_second"] for row in timed], [row["mse"] for row in timed], **style)
    for panel, title, across, up in (
        (panels[0], "rate and distortion", "bytes per vector", "squared error"),
        (panels[1], "recall", "bytes per vector", "recall@10"),
        (panels[2], "error and time", "microseconds to encode a vector", "squared error"),
    ):
        panel.set(title=title, xlabel=across, ylabel=up, xscale="log")
        panel.grid(alpha=0.3)
    for panel in panels[::2]:  # errors, which differ a thousandfold
        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_major_formatter("{x:,.7g}")
        panel.yaxis.set_minor_formatter("{x:,.7g}")
    for panel in panels[:2]:
        ticks = sorted({row["bytes"] for rows in methods.values() for row in rows})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    file = environment.RESULTS / f"quality-{name}.svg"
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    print(file)


def fronts(results: dict, threads: int) -> list[tuple[dict, list[tuple[float, float]]]]:
    """Of each index the settings that no other one beats in recall and in speed, by recall; ours last."""
    found = []
    for key, built in results["builds"].items():
        own = [cell for cell in results["cells"].values() if cell["build"] == key and cell["threads"] == threads]
        points = sorted(((cell["recall_10_at_10"], cell["queries_per_second"]) for cell in own), reverse=True)
        front = [point for place, point in enumerate(points) if all(point[1] > other[1] for other in points[:place])]
        if front:
            found.append((built, front[::-1]))
    return sorted(found, key=lambda item: item[0]["method"].startswith("ours"))


def draw_search(name: str) -> None:
    """A row of panels for each number of threads: equal bytes first, then whatever keeps more."""
    results = environment.load(f"search-{name}")
    threads = sorted({cell["threads"] for cell in results["cells"].values()})
    sizes = sorted({built["bytes"] for built in results["builds"].values() if built["bytes"] in (16, 32)})
    titles = [*(f"{size} bytes" for size in sizes), "more bytes, or refined with floats"]
    shape = {"nrows": len(threads), "ncols": len(titles), "squeeze": False, "layout": "constrained"}
    figure, panels = pyplot.subplots(**shape, figsize=(5 * len(titles), 4 * len(threads) + 1))
    names = list(dict.fromkeys(search_label(built) for built in results["builds"].values()))
    for row, count in zip(panels, threads, strict=True):
        for built, front in fronts(results, count):
            shown, own = search_label(built), built["method"].startswith("ours")
            place = names.index(shown)
            style = {"color": f"C{place % 10}", "marker": MARKERS[place % len(MARKERS)]}
            style |= {"label": shown.replace("*", ""), "linestyle": "-" if own else "--", "markersize": 5}
            style |= {"linewidth": 2.2 if own else 1}
            size = built["bytes"]
            column = len(sizes) if size not in sizes or built["refinement_bytes"] > size else sizes.index(size)
            row[column].plot(*zip(*front, strict=True), **style)
        for panel, title in zip(row, titles, strict=True):
            heading = f"{title}, {count} thread{'s' if count > 1 else ''}"
            panel.set(title=heading, xlabel="recall@10", ylabel="queries/s", yscale="log")
            panel.grid(alpha=0.3)
    shown = {text: handle for panel in panels.flat for handle, text in zip(*panel.get_legend_handles_labels())}  # noqa: B905
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    file = environment.RESULTS / f"search-{name}.svg"
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    print(file)


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=["minilm-384"])
    parser.add_argument("--search", nargs="*", default=[], metavar="SET", help="draw results of search.py")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rqmoe"
    arguments = parser.parse_args()
    for name in arguments.set:
        draw(name)
    for name in arguments.search:
        draw_search(name)


if __name__ == "__main__":
    main()
