"""What every results file records: machine, versions, date."""

import json
import os
from pathlib import Path

import rqmoe_hf
from rqmoe_hf.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def describe() -> dict:
    """Processor, threads, versions and date of this run."""
    return describe_machine() | {"rqmoe_hf": rqmoe_hf.__version__}


def save(name: str, results: dict) -> None:
    """Writes `results/<name>.json`, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    scratch = RESULTS / f".{name}.tmp"
    scratch.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(scratch, RESULTS / f"{name}.json")


def load(name: str) -> dict:
    """Reads `results/<name>.json`, or gives an empty dictionary."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}
