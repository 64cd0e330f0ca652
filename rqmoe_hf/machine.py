"""What a machine is, and whether it is quick in bfloat16."""

import datetime
import logging
import os
import platform
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import transformers

logger = logging.getLogger(__name__)

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # of x86 and of ARM, as Linux names them


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions and date: what every measurement is recorded with."""
    lines = _processor_information().splitlines()
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "bf16_instructions": bool(has_bfloat16()),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "faiss_threads": faiss.omp_get_max_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def has_bfloat16() -> bool | None:
    """Whether the processor has instructions for bfloat16; None if the system does not say."""
    for line in _processor_information().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not BFLOAT16_FLAGS.isdisjoint(flags.split())
    return None


def warn_of_slow_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    """Says so where arithmetic in bfloat16 will take a multiple of that in float32.

    Args:
        dtype: Of the arithmetic.
        device: Where it will be.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and has_bfloat16() is False:
        logger.warning(
            "This processor has no instructions for bfloat16, which takes many times as long as float32 without: use "
            "float32 here."
        )


def _processor_information() -> str:
    """What Linux says of its processors; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8") if file.exists() else ""
