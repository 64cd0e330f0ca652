"""The tables of docs/scaling.md, from results/cost.json and results/memory.json."""

import environment
import numpy as np

FORECAST = {"d": 384, "M": 16, "K": 256, "rounds": 32}
COUNTS = {"10 million": 1e7, "1 billion": 1e9, "100 billion": 1e11}
INDEX_OVERHEAD = 9  # bytes of a vector beside its code: a norm and a row number
CORES, MEMORY = 192, 384 * 2**30  # of a c7a.48xlarge
DAY = 24 * 3600


def predict(row: dict, setting: dict[str, int]) -> float:
    """Seconds of a unit: the base times the powers of all factors that the setting has another value of."""
    growth = [
        (setting.get(factor, row["base"][factor]) / row["base"][factor]) ** power
        for factor, power in row["exponents"].items()
    ]
    return row["seconds"] * float(np.prod(growth))


def costs() -> str:
    """Seconds per million and the exponents of all factors."""
    stages = environment.load("cost")["stages"]
    factors = list(dict.fromkeys(factor for row in stages.values() for factor in row.get("exponents", {})))
    lines = [
        f"| stage | base | a million takes | {' | '.join(factors)} | held out: predicted / measured |",
        f"| --- | --- | ---: |{' ---: |' * (len(factors) + 1)}",
    ]
    for name, row in stages.items():
        if "exponents" in row:
            base = ", ".join(f"{factor} {value:,}" for factor, value in row["base"].items())
            powers = [f"{row['exponents'][factor]:.2f}" if factor in row["exponents"] else "" for factor in factors]
            ratio = row["held_out"]["predicted"] / row["held_out"]["measured"]
            taken = duration(1e6 * row["seconds"]) if row["unit"] != "round" else f"{row['seconds']:.2f} s a round"
            lines.append(f"| {name} | {base} | {taken} | {' | '.join(powers)} | {ratio:.2f} |")
        else:
            theirs = duration(1e6 * row["seconds_by_sentence_transformers"])
            base = f"{row['words']:.0f} words, {row['dtype']} (sentence-transformers by itself: {theirs})"
            lines.append(f"| {name} | {base} | {duration(1e6 * row['seconds'])} |{' |' * (len(factors) + 1)}")
    return "\n".join(lines)


def forecast() -> str:
    """Hours, machines and bytes for more vectors than were measured."""
    results = environment.load("cost")
    stages, cores = results["stages"], results["threads"]["torch"]
    each = {
        "embed": stages["embed"]["seconds"],
        "compress": predict(stages["compress, additive"], FORECAST),
        "index": predict(stages["index"], FORECAST | {"n": stages["index"]["base"]["n"]}),
    }
    lines = [f"| | {' | '.join(COUNTS)} |", f"| --- |{' ---: |' * len(COUNTS)}"]
    lines.append(f"| float32 vectors | {' | '.join(size(4 * FORECAST['d'] * count) for count in COUNTS.values())} |")
    lines.append(f"| codes | {' | '.join(size(FORECAST['M'] * count) for count in COUNTS.values())} |")
    inside = [(FORECAST["M"] + INDEX_OVERHEAD) * count for count in COUNTS.values()]
    lines.append(f"| index in memory | {' | '.join(map(size, inside))} |")
    for name, taken in each.items():
        lines.append(f"| {name}, {cores} cores | {' | '.join(duration(taken * count) for count in COUNTS.values())} |")
    for name in ("embed", "compress"):
        machines = [int(np.ceil(each[name] * count * cores / CORES / DAY)) for count in COUNTS.values()]
        shown = " | ".join(f"{count:,}" for count in machines)
        lines.append(f"| machines of {CORES} such cores that {name} within a day | {shown} |")
    shards = [int(np.ceil(taken / (0.8 * MEMORY))) for taken in inside]
    lines.append(f"| machines of {MEMORY >> 30} GiB that hold the index | {' | '.join(f'{n:,}' for n in shards)} |")
    return "\n".join(lines)


def peaks() -> str:
    """Peak memory of the stages for the fewest and the most vectors, less what an index has to hold."""
    stages = environment.load("memory")["stages"]
    lines = [
        "| stage | vectors | anonymous | of it codes and ids | the rest | grows | pages of files | took |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in stages.items():
        numbers = sorted(map(int, rows))
        pair = [rows[str(number)] for number in (numbers[0], numbers[-1])]
        rest = [row["anonymous"] - row["held"] for row in pair]
        cells = [[f"{number / 1e6:g} M" for number in (numbers[0], numbers[-1])]]
        cells.append([size(row["anonymous"]) for row in pair])
        cells.append([size(row["held"]) for row in pair if row["held"]])
        cells += [[size(count) for count in rest], [f"x{rest[1] / rest[0]:.2f}"]]
        cells.append([size(row["file"]) for row in pair])
        cells.append([duration(row["seconds"]) for row in pair])
        lines.append(f"| {name} | {' | '.join(' / '.join(cell) for cell in cells)} |")
    return "\n".join(lines)


def peaks_50_gb() -> str:
    """Peak memory of the stages for fifty gigabytes of vectors."""
    lines = [
        "| stage | anonymous | of it codes and ids | pages of files | both | took |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in environment.load("memory-50-gb").get("stages", {}).items():
        (row,) = rows.values()
        held = size(row["held"]) if row["held"] else ""
        lines.append(
            f"| {name} | {size(row['anonymous'])} | {held} | {size(row['file'])} | {size(row['total'])} | "
            f"{duration(row['seconds'])} |"
        )
    return "\n".join(lines)


def workers() -> str:
    """Compressing in one process and on workers of Ray."""
    results = environment.load("ray")
    lines = ["| | seconds | vectors/s | peak memory of a worker |", "| --- | ---: | ---: | ---: |"]
    for name, row in results["runs"].items():
        peak = max(row["workers_peak_memory"], default=row["peak_memory"])
        lines.append(f"| {name} | {row['seconds']:.0f} | {row['vectors_per_second']:,.0f} | {size(peak)} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for unit, length in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}" if seconds >= 20 * length else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count / 1e6:,.0f} MB"
