"""Files that SQLite works on, read without taking its locks away.

When a process closes any of its descriptors of a file, it loses all POSIX locks that it has on it, also those that
SQLite holds through another descriptor (https://www.sqlite.org/howtocorrupt.html, section 2.2). Another process would
then believe to be the last one, and empty and delete SQLite's log while it is in use. So everything in this package
that opens a database shares one descriptor, which is closed after the last connection.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 20

_lock = threading.RLock()  # a garbage collection while it is held may let go of files


@dataclass
class _Held:
    """A descriptor, and how many use it."""

    descriptor: int | None = None
    users: int = 0


_held: dict[tuple[int, int], _Held] = {}  # by device and inode


def hold(file: Path, create: bool = False) -> tuple[int, int]:
    """Opens a file unless this process has it open already.

    Args:
        file: The file.
        create: Make an empty one if it is not there.

    Returns:
        Its device and inode, for [`let_go`].
    """
    with _lock:
        if create:
            file.touch()
        found = os.stat(file)
        key = found.st_dev, found.st_ino
        held = _held.setdefault(key, _Held())
        held.users += 1  # before anything else, so that it stays open
        try:
            if held.descriptor is None:
                held.descriptor = os.open(file, os.O_RDONLY)
        except BaseException:
            let_go(key)
            raise
        return key


def let_go(key: tuple[int, int]) -> None:
    """Ends one use of a file; the last one closes it. A connection to it must be closed before."""
    with _lock:
        held = _held[key]
        held.users -= 1
        if not held.users:
            del _held[key]
            if held.descriptor is not None:
                os.close(held.descriptor)


def hold_for(owner: object, file: Path, create: bool = False) -> weakref.finalize:
    """As [`hold`], until the result is called, at the latest until the owner is gone."""
    finalizer = weakref.finalize(owner, let_go, hold(file, create))
    finalizer.atexit = False  # connections that are still open then close later
    return finalizer


@contextmanager
def holding(file: Path) -> Iterator[int]:
    """A descriptor of a file for reading; several may read from it at once, so that it is read by offset."""
    key = hold(file)
    try:
        descriptor = _held[key].descriptor
        assert descriptor is not None
        yield descriptor
    finally:
        let_go(key)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    if not hasattr(os, "pread"):  # on Windows, where closing takes no locks away
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    digest, offset = hashlib.sha256(), 0
    with holding(file) as descriptor:
        while piece := os.pread(descriptor, PIECE, offset):
            digest.update(piece)
            offset += len(piece)
    return digest.hexdigest()
