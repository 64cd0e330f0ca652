"""The folder of a collection: a manifest that says what belongs to it, checksums, and one writer at a time."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..codes import bytes_per_vector
from ..saving import check_record
from .documents import Database
from .held import file_digest
from .opening import RESTORE

MANIFEST = "manifest.json"
DATABASE = "collection.sqlite"
LOCK = "writer.lock"
FORMAT = 1
SNAPSHOT = r"scan-\d+\.safetensors"
MAX_LISTS = 1 << 24  # a list holds one vector at least, and as many centroids are compared with each query
CHOICES = {"metric": ("cosine", "inner_product", "l2"), "kind": ("auto", "flat", "ivf")}


class IndexFolder:
    """Files of one collection.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()  # stays the same folder when the process changes to another one
        self.manifest: dict = {}
        self._lock = FileLock(str(self.path / LOCK), timeout=0, thread_local=False)

    @property
    def database(self) -> Path:
        """Where the database is."""
        return self.path / DATABASE

    @property
    def scan(self) -> Path | None:
        """Where the scanner's snapshot is, if there is one."""
        names = [name for name in self.manifest["files"] if name != DATABASE]
        return self.path / names[0] if names else None

    def create(self, settings: dict, source: Database | None = None) -> Database:
        """Makes a new collection and becomes its writer; its manifest comes last.

        Args:
            settings: What the manifest says of the collection.
            source: Another collection's database, to begin with its content.

        Raises:
            ValueError: If the folder holds a collection.
            BlockingIOError: If another process makes one.
        """
        self.begin()
        try:
            database = Database(self.database, create=True)
            if source is not None:
                source.copy_to(database)
            self.write(settings | {"files": {DATABASE: self.record_database(database)}})
        except BaseException:
            self.release()
            raise
        return database

    def begin(self) -> None:
        """Becomes the writer of a folder in which there is no collection yet; errors as in [`create`]."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.claim()
        if (self.path / MANIFEST).exists():
            self.release()
            raise ValueError(f"{self.path} holds an index already: open it with RQMoEIndex.load, or delete it.")
        for leftover in self.path.glob(f"{DATABASE}*"):  # of a process that ended before the manifest was there
            leftover.unlink()

    def open(self, check: bool, immutable: bool = False) -> Database:
        """Opens the database, and checks what the manifest names.

        Raises:
            ValueError: If something is damaged; it names the file.
        """
        if not self.database.is_file():
            raise ValueError(f"{self.database} is missing. {RESTORE}")
        database = Database(self.database, immutable=immutable)
        try:
            with database.reading():
                found = self.problems(database) if check else []
        except ValueError:
            database.close()
            raise
        if found:
            database.close()
            raise ValueError(found[0])
        return database

    def problems(self, database: Database) -> list[str]:
        """What is damaged in the files; inside of a reading transaction."""
        found = []
        version = self.manifest["files"][DATABASE].get("version", -1)
        if version >= 0 and version == database.state().version:
            damage = self.damage(DATABASE)
            if damage is not None and self.read()["files"][DATABASE].get("version") == database.state().version:
                found.append(f"{damage} {RESTORE}")
        else:  # it was not closed since it was changed last, so that only its own checksums are known
            found.extend(database.problems())
        if self.scan is not None and self.scan.exists():  # one that is missing is made anew
            damage = self.damage(self.scan.name)
            if damage is not None:
                found.append(f"{damage} It is derived from {DATABASE}: deleted, it is made anew.")
        return found

    def snapshot(self, name: str, write: Callable[[Path], None]) -> None:
        """Writes a snapshot under a name of its own; the manifest does not name it yet."""
        scratch = self.path / f".{name}.tmp"
        write(scratch)
        replace_durably(scratch, self.path / name)

    def record_database(self, database: Database) -> dict:
        """What the manifest says of the database; nothing that can be checked while SQLite has a log beside it."""
        if not database.is_settled():
            return {"version": -1}
        return self.record(self.database, version=database.state().version)

    def claim(self) -> None:
        """Becomes the one writer, until [`release`] or the end of the process.

        Raises:
            BlockingIOError: If another writer is at work.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"Another process or index writes to {self.path}: there is one writer at a time. Close it first; "
                "reading goes on meanwhile."
            ) from None

    @property
    def is_writer(self) -> bool:
        """Whether this is the one writer."""
        return self._lock.is_locked

    def release(self) -> None:
        """Lets others write."""
        self._lock.release(force=True)

    # --- the manifest --------------------------------------------------------------------------------------------

    def read(self) -> dict:
        """Reads the manifest.

        Raises:
            ValueError: If there is none, or it is damaged.
        """
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(f"{self.path} holds no index: it has no {MANIFEST}.")
        try:
            text = file.read_text("utf-8")
            manifest = json.loads(text)
            del manifest["checksum"]
            whole = text == _written(manifest)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{file} is damaged: its checksum does not fit. {RESTORE}")
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{file} has format {manifest.get('format')}, this package reads format {FORMAT}: update it."
            )
        check_manifest(manifest, file)
        self.manifest = manifest
        return manifest

    def write(self, manifest: dict) -> None:
        """Replaces the manifest in one step, and removes snapshots that it does not name."""
        scratch = self.path / f".{MANIFEST}.tmp"
        scratch.write_text(_written(manifest), "utf-8")
        replace_durably(scratch, self.path / MANIFEST)
        self.manifest = manifest
        for file in [*self.path.glob("scan-*.safetensors"), *self.path.glob(".*.tmp")]:
            if file.name not in manifest["files"]:
                file.unlink(missing_ok=True)

    def record(self, file: Path, **more: int) -> dict:
        """What the manifest says of a file: its size, its checksum, and more."""
        return {"size": file.stat().st_size, "sha256": file_digest(file), **more}

    def damage(self, name: str) -> str | None:
        """What is wrong with a file that the manifest names; None if it is as it was written."""
        file, record = self.path / name, self.manifest["files"][name]
        if not file.is_file():
            return f"{file} is missing."
        size = file.stat().st_size
        if size != record["size"]:
            return f"{file} is damaged: it has {size:,} bytes instead of {record['size']:,}."
        if file_digest(file) != record["sha256"]:
            return f"{file} is damaged: its content is not what was written."
        return None


