"""Runs inputs in forked processes with little memory, which may crash or hang without harm."""

import mmap
import os
import pickle
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

MEMORY_BYTES = 1 << 30  # that a process may reserve beyond what it began with
GROWTH_BYTES = 256 << 20  # of its resident memory; the seeds are a few kilobytes
HANG_SECONDS = 10
CHUNK = 2_000  # inputs per process
INPUT = "/the-input"  # the folder of the files; what is refused must be named
UNCLEAR = ("UnicodeDecodeError", "UnicodeEncodeError", "JSONDecodeError")  # ValueErrors that are not meant for users


@dataclass
class Outcome:
    """What became of the inputs of one format.

    Args:
        tried: How many there were.
        accepted: How many were opened and used without an error.
        refused: Types of errors that are meant for users, and how often each came.
        findings: What must not happen, each with the number of an input that does it and how often it came.
    """

    tried: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    findings: dict[str, list[int]] = field(default_factory=dict)

    def found(self, what: str, number: int) -> None:
        """Notes a finding."""
        first, count = self.findings.get(what, [number, 0])
        self.findings[what] = [first, count + 1]

    def add(self, other: "Outcome") -> None:
        """Takes over what another process has counted."""
        self.tried += other.tried
        self.accepted += other.accepted
        for name, count in other.refused.items():
            self.refused[name] = self.refused.get(name, 0) + count
        for what, (first, count) in other.findings.items():
            known = self.findings.get(what, [first, 0])
            self.findings[what] = [known[0], known[1] + count]


def run_inputs(try_input: Callable[[int], None], start: int, stop: int, outcome: Outcome) -> None:
    """Tries the inputs from one number to another; whatever they do to a process, the next one goes on after it."""
    while start < stop:
        end = min(start + CHUNK, stop)
        shared, (read, write) = mmap.mmap(-1, 8), os.pipe()
        child = os.fork()
        if not child:
            _work(try_input, start, end, shared, write)
        os.close(write)
        status, at, part = _watch(child, shared, read)
        outcome.add(part)
        if status is None:
            start = end
            continue
        # The process is gone with its counts; what it did before is tried again up to the input that ended it.
        if at > start:
            run_inputs(try_input, start, at, outcome)
        outcome.tried += 1
        outcome.found(status, at)
        start = at + 1


def _watch(child: int, shared: mmap.mmap, read: int) -> tuple[str | None, int, Outcome]:
    """Waits for a process: how it ended badly or None, the input that it was at, and what it counted."""
    os.set_blocking(read, False)
    received, last, since, status = b"", -1, time.monotonic(), None
    while True:
        ended, code = os.waitpid(child, os.WNOHANG)
        try:
            while part := os.read(read, 1 << 20):
                received += part
        except BlockingIOError:
            pass
        at = struct.unpack("q", shared[:8])[0]
        if ended:
            break
        if at != last:
            last, since = at, time.monotonic()
        elif time.monotonic() - since > HANG_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "hang", at, Outcome()
        time.sleep(0.005)
    os.close(read)
    if os.WIFSIGNALED(code):
        status = f"crash by {signal.Signals(os.WTERMSIG(code)).name}"
    elif os.WEXITSTATUS(code) or not received:
        status = f"exit with status {os.WEXITSTATUS(code)}"
    return status, at, pickle.loads(received) if status is None else Outcome()


def _work(try_input: Callable[[int], None], start: int, stop: int, shared: mmap.mmap, write: int) -> None:
    """The life of a process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        reserved = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + MEMORY_BYTES,) * 2)
    outcome = Outcome()
    for number in range(start, stop):
        shared[:8] = struct.pack("q", number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome.tried += 1
        try:
            try_input(number)
            outcome.accepted += 1
        except (ValueError, OSError) as error:
            name = type(error).__name__
            outcome.refused[name] = outcome.refused.get(name, 0) + 1
            if name in UNCLEAR:
                outcome.found(f"{name}: {_place(error)}", number)
            elif INPUT not in str(error):
                outcome.found(f"the file is not named: {_place(error)}", number)
            if any(sign in str(error) for sign in ("MemoryError", "allocate memory", "bad_alloc")):
                outcome.found(f"allocation: {_place(error)}", number)
        except BaseException as error:
            outcome.found(f"{type(error).__name__}: {_place(error)}", number)
        if 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > GROWTH_BYTES:
            outcome.found("memory", number)
    with os.fdopen(write, "wb") as file:
        file.write(pickle.dumps(outcome))
    os._exit(0)


def _place(error: BaseException) -> str:
    """The innermost line of this package, then of all, that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "rqmoe_hf" in frame.filename] or frames
    return " <- ".join(f"{os.path.basename(frame.filename)}:{frame.name}" for frame in (frames[-1], ours[-1]))
