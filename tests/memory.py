"""How much memory something takes at its peak."""

from contextlib import contextmanager
from pathlib import Path

PROCESS = Path("/proc/self")


def _peak() -> int:
    """Bytes of memory that the process used at most since the last reset."""
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@contextmanager
def little_memory(allowed: int = 200 << 20):
    """Fails if the process uses much more memory than before, even for a moment; measured on Linux only."""
    if not (PROCESS / "clear_refs").exists():
        yield
        return
    (PROCESS / "clear_refs").write_text("5")  # the peak is now what is used at the moment
    before = _peak()
    yield
    assert _peak() - before < allowed