def verify(folder: str | os.PathLike) -> list[str]:
    """Checks a collection thoroughly: every file's checksum, SQLite's integrity, and every entry's checksum.

    Returns:
        What is damaged, each with the name of its file; nothing if all is well.
    """
    place, found, before = IndexFolder(folder), [], None
    while before != place.manifest:  # damage is none if a writer replaced the files meanwhile
        before = place.manifest
        try:
            place.read()
            with closing(place.open(check=False)) as database, database.reading():
                found = [*place.problems(database), *database.problems()]
        except (ValueError, OSError) as error:
            found = [str(error)]
        if not found:
            return []
    return list(dict.fromkeys(found))


def describe(folder: str | os.PathLike) -> dict[str, str]:
    """What a collection is and holds, in words."""
    place = IndexFolder(folder)
    manifest = place.read()
    made_by = manifest["quantizer"]
    with closing(place.open(check=False)) as database, database.reading() as state:
        count = state.count
    at = f" at revision {made_by['revision']}" if made_by["revision"] else ""
    width = bytes_per_vector(made_by["num_codebooks"], made_by["codebook_size"])
    size = sum(file.stat().st_size for file in place.path.iterdir() if file.is_file())
    return {
        "vectors": f"{count:,}",
        "bytes per vector": f"{width} (float32: {4 * made_by['hidden_size']})",
        "on disk": f"{size / 1e6:.1f} MB, with ids, texts and metadata",
        "quantizer": f"{made_by['model']}{at}, weights {made_by['weights']}",
        "metric": manifest["metric"],
        "scan": manifest["kind"],
        "floats kept": "yes" if manifest["keep_floats"] else "no",
        "ready to scan": "yes" if place.scan is not None and place.scan.exists() else "made when it is first searched",
    }


def check_manifest(manifest: dict, file: Path) -> None:
    """Raises ValueError unless a manifest says what one must say, and names files of its own folder only.

    Its checksum tells that nothing has happened to it, not that it was this package that wrote it.
    """
    lists, files = manifest.get("num_lists", 0), manifest.get("files")
    problems = [f"{name} is {str(manifest.get(name))[:100]}" for name, choices in CHOICES.items()
                if manifest.get(name) not in choices]  # fmt: skip
    if lists is not None and not (type(lists) is int and 1 <= lists <= MAX_LISTS):
        problems.append(f"num_lists must lie between 1 and {MAX_LISTS:,}, it is {str(lists)[:100]}")
    if type(manifest.get("keep_floats")) is not bool:
        problems.append("keep_floats is neither true nor false")
    if not isinstance(manifest.get("encoder", 0), (str, type(None))):
        problems.append("encoder is no name")
    if not isinstance(files, dict) or DATABASE not in files:
        problems.append(f"it does not name {DATABASE}")
    else:
        problems += [f"its entry of {name[:100]} is none of a file of an index" for name, record in files.items()
                     if not (name == DATABASE or re.fullmatch(SNAPSHOT, name)) or not _is_record(record)]  # fmt: skip
    if problems:
        raise ValueError(f"{file} is damaged: {problems[0]}. {RESTORE}")
    check_record(manifest.get("quantizer"), file)


def _is_record(record: object) -> bool:
    """Whether this is what a manifest says of a file; see [`IndexFolder.record`] and its `record_database`."""
    if not isinstance(record, dict):
        return False
    measured = type(record.get("size")) is int and isinstance(record.get("sha256"), str)
    return record == {"version": -1} or (measured and type(record.get("version", 0)) is int)


def replace_durably(scratch: Path, target: Path) -> None:
    """Moves a file into place so that it is whole or not there, also after a power cut."""
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, target)
    with suppress(OSError):  # not every system lets one open a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _written(manifest: dict) -> str:
    """A manifest as text, with its own checksum."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"checksum": checksum}, indent=1) + "\n"
