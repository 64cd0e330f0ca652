"""Recall against queries per second, latency, memory and build time of indexes at equal bytes per vector.

    python benchmarks/search.py --set minilm-384 --ours minilm-384-32-bytes:13 minilm-384
    python benchmarks/search.py --set minilm-384 --methods IVF-PQ IVF-RQ --bytes 16 --training 10000
    python benchmarks/search.py --set minilm-384 --methods --ours minilm-384-32-bytes --tasks

The first `--training` vectors of the set train everything that is trained here. The database is the held-out vectors
of the set and all others of its training vectors; if `--database` asks for more, vectors that were trained with, too.
The results count both. Queries are held out. A finished quantizer (`--ours`) was trained elsewhere; how many vectors
of the database may have been among its training vectors is recorded.

All queries are asked at once, first to warm up, then several times, of which the median counts; then one by one. Every
cell, a method in one setting with a number of threads, is written to results/search-<set>.json as soon as it is
measured, and not measured again (`--again` does): a run that was stopped continues. LanceDB is measured if the package
`lancedb` is installed.

`--tasks` also retrieves known items through LangChain, beside its in-memory store of floats.
"""

import argparse
import gc
import hashlib
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import environment
import faiss
import rag_tasks
from rivals import OURS
from searchers import (
    KINDS,
    Collection,
    Searcher,
    assemble,
    is_built,
    is_installed,
    own,
    rivals,
    timing,
    train_own,
)
from sets import SETS, load
from tasks import open_tasks

from rqmoe_hf.evaluation import recalls

SIZES = (16, 32)
TRAINING = 131_072
LISTS = 4.0  # times the square root of the database, the least that Faiss recommends
METRICS = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}
Plan = list[tuple[str, Callable[[], list[Searcher]]]]


def plan(data: Collection, lists: int, arguments: argparse.Namespace) -> Plan:
    """What is measured, in order: labels, and how to make the searchers.

    Raises:
        ValueError: If there is no such method.
    """
    known = rivals(data, arguments.bytes, lists, METRICS[arguments.metric])
    if not is_installed():
        print("lancedb is not installed, so it is left out: pip install lancedb.", flush=True)
    wanted = [one.name for one in known] if arguments.methods is None else arguments.methods
    unknown = [name for name in wanted if name not in OURS and not any(one.name.startswith(name) for one in known)]
    if unknown:
        names = dict.fromkeys([*(one.name for one in known), *OURS])
        raise ValueError(f"Unknown: {unknown}. There are {'; '.join(names)}, and beginnings of them.")
    work = arguments.work or arguments.root / arguments.set / "search"
    finish = partial(_finished, work=work, lists=lists, kinds=arguments.kinds)
    made: Plan = [(given, partial(finish, given)) for given in arguments.ours]
    for name in (name for name in wanted if name in OURS):
        for size in arguments.bytes:
            made.append((f"{name}, {size} bytes", partial(_trained, name, size, data, finish)))
    chosen = [one for one in known if any(one.name.startswith(name) for name in wanted)]
    return made + [(label(one), partial(list, [one])) for one in chosen]


def _finished(given: str, **settings) -> list[Searcher]:
    return list(own(given, **settings))


def _trained(name: str, size: int, data: Collection, finish: partial) -> list[Searcher]:
    folder, seconds = train_own(name, size, data, finish.keywords["work"])
    return finish(folder, name=name, trained=seconds)


def label(searcher: Searcher) -> str:
    """A searcher's name in what is printed."""
    return searcher.name if searcher.size is None else f"{searcher.name}, {searcher.size} bytes"


def build_key(searcher: Searcher, data: Collection) -> str:
    """The name of an index in the results file."""
    identity = [f"{name} {value}" for name, value in searcher.identity.items() if value is not None]
    sizes = f"{len(data.train)} training vectors", f"{len(data.database)} vectors"
    return " | ".join([label(searcher), *identity, *sizes, data.checksum])


def cells_of(searcher: Searcher, data: Collection, threads: list[int]) -> Iterator[tuple[str, dict, int]]:
    """Names, settings and threads of a searcher's cells."""
    for count in threads:
        for setting in searcher.settings():
            shown = ", ".join(f"{name} {value}" for name, value in setting.items()) or "all"
            yield f"{build_key(searcher, data)} | {shown} | {count} threads", setting, count


class Results:
    """The results file, read anew before each change: another run may have added to it.

    Args:
        data: What is searched in.
        description: Of the set, in words.
    """

    def __init__(self, data: Collection, description: str):
        self.file, self.about = f"search-{data.name}", {"set": data.name, "description": description}
        self.about |= {"environment": environment.describe(), "unit_norm": data.unit_norm}

    def has(self, part: str, key: str) -> bool:
        """Whether a part, such as "cells", has an entry."""
        return key in environment.load(self.file).get(part, {})

    def put(self, part: str, key: str, row: dict) -> None:
        """Adds or replaces an entry."""
        found = environment.load(self.file) | self.about
        dated = row | {"date": self.about["environment"]["date"]}
        environment.save(self.file, found | {part: found.get(part, {}) | {key: dated}})


