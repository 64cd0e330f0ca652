"""How calls are timed."""

import statistics
import time
from collections.abc import Callable

import torch


def clock(device: torch.device | None = None) -> float:
    """Seconds, once a device has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(work: Callable[[], object], repeats: int = 5, device: torch.device | None = None) -> float:
    """Median time of one call on a device, after a call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return statistics.median(times)
