"""How a database is opened where nothing can be written, and what to say if it cannot be opened."""

import os
import sqlite3
from pathlib import Path

RESTORE = "Restore it from a copy."
REFUSED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


def is_settled_for_readers(file: Path) -> bool:
    """Whether a database can only be read, and all of it is in the one file.

    SQLite makes files beside a database even to read it, unless it is told that nobody changes it. Where they are
    there already, somebody may be changing it: then SQLite gets by with them.
    """
    log, shared = Path(f"{file}-wal"), Path(f"{file}-shm")
    if os.access(file, os.W_OK) and os.access(file.parent, os.W_OK):
        return False
    return not shared.exists() and not (log.exists() and log.stat().st_size)


def why_not_opened(error: Exception) -> str:
    """The end of a message on a database that could not be opened: whether it is damaged, or nobody could look."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without what extends it
    if not isinstance(error, OSError) and code not in REFUSED:
        return f"is damaged or no database of a collection: {error}. {RESTORE}"
    return (
        f"cannot be opened: {error}. It must be readable; and if its last writer was killed, with changes in the log "
        "beside it (-wal), it must be opened once by somebody who may write to its folder."
    )