def prepare(searcher: Searcher, data: Collection, folder: Path, results: Results) -> None:
    """Builds an index that is not in its folder, and measures its memory."""
    built = is_built(folder)
    if built is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        print(f"{label(searcher)}: building", flush=True)
        built = searcher.build(data, folder)
    key = build_key(searcher, data)
    if not results.has("builds", key):
        row = {"method": searcher.name, "bytes": searcher.size, **searcher.identity, **data.describe(), **built}
        row |= {"build_threads": faiss.omp_get_max_threads()}
        results.put("builds", key, row | timing.memory(searcher, folder, data.queries, len(data.database)))


def measure(searcher: Searcher, data: Collection, setting: dict, threads: int) -> dict:
    """Recall, queries per second and, on one core, the time of a single query."""
    with timing.limited(threads):
        found, rate, repeats = timing.rate(lambda: searcher.search(data.queries, **setting), len(data.queries))
        row = {
            "method": searcher.name,
            "bytes": searcher.size,
            **setting,
            "threads": threads,
            "recall_10_at_10": recalls(data.truth, found)[2],
            "queries_per_second": round(rate, 1),
            "repeats": repeats,
        }
        if threads == 1:
            row |= timing.latency(lambda queries: searcher.search(queries, **setting), data.queries)
    return row


def run(searcher: Searcher, data: Collection, work: Path, results: Results, arguments: argparse.Namespace) -> None:
    """Measures the cells of one searcher that are missing."""
    cells = list(cells_of(searcher, data, arguments.threads))
    missing = [cell for cell in cells if arguments.again or not results.has("cells", cell[0])]
    key = build_key(searcher, data)
    if not missing and results.has("builds", key):
        return
    folder = work / "indexes" / hashlib.sha256(key.encode()).hexdigest()[:16]
    prepare(searcher, data, folder, results)
    searcher.open(folder)
    for name, setting, threads in missing:
        row = measure(searcher, data, setting, threads)
        results.put("cells", name, {"build": key, **row})
        short = f"recall@10 {row['recall_10_at_10']:.4f}, {row['queries_per_second']:,.0f} queries/s"
        alone = f", {row['latency_ms']:.2f} ms alone" if "latency_ms" in row else ""
        print(f"{label(searcher)}, {setting}, {threads} threads: {short}{alone}", flush=True)
    if not arguments.keep:
        shutil.rmtree(folder)


def run_tasks(results: Results, arguments: argparse.Namespace) -> None:
    """Known items through LangChain, for the quantizers that are missing."""
    tasks = open_tasks(arguments.set, arguments.root, arguments.encoder)
    for given in [None, *arguments.ours]:
        name = rag_tasks.name_of(given)
        key = f"{name} | {len(tasks.documents)} documents | {arguments.task_queries} queries"
        if not arguments.again and results.has("tasks", key):
            continue
        row = rag_tasks.measure(given, tasks, arguments.task_queries)
        results.put("tasks", key, row)
        print(f"{name}: nDCG@10 {row['known_item_ndcg_at_10']:.4f} through LangChain", flush=True)


def parse() -> argparse.Namespace:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(SETS), default="minilm-384")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, help="where indexes are built, default <root>/<set>/search")
    parser.add_argument("--methods", nargs="*", help="default: all rivals; beginnings of names will do")
    parser.add_argument("--bytes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME[:CODES]", help="trained quantizers")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="of our indexes; flat is slow")
    parser.add_argument("--training", type=int, default=TRAINING, help="vectors that train all methods")
    parser.add_argument("--limit", type=int, help="use only the first so many training vectors of the set")
    parser.add_argument("--database", type=int, help="vectors searched in, default all that are not trained with")
    parser.add_argument("--queries", type=int, help="default all held-out ones")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--lists", type=float, default=LISTS, help="inverted lists, times the database's square root")
    parser.add_argument("--metric", choices=list(METRICS), default="l2", help="of the rivals")
    parser.add_argument("--keep", action="store_true", help="do not delete indexes that are measured")
    parser.add_argument("--tasks", action="store_true", help="also retrieve known items through LangChain")
    parser.add_argument("--task-queries", type=int, default=3_000)
    parser.add_argument("--encoder", help="folder or Hub id of the set's encoder, for --tasks")
    parser.add_argument("--again", action="store_true", help="measure what is in the results file too")
    return parser.parse_args()


def main() -> None:
    """Measures what is missing."""
    arguments = parse()
    vectors = load(arguments.set, arguments.root, arguments.limit)
    data = assemble(vectors, min(arguments.training, len(vectors.train)), arguments.database, arguments.queries)
    if arguments.metric == "inner_product" and not data.unit_norm:
        sys.exit(f"The vectors of {data.name} have no common norm: their neighbours are not those by inner product.")
    print(", ".join(f"{name} {value}" for name, value in data.describe().items()), flush=True)
    lists, failed = max(1, round(arguments.lists * len(data.database) ** 0.5)), []
    results = Results(data, vectors.description)
    work = arguments.work or arguments.root / arguments.set / "search"
    for name, make in plan(data, lists, arguments):
        try:
            for searcher in make():
                run(searcher, data, work, results, arguments)
        except Exception:  # hours of other cells must not be lost
            traceback.print_exc()
            failed.append(name)
        gc.collect()
    if arguments.tasks:
        run_tasks(results, arguments)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
