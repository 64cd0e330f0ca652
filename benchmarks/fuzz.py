"""Opens damaged and hostile files of every format that the package reads: all must end in a clear error.

    python benchmarks/fuzz.py                      # 100,000 inputs; goes on where it was interrupted
    python benchmarks/fuzz.py --inputs 1000000     # more of them
    python benchmarks/fuzz.py --format "Faiss files" --number 4711    # one input again, with its traceback

An input is decided by its format and number. Each is opened in a forked process with a limit of memory and a watchdog;
what is neither accepted nor refused with a ValueError or OSError that names the file is a finding. Linux only.
"""

import argparse
import logging
import os
import random
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import datasets
import environment
import faiss
import torch
import transformers
from fuzzing.targets import TARGETS, Target
from fuzzing.workers import INPUT, Outcome, run_inputs

STRETCH = 10_000  # inputs between two saves


def prepare(name: str, folder: Path) -> Target:
    """A format with its valid files, which another process makes: one that is forked must have no threads."""
    make, _ = TARGETS[name]
    target = make(folder)
    folder.mkdir()
    child = os.fork()
    if not child:
        quiet()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Faiss warns of few vectors
        target.make()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"The valid files of {name} could not be made.")
    target.prepare()
    return target


def quiet() -> None:
    """Keeps what libraries tell users about files from the screen."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def try_number(target: Target, name: str, place: Path, number: int) -> None:
    """Makes one input and opens it."""
    rng = random.Random(f"{name} {number}")
    target.change(rng, place)
    target.open(rng, place)


def fuzz(name: str, inputs: int, seconds: float) -> Outcome:
    """Tries so many new inputs of a format, as far as the time allows."""
    known = environment.load("fuzz").get("formats", {}).get(name, {})
    done, began = Outcome(**{key: known[key] for key in asdict(Outcome()) if key in known}), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        target, place = prepare(name, Path(scratch) / "valid"), Path(f"{scratch}{INPUT}")
        os.environ["HF_DATASETS_CACHE"] = scratch
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "cache"
        place.mkdir()
        while done.tried < inputs and time.monotonic() - began < seconds:
            stop = min(inputs, done.tried + STRETCH)
            stop = min(stop, done.tried + 500) if "rows" in name or "index" in name else stop
            run_inputs(lambda number: try_number(target, name, place, number), done.tried, stop, done)
            shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
            spent = known.get("seconds", 0) + time.monotonic() - began
            save(name, done, spent)
    return done


def save(name: str, outcome: Outcome, seconds: float) -> None:
    """Writes the counts of one format beside those of the others."""
    results = environment.load("fuzz")
    formats = results.get("formats", {}) | {name: asdict(outcome) | {"seconds": round(seconds, 1)}}
    total = {key: sum(one[key] for one in formats.values()) for key in ("tried", "accepted")}
    total |= {"refused": sum(sum(one["refused"].values()) for one in formats.values())}
    total |= {"findings": sum(count for one in formats.values() for _, count in one["findings"].values())}
    environment.save("fuzz", {"environment": environment.describe(), "total": total, "formats": formats})


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all, those of earlier runs included")
    parser.add_argument("--minutes", type=float, default=12, help="for all formats")
    parser.add_argument("--format", choices=list(TARGETS), help="only this one")
    parser.add_argument("--number", type=int, help="open one input of the format in this process")
    parser.add_argument("--afresh", action="store_true", help="forget the counts of earlier runs")
    options = parser.parse_args()
    quiet()
    if options.number is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            target, place = prepare(options.format, Path(scratch) / "valid"), Path(f"{scratch}{INPUT}")
            place.mkdir()
            try_number(target, options.format, place, options.number)
            return print("accepted")
    if options.afresh:
        environment.save("fuzz", {})
    names = [options.format] if options.format else list(TARGETS)
    whole = sum(share for _, share in TARGETS.values())
    for name in names:
        share = TARGETS[name][1] / whole
        outcome = fuzz(name, round(options.inputs * share), 60 * options.minutes / len(names))
        print(f"{name}: {outcome.tried:,} tried, {outcome.accepted:,} accepted, {len(outcome.findings)} findings")
        for what, (number, count) in outcome.findings.items():
            print(f"  {count:,} x {what}, for example input {number}")


if __name__ == "__main__":
    main()
