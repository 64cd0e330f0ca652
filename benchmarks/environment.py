"""What every results file records: machine, versions, date."""

import datetime
import json
import os
import platform
from pathlib import Path

import faiss
import numpy as np
import torch
import transformers

import rqmoe_hf

RESULTS = Path(__file__).parent / "results"


def describe() -> dict:
    """Processor, threads, versions and date of this run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "bf16_instructions": "avx512_bf16" in flags or "amx_bf16" in flags,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "faiss_threads": faiss.omp_get_max_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "rqmoe_hf": rqmoe_hf.__version__,
    }


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
