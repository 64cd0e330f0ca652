"""Draws the results of `quality.py`: rate against distortion, recall against bytes, error against encoding time.

    python benchmarks/plots.py --set minilm-384

writes results/quality-<set>.svg.
"""

import argparse

import environment
import matplotlib
from matplotlib import pyplot
from tables import cells, label

MAX_BYTES = 64
MARKERS = "osv^D<>pX*hPd"


def draw(name: str) -> None:
    """One figure of three panels; what is ours is drawn last and thicker."""
    methods: dict[str, list[dict]] = {}
    for cell in cells(name):
        if cell["bytes"] <= MAX_BYTES:
            methods.setdefault(label(cell).replace("**", "").split(", ")[0], []).append(cell)
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    ordered = sorted(methods.items(), key=lambda item: item[1][0]["method"].startswith("ours"))
    for number, (method, rows) in enumerate(ordered):
        own = rows[0]["method"].startswith("ours")
        style = {"marker": MARKERS[number % len(MARKERS)], "linewidth": 2.2 if own else 1, "label": method}
        style |= {"color": f"C{number % 10}", "linestyle": "-" if own else "--", "markersize": 7 if own else 5}
        rows.sort(key=lambda row: row["bytes"])
        size = [row["bytes"] for row in rows]
        panels[0].plot(size, [row["mse"] for row in rows], **style)
        panels[1].plot(size, [row["recall_10_at_10"] for row in rows], **style)
        panels[2].plot([1e6 / row["encode_per_second"] for row in rows], [row["mse"] for row in rows], **style)
    for panel, title, across, up in (
        (panels[0], "rate and distortion", "bytes per vector", "squared error"),
        (panels[1], "recall", "bytes per vector", "recall@10"),
        (panels[2], "error and time", "microseconds to encode a vector", "squared error"),
    ):
        panel.set(title=title, xlabel=across, ylabel=up, xscale="log")
        panel.grid(alpha=0.3)
    for panel in panels[:2]:
        ticks = sorted({row["bytes"] for rows in methods.values() for row in rows} - {15})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    file = environment.RESULTS / f"quality-{name}.svg"
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    print(file)


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=["minilm-384"])
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rqmoe"
    for name in parser.parse_args().set:
        draw(name)


if __name__ == "__main__":
    main()
