"""The database of a collection: ids, codes, texts and metadata in SQLite, the only truth about what it holds.

Every vector has a row number that is never used again, so that whatever was derived from the database is brought up to
date by the rows above the highest one it knows, and by the rows removed since.
"""

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .filters import Filter, compile_filter
from .held import hold_for
from .opening import RESTORE, is_settled_for_readers, why_not_opened

Id = int | str
SCHEMA = (
    "CREATE TABLE state (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    "CREATE TABLE vectors (row INTEGER PRIMARY KEY, id NOT NULL UNIQUE, code BLOB NOT NULL, "
    "checksum INTEGER NOT NULL)",
    "CREATE TABLE documents (row INTEGER PRIMARY KEY, text TEXT, metadata TEXT)",
    "CREATE TABLE floats (row INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE removed (number INTEGER PRIMARY KEY AUTOINCREMENT, row INTEGER NOT NULL)",
)
CHUNK = 16_384
BOUND = 10_000  # values in one statement
BUSY_SECONDS = 30
CHECKPOINT_MILLISECONDS = 200
MAPPED_BYTES = 1 << 30


class DamagedRowsError(ValueError):
    """Rows are not what was written; the transaction around it adds the name of the file."""


@dataclass
class State:
    """What one transaction leaves to the next.

    Args:
        version: Number of transactions so far.
        count: Vectors in the collection.
        next_row: Number of the next row.
        next_id: The id that a vector gets that comes without one.
        forgotten: Number of the last removal that is not on record any more.
        sources: JSON object: how many rows of each source are in, for additions that go on after an interruption;
            below 0 if some may have been removed since.
    """

    version: int = 0
    count: int = 0
    next_row: int = 1
    next_id: int = 0
    forgotten: int = 0
    sources: str = "{}"

    @property
    def checksum(self) -> int:
        """CRC-32 over all of it."""
        return zlib.crc32(repr(self).encode())

    @property
    def is_possible(self) -> bool:
        """Whether the numbers are such as this package writes."""
        numbers = (self.version, self.count, self.next_row, self.next_id, self.forgotten)
        if not all(type(number) is int and number >= 0 for number in numbers) or self.count >= self.next_row:
            return False
        try:
            sources = json.loads(self.sources)
        except (TypeError, ValueError, RecursionError):
            return False
        return isinstance(sources, dict) and all(type(rows) is int for rows in sources.values())


@dataclass
class Document:
    """A text with its id and metadata; the text is None where only a vector was added."""

    id: Id
    text: str | None
    metadata: dict


@dataclass
class Row:
    """What is written for one vector; `floats` are the bytes of float16 values."""

    id: Id
    code: bytes
    text: str | None = None
    metadata: str | None = None
    floats: bytes | None = None

    @property
    def checksum(self) -> int:
        """CRC-32 over all of it."""
        checksum = zlib.crc32(repr(self.id).encode() if isinstance(self.id, int) else b"s" + self.id.encode())
        for part in (self.code, self.text, self.metadata, self.floats):
            written = part.encode() if isinstance(part, str) else part
            length = b"none" if written is None else len(written).to_bytes(8, "little")
            checksum = zlib.crc32(written or b"", zlib.crc32(length, checksum))
        return checksum


class Database:
    """Reads and writes of one collection. All methods may be called from any thread.

    Args:
        file: The database; None for a temporary one, which SQLite keeps in a nameless file and its cache.
        create: Make a new one.
        immutable: The file lies where nothing can be written, and nobody else writes it.

    Raises:
        ValueError: If the file is no database of a collection.
    """

    def __init__(self, file: Path | None, create: bool = False, immutable: bool = False):
        self.lock = threading.RLock()
        self.file, self._inside, self._closed = file, 0, False
        self._checked: tuple[int | None, State] = None, State()
        immutable = immutable or (file is not None and not create and is_settled_for_readers(file))
        mode = "immutable=1" if immutable else "mode=rwc" if create else "mode=rw"
        uri = "" if file is None else f"{file.absolute().as_uri()}?{mode}"
        try:
            self._held = None if file is None else hold_for(self, file, create)
            self._connection = sqlite3.connect(
                uri, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=file is not None
            )
            try:
                self._configure(create or file is None, immutable)
            except BaseException:
                self.close()
                raise
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last if SQLite names a damaged name
            raise ValueError(f"{file} {why_not_opened(error)}") from error

    def _configure(self, create: bool, immutable: bool) -> None:
        run = self._connection.execute
        self._connection.create_function("casefold", 1, _casefold, deterministic=True)
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA cell_size_check = OFF")  # see [`_checked_pages`]
        run(f"PRAGMA mmap_size = {MAPPED_BYTES}")
        run("PRAGMA synchronous = FULL")
        if create:
            run("PRAGMA journal_mode = WAL")
            with self.writing() as state:
                for statement in SCHEMA:
                    run(statement)
                state.version = 0
        found = {row[0] for row in run("SELECT sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")}
        if found != set(SCHEMA):
            raise ValueError(
                f"{self.file} is damaged or of another version of this package: its tables are others. {RESTORE}"
            )
        if not create and not immutable:
            run("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        """Closes the connection; the last one to do so leaves a single file."""
        with self.lock:
            self._closed = True
            self._connection.close()
            if self._held is not None:
                self._held()

    # --- transactions --------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[State]:
        """What is read within belongs to one committed state."""
        with self.lock:
            if self._inside:
                yield self.state()
                return
            with self._transaction("BEGIN"):
                yield self.state()

    @contextmanager
    def writing(self) -> Iterator[State]:
        """What is written within is committed together, with the state as the block leaves it, or not at all."""
        with self.lock:
            with self._transaction("BEGIN IMMEDIATE"), self._checked_pages():
                state = self.state() if self._has_tables() else State()
                yield state
                state.version += 1
                values = vars(state) | {"checksum": state.checksum}
                self._connection.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", values.items())
            # A log with committed pages would be a second place where damage could go unnoticed. Readers may keep it
            # from being emptied; the next change does it then.
            self._connection.execute(f"PRAGMA busy_timeout = {CHECKPOINT_MILLISECONDS}")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("A transaction is open already.")
        if self._closed:
            raise ValueError("The index is closed: open its folder again with RQMoEIndex.load.")
        try:
            self._connection.execute(begin)
            self._inside += 1
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            finally:
                self._inside -= 1
        except DamagedRowsError as error:
            raise ValueError(f"{self.file or 'The temporary database'} is damaged: {error}. {RESTORE}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.file or 'The temporary database'} cannot be read or written: {error}.") from error

    @contextmanager
    def _checked_pages(self) -> Iterator[None]:
        """Pages are refused within whose cells do not fit, so that damage does not spread to what is written.

        From a memory map a page counts as new whenever it is come to. Checks that belong to reading would make looking
        up codes twice as slow.
        """
        self._connection.execute("PRAGMA cell_size_check = ON")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA cell_size_check = OFF")

    def _has_tables(self) -> bool:
        return self._connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'state'").fetchone() is not None

    def state(self) -> State:
        """The numbers of the last commit.

        Raises:
            ValueError: If they are damaged.
        """
        values = dict(self._connection.execute("SELECT name, value FROM state"))
        checksum = values.pop("checksum", None)
        if checksum is not None and checksum == self._checked[0] and values == vars(self._checked[1]):
            return replace(self._checked[1])
        if set(values) != {field.name for field in fields(State)} or State(**values).checksum != checksum:
            raise ValueError(f"{self.file} is damaged: the checksum of its state does not fit. {RESTORE}")
        state = State(**values)
        if not state.is_possible:  # the checksum fits, but this package never wrote that
            raise ValueError(f"{self.file} is damaged: its state is {str(values)[:200]}. {RESTORE}")
        self._checked = checksum, replace(state)  # checking takes longer than many a search
        return state

    # --- rows ----------------------------------------------------------------------------------------------------

    def find(self, ids: Iterable[Id]) -> dict[Id, int]:
        """Row numbers by id; unknown ids are left out."""
        query = "SELECT id, row FROM vectors WHERE id IN ({})"
        return {id: row for id, row in self._many(query, ids)}

    def ids_of(self, rows: Iterable[int]) -> dict[int, Id]:
        """Ids by row number."""
        return dict(self._many("SELECT row, id FROM vectors WHERE row IN ({})", rows))

    def ids_and_codes_of(self, rows: Iterable[int]) -> dict[int, tuple[Id, bytes]]:
        """Ids and packed codes by row number."""
        found = self._many("SELECT row, id, code FROM vectors WHERE row IN ({})", rows)
        return {row: (id, code) for row, id, code in found}

    def codes_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Packed codes by row number."""
        return dict(self._many("SELECT row, code FROM vectors WHERE row IN ({})", rows))

    def floats_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Bytes of the float16 vectors by row number; rows without are left out."""
        return dict(self._many("SELECT row, vector FROM floats WHERE row IN ({})", rows))

    def documents_of(self, rows: Iterable[int]) -> dict[int, Document]:
        """Documents by row number."""
        query = "SELECT row, id, text, metadata FROM vectors LEFT JOIN documents USING (row) WHERE row IN ({})"
        try:
            return {
                row: Document(id, text, json.loads(metadata) if metadata else {})
                for row, id, text, metadata in self._many(query, rows)
            }
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedRowsError(f"metadata in it are no JSON ({error})") from error

    def rows_of(self, rows: Sequence[int]) -> list[Row]:
        """All that is known of rows, in their order."""
        query = (
            "SELECT row, id, code, text, metadata, vector FROM vectors LEFT JOIN documents USING (row) "
            "LEFT JOIN floats USING (row) WHERE row IN ({})"
        )
        return in_order({row: Row(*values) for row, *values in self._many(query, rows)}, rows)

    def matching(self, filter: Filter | None, after: int = 0, limit: int = -1) -> np.ndarray:
        """Row numbers of the documents that a filter holds for, int64, ascending."""
        condition, values = ("1", []) if filter is None else compile_filter(filter)
        source = "SELECT row FROM vectors"
        if filter:  # a document without metadata has empty ones, for which the opposites of conditions hold
            columns = "row, id, coalesce(metadata, '{}') AS metadata"
            source = f"SELECT {columns} FROM vectors LEFT JOIN documents USING (row)"
        query = f"SELECT row FROM ({source} WHERE row > ? ORDER BY row) WHERE {condition} LIMIT ?"
        try:
            found = self._connection.execute(query, [after, *values, limit])
            return np.fromiter((row for (row,) in found), np.int64)
        except sqlite3.OperationalError as error:
            if "malformed JSON" in str(error):
                raise DamagedRowsError("metadata in it are no JSON") from error
            raise ValueError(f"The filter is too large or too deep for SQLite: {error}.") from error

    def rows_at(self, places: np.ndarray) -> np.ndarray:
        """Row numbers at places in the order of all rows, counted from 0: int64, ascending as the places are."""
        found, start = [], 0
        cursor = self._connection.execute("SELECT row FROM vectors ORDER BY row")
        while listed := cursor.fetchmany(CHUNK):
            rows = np.array(listed, np.int64)[:, 0]
            first, last = np.searchsorted(places, [start, start + len(rows)])
            found.append(rows[places[first:last] - start])
            start += len(rows)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def batches(self, after: int = 0, size: int = CHUNK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers, int64 `(n,)`, and codes, uint8 `(n, bytes)`, of all rows above one, in order."""
        while True:
            query = "SELECT row, code FROM vectors WHERE row > ? ORDER BY row LIMIT ?"
            found = self._connection.execute(query, (after, size)).fetchall()
            if not found:
                return
            rows = np.array([row for row, _ in found], np.int64)
            yield rows, codes_array([code for _, code in found])
            after = int(rows[-1])

    def insert(self, rows: Iterable[Row], state: State) -> None:
        """Adds rows whose ids are new, inside of [`writing`]; their numbers are counted in its state."""
        numbered = enumerate(rows, state.next_row)
        while part := list(islice(numbered, CHUNK)):
            state.next_row = part[-1][0] + 1
            vectors = [(number, row.id, row.code, row.checksum) for number, row in part]
            documents = [
                (number, row.text, row.metadata)
                for number, row in part
                if row.text is not None or row.metadata is not None
            ]
            floats = [(number, row.floats) for number, row in part if row.floats is not None]
            self._connection.executemany("INSERT INTO vectors VALUES (?, ?, ?, ?)", vectors)
            self._connection.executemany("INSERT INTO documents VALUES (?, ?, ?)", documents)
            self._connection.executemany("INSERT INTO floats VALUES (?, ?)", floats)

    def delete(self, rows: Iterable[int]) -> None:
        """Removes rows by number, inside of [`writing`]."""
        numbers = [(int(row),) for row in rows]
        for statement in ("DELETE FROM vectors WHERE row = ?", "DELETE FROM documents WHERE row = ?",
                          "DELETE FROM floats WHERE row = ?", "INSERT INTO removed (row) VALUES (?)"):  # fmt: skip
            self._connection.executemany(statement, numbers)

    def removed(self, after: int) -> tuple[np.ndarray, int]:
        """Rows removed since the removal numbered `after`, int64, and the number of the last removal."""
        found = self._connection.execute("SELECT number, row FROM removed WHERE number > ? ORDER BY number", (after,))
        pairs = np.fromiter((value for pair in found for value in pair), np.int64).reshape(-1, 2)
        return np.ascontiguousarray(pairs[:, 1]), int(pairs[-1, 0]) if len(pairs) else after

    def last_removal(self) -> int:
        """Number of the last removal."""
        return self._connection.execute("SELECT coalesce(max(number), 0) FROM removed").fetchone()[0]

    def forget_removals(self, upto: int) -> None:
        """Drops the record of removals, inside of [`writing`]: what was derived before them must be made anew."""
        self._connection.execute("DELETE FROM removed WHERE number <= ?", (upto,))

    def problems(self) -> list[str]:
        """What is damaged, inside of [`reading`]: SQLite's own check, then every row's checksum, then the counts."""
        run = self._connection.execute
        found = [text for (text,) in run("PRAGMA integrity_check(5)") if text != "ok"]
        if found:
            return [f"{self.file} is damaged: {text}. {RESTORE}" for text in found]
        query = (
            "SELECT vectors.checksum, vectors.row, id, code, text, metadata, vector FROM vectors LEFT JOIN documents "
            "USING (row) LEFT JOIN floats USING (row) ORDER BY row"
        )
        bad = [id for checksum, _, id, *values in run(query) if not _is_intact(Row(id, *values), checksum)]
        if bad:
            shown = ", ".join(map(repr, bad[:5]))
            found.append(f"the checksums of {len(bad)} entries do not fit, with ids {shown}")
        (count,), expected = run("SELECT count(*) FROM vectors").fetchone(), self.state().count
        if count != expected:
            found.append(f"it holds {count:,} vectors instead of {expected:,}")
        return [f"{self.file} is damaged: {text}. {RESTORE}" for text in found]

    def copy_to(self, other: "Database") -> None:
        """Makes another database an exact copy."""
        with self.lock, other.lock:
            self._connection.backup(other._connection)
            other._connection.execute("PRAGMA journal_mode = WAL")

    def is_settled(self) -> bool:
        """Whether all that was committed is in the one file, and none of it still in SQLite's log."""
        log = Path(f"{self.file}-wal")
        return not log.exists() or not log.stat().st_size

    def resolve(self, ids: Sequence[Id], duplicates: str) -> tuple[list[int], list[int]]:
        """Which ids are to be added, inside of [`writing`].

        Args:
            ids: What the user gave.
            duplicates: "error", "skip" or "replace".

        Returns:
            Their places in `ids`, and the rows that they replace.

        Raises:
            ValueError: If an id is not of the collection's kind, or is there or comes twice and must not.
        """
        kind = self.id_type()
        if ids and kind is not None and not isinstance(ids[0], kind):
            raise ValueError(f"The ids of this index are of type {kind.__name__}, got {ids[0]!r}: one kind per index.")
        known = self.find(ids)
        last = {id: place for place, id in enumerate(ids)}
        if duplicates == "replace":
            return sorted(last.values()), list(known.values())
        first = {id: len(ids) - 1 - place for place, id in enumerate(reversed(ids))}
        if duplicates == "error" and (known or len(first) < len(ids)):
            twice = [id for id in first if id in known or first[id] != last[id]]
            raise ValueError(
                f"{len(twice)} ids are in the index already or come twice: {', '.join(map(repr, twice[:5]))}. Give "
                "others, or duplicates='skip' or 'replace'."
            )
        return sorted(place for id, place in first.items() if id not in known), []

    def id_type(self) -> type[int] | type[str] | None:
        """Whether ids are integers or strings; None if there are none."""
        found = self._connection.execute("SELECT id FROM vectors LIMIT 1").fetchone()
        return None if found is None else type(found[0])

    def _many(self, query: str, values: Iterable) -> Iterator[tuple]:
        if isinstance(values, np.ndarray):
            values = values.tolist()
        values = [value.item() if isinstance(value, np.generic) else value for value in values]
        for start in range(0, len(values), BOUND):
            part = values[start : start + BOUND]
            yield from self._connection.execute(query.format(",".join("?" * len(part))), part).fetchall()


def _is_intact(row: Row, checksum: object) -> bool:
    """Whether a row is what was written; one with values of other types is not."""
    try:
        return row.checksum == checksum
    except (TypeError, AttributeError):
        return False


def _casefold(value: object) -> str | None:
    """A string whose case does not matter, for filters: SQLite's own `lower` knows ASCII only."""
    return value.casefold() if isinstance(value, str) else None


def in_order(found: dict[int, Any], rows: Iterable[int]) -> list[Any]:
    """What was found of rows, in their order.

    Raises:
        ValueError: If there is nothing of one of them, although another table or an index names it.
    """
    try:
        return [found[row] for row in rows]
    except KeyError as error:
        raise DamagedRowsError(f"its row {error} is missing or named wrongly") from error


def codes_array(codes: Sequence[bytes]) -> np.ndarray:
    """Packed codes as uint8 `(n, bytes)`.

    Raises:
        ValueError: If they are no bytes, or their lengths differ.
    """
    if not all(type(code) is bytes for code in codes) or len({len(code) for code in codes}) > 1:
        raise DamagedRowsError("its codes have different lengths, or are no bytes")
    return np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), -1)


def floats_array(floats: bytes, size: int) -> np.ndarray:
    """A kept vector, float16 `(size,)`.

    Raises:
        ValueError: If it is none.
    """
    if type(floats) is not bytes or len(floats) != 2 * size:
        raise DamagedRowsError(f"one of its vectors is not one of {size} float16 values")
    return np.frombuffer(floats, np.float16)
