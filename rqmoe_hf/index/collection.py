"""What is in a collection, and how it is changed."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..modeling_rqmoe import RQMoEModel
from .documents import CHUNK, Database, Document, Id, State, codes_array, in_order
from .filters import Filter
from .inputs import INT64, as_ids, check_lengths, ids_array
from .intake import Batch, Encoder, Intake
from .ranking import Ranker
from .settings import Duplicates, check_choice
from .storage import IndexFolder
from .tables import SourceTable


class Collection:
    """Codes with ids, texts and metadata: all of [`RQMoEIndex`] but searching, saving and sharing.

    Args:
        quantizer: Makes the codes.
        settings: What the collection is.
        encoder: Embeds texts; None for the one that the settings or the quantizer name.
        database: What is in it.
        folder: Where it is; None for one in this process.
        read_only: Refuse changes.
    """

    def __init__(
        self,
        quantizer: RQMoEModel,
        settings: dict[str, Any],
        encoder: Encoder | None,
        database: Database,
        folder: IndexFolder | None,
        read_only: bool = False,
    ):
        self.quantizer = quantizer
        self.settings = {name: value for name, value in settings.items() if name != "files"}
        self._database, self._folder, self._read_only = database, folder, read_only
        steps, encoder = settings["quantizer"]["num_codebooks"], encoder or settings["encoder"]
        self._intake = Intake(quantizer, steps, encoder or quantizer.config.base_model, settings["keep_floats"])
        metric, kind, lists = settings["metric"], settings["kind"], settings["num_lists"]
        self._ranker = Ranker(quantizer, database, steps, metric, kind, lists)

    # --- what is in it -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with self._database.reading() as state:
            return state.count

    def __contains__(self, id: Id) -> bool:
        with self._database.reading():
            return bool(self._database.find([id]))

    @property
    def id_type(self) -> type[int] | type[str] | None:
        """Whether ids are integers or strings; None while the index is empty."""
        with self._database.reading():
            return self._database.id_type()

    @property
    def folder(self) -> Path | None:
        """Where the collection is; None if it is in this process only."""
        return None if self._folder is None else self._folder.path

    @property
    def version(self) -> int:
        """A number that every change raises, also those of other processes."""
        with self._database.reading() as state:
            return state.version

    @property
    def scanned_bytes(self) -> int | None:
        """Bytes of each vector in memory for scanning: code, the code of its norm, row number. None before a scan."""
        return None if self._ranker.scanner is None else self._ranker.scanner.bytes_per_vector

    @contextmanager
    def reading(self) -> Iterator[None]:
        """All that is read within belongs to one state; nothing can be changed within, and other threads wait."""
        with self._database.reading():
            yield

    def codes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All ids, int64 or strings `(n,)`, and packed codes, uint8 `(n, bytes)`, in batches of one state.

        Until it is exhausted or closed, other threads wait for it.
        """
        with self._database.reading():
            for rows, codes in self._database.batches():
                ids = self._database.ids_of(rows)
                yield ids_array([ids[row] for row in rows.tolist()]), codes

    def get(self, ids: Iterable[Id], missing_ok: bool = False) -> list[Document]:
        """Texts and metadata.

        Args:
            ids: Of the documents.
            missing_ok: Leave unknown ids out.

        Raises:
            ValueError: If an id is unknown.
        """
        with self._database.reading():
            rows = self._rows(ids, missing_ok)
            found = self._database.documents_of(rows)
            return in_order(found, rows)

    def documents(self, filter: Filter | None = None) -> Iterator[Document]:
        """All documents that a filter holds for, in the order in which they were added or last updated.

        Documents that change while they are gone through may come in either state, or in both.
        """
        after = 0
        while True:
            with self._database.reading():
                rows = self._database.matching(filter, after, CHUNK).tolist()
                found = self._database.documents_of(rows)
                listed = in_order(found, rows)
            yield from listed
            if len(rows) < CHUNK:
                return
            after = rows[-1]

    def count(self, filter: Filter | None = None) -> int:
        """How many vectors a filter holds for; see `rqmoe_hf.index.filters`."""
        with self._database.reading() as state:
            return state.count if filter is None else len(self._database.matching(filter))

    def reconstruct(self, ids: Iterable[Id]) -> np.ndarray:
        """What the codes restore, float32 `(n, hidden_size)`; of norm 1 if the quantizer's embeddings are.

        Raises:
            ValueError: If an id is unknown.
        """
        with self._database.reading():
            rows = self._rows(ids, missing_ok=False)
            codes = in_order(self._database.codes_of(rows), rows)
            packed = codes_array(codes) if codes else None
        if packed is None:
            return np.empty((0, self.quantizer.config.hidden_size), np.float32)
        return self._ranker.restore(packed)

    def _rows(self, ids: Iterable[Id], missing_ok: bool) -> list[int]:
        """Row numbers of ids, in their order."""
        listed = as_ids(ids)
        found = self._find(listed, missing_ok)
        return [found[id] for id in listed if id in found]

    def _find(self, ids: list[Id], missing_ok: bool) -> dict[Id, int]:
        """Row numbers by id."""
        found = self._database.find(ids)
        unknown = [id for id in ids if id not in found]
        if unknown and not missing_ok:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"{len(unknown)} of {len(ids)} ids are not in the index: {shown}.")
        return found

    # --- changes -------------------------------------------------------------------------------------------------

    def add(
        self,
        embeddings: Any = None,
        *,
        texts: Iterable[str] | None = None,
        codes: np.ndarray | None = None,
        ids: Iterable[Id] | None = None,
        metadata: Iterable[dict | None] | None = None,
        duplicates: Duplicates = "error",
    ) -> np.ndarray:
        """Adds vectors with their documents, all of them or none.

        Args:
            embeddings: Floats `(n, hidden_size)`, an array, a tensor or lists.
            texts: Kept as the documents' texts. Without embeddings and codes the encoder embeds them.
            codes: Packed codes of this quantizer instead of embeddings, uint8 `(n, bytes)`.
            ids: Integers of 64 bits, or strings; one kind per index. Default: integers, counting on.
            metadata: One JSON dictionary each, or None.
            duplicates: What to do with ids that are there or come twice: "error"; "skip", so that what came first
                stays; or "replace", so that what came last stays.

        Returns:
            The ids that were added, int64 `(n,)` or an array of strings.

        Raises:
            ValueError: If something is not as described, an id is there already, or nothing gives the vectors.
            BlockingIOError: If another index writes to the folder.
        """
        return self._add(self._intake.batch(embeddings, texts, codes, metadata), ids, duplicates)

    def _add(
        self, batch: Batch, ids: Iterable[Id] | None, duplicates: Duplicates, source: tuple[str, int] | None = None
    ) -> np.ndarray:
        """Adds a batch; the same transaction notes how many rows of a source are in."""
        check_choice("duplicates", duplicates, ("error", "skip", "replace"))
        given = None if ids is None else as_ids(ids)
        check_lengths(len(batch), ids=given)
        with self._writing() as state:
            given = _counted(state, len(batch)) if given is None else given
            places, replaced = self._database.resolve(given, duplicates)
            self._database.delete(replaced)
            self._database.insert((batch.row(place, given[place]) for place in places), state)
            added = [given[place] for place in places]
            state.count += len(added) - len(replaced)
            following = (min(id + 1, INT64.max) for id in added if isinstance(id, int))
            state.next_id = max([state.next_id, *following])
            if source is not None:
                state.sources = json.dumps(json.loads(state.sources) | dict([source]))
        return ids_array(added)

    def add_from(
        self,
        source: str | os.PathLike | np.ndarray | Dataset,
        *,
        column: str = "embeddings",
        text_column: str = "text",
        id_column: str = "id",
        metadata_columns: Sequence[str] = (),
        split: str = "train",
        batch_size: int = CHUNK,
        duplicates: Duplicates = "error",
        show_progress_bar: bool = True,
    ) -> int:
        """Adds a whole table, batch by batch. What was interrupted goes on when it is called again.

        A table that is in already is passed over, unless vectors were removed from the index since: then it is gone
        through again, and `duplicates` says what becomes of ids that are still there.

        Args:
            source: Embeddings or texts in whatever `rqmoe_hf.data.load_embeddings` and `load_table` open, an array, a
                data set, or codes of `rqmoe compress`. Columns named as below are used if they are there; without
                embeddings and `codes` the encoder embeds the texts.
            column: Of the embeddings.
            text_column: Of the texts.
            id_column: Of the ids.
            metadata_columns: Become the metadata.
            split: Of a data set on the Hub.
            batch_size: Rows per transaction.
            duplicates: As in [`add`].
            show_progress_bar: Show one.

        Returns:
            How many rows were read now.

        Raises:
            ValueError: As [`add`]; or because a column is missing, or rows without ids may have been removed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        table = SourceTable(source, self.quantizer, column, text_column, id_column, metadata_columns, split)
        done, sign = self._progress(table)
        bar = tqdm(total=len(table), initial=done, desc="index", unit="vector", disable=not show_progress_bar)
        with bar:
            for start in range(done, len(table), batch_size):
                stop = min(start + batch_size, len(table))
                ids, *parts = table.batch(start, stop)
                self._add(self._intake.batch(*parts), ids, duplicates, (table.name, sign * stop))
                bar.update(stop - start)
        return len(table) - done

    def _progress(self, table: SourceTable) -> tuple[int, int]:
        """How many rows of a table need not be read again, and -1 if some of them may have been removed, otherwise 1.

        What is missing of a table that was interrupted are its later rows, whatever was removed. One that was read to
        its end is complete as long as nothing was removed.
        """
        with self._database.reading() as state:
            known = json.loads(state.sources).get(table.name, 0)
        if known != -len(table) or not known:
            return abs(known), -1 if known < 0 else 1
        if not table.has_ids:
            raise ValueError(
                f"All {-known:,} rows of this table were added, and vectors were removed from the index since. "
                "Without a column of ids nothing tells which of its rows are missing: add these by themselves, or "
                "remove everything first."
            )
        return 0, 1

    def update(
        self,
        ids: Iterable[Id],
        embeddings: Any = None,
        *,
        texts: Iterable[str] | None = None,
        codes: np.ndarray | None = None,
        metadata: Iterable[dict | None] | None = None,
        missing_ok: bool = False,
    ) -> int:
        """Replaces parts of what is known of ids, for all of them or none; what is not given stays.

        Texts without embeddings and codes are embedded by the encoder, as in [`add`]. Metadata are replaced whole.

        Args:
            ids: Of what is replaced.
            embeddings: See [`add`], as of all that follow.
            texts: One for each id.
            codes: One for each id.
            metadata: One for each id.
            missing_ok: Pass over unknown ids.

        Returns:
            How many were updated.

        Raises:
            ValueError: If an id is unknown or comes twice, or something is not as [`add`] describes.
        """
        known = as_ids(ids)
        batch = self._intake.batch(embeddings, texts, codes, metadata, len(known))
        check_lengths(len(batch), ids=known)
        if len(set(known)) < len(known):
            raise ValueError("An id comes twice: update each once.")
        with self._writing() as state:
            found = self._find(known, missing_ok)
            places = [place for place, id in enumerate(known) if id in found]
            for start in range(0, len(places), CHUNK):
                part = places[start : start + CHUNK]
                rows = [found[known[place]] for place in part]
                changed = map(batch.change, part, self._database.rows_of(rows))
                self._database.delete(rows)
                self._database.insert(changed, state)
        return len(places)

    def remove(
        self, ids: Iterable[Id] | None = None, *, filter: Filter | None = None, missing_ok: bool = False
    ) -> int:
        """Removes vectors and documents, all that are named or none.

        Args:
            ids: Which; or a filter instead.
            filter: Remove all that it holds for.
            missing_ok: Pass over unknown ids.

        Returns:
            How many were removed.

        Raises:
            ValueError: If an id is unknown, or neither or both are given.
        """
        if (ids is None) == (filter is None):
            raise ValueError("Give either the ids or the filter of what to remove.")
        with self._writing() as state:
            if ids is None:
                rows = self._database.matching(filter).tolist()
            else:
                rows = sorted(set(self._rows(ids, missing_ok)))
            self._database.delete(rows)
            state.count -= len(rows)
            if rows:  # of which sources they were is not on record
                read = json.loads(state.sources) if state.count else {}
                state.sources = json.dumps({name: -abs(done) for name, done in read.items()})
        return len(rows)

    @contextmanager
    def _writing(self) -> Iterator[State]:
        if self._folder is not None:
            self._writable()
        with self._database.writing() as state:
            yield state

    def _writable(self) -> IndexFolder:
        """The folder, of which this index is the one writer from now on."""
        if self._folder is None:
            raise ValueError("This index has no folder: name one to save it to.")
        if self._read_only:
            raise ValueError("This index lies in the Hub's cache, which is not changed: load it with folder='...'.")
        with self._database.lock:  # threads that write for the first time at once would refuse each other
            if not self._folder.is_writer:
                self._folder.claim()
                self._folder.read()  # another writer may have changed it
        return self._folder


def _counted(state: State, count: int) -> list[Id]:
    """Ids for vectors that come without.

    Raises:
        ValueError: If the integers of 64 bits do not suffice: the largest one may be in use already.
    """
    if state.next_id + count > INT64.max:
        raise ValueError(f"Counting ids on from {state.next_id} leaves the integers of 64 bits: give ids.")
    return list(range(state.next_id, state.next_id + count))
