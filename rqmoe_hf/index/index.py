"""A searchable collection of compressed embeddings, with texts and metadata."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..bundled import load_quantizer
from ..data.jobs import check_quantizer
from ..modeling_rqmoe import RQMoEModel
from ..saving import weights_checksum
from .documents import CHUNK, Database, Document, Id, Row, State, codes_array
from .embedding import Encoder, Intake
from .filters import Filter
from .inputs import as_ids, as_metadata, as_texts, check_lengths, ids_array
from .ranking import SHORTLIST, Ranker
from .storage import DATABASE, FORMAT, IndexFolder

REMOVALS = 10_000  # are kept on record in any case
Metric = Literal["cosine", "inner_product", "l2"]
Kind = Literal["auto", "flat", "ivf"]
Rescore = Literal["auto", "floats", "codes", "tables"]
Duplicates = Literal["error", "skip", "replace"]


class RQMoEIndex:
    """Vectors as codes of a quantizer, with ids of the user's, texts and metadata; searched with uncompressed queries.

    With a folder every change is on disk when the call returns, whole or not at all, and the folder is the collection:
    [`load`] opens it again. Without one the index ends with the process, unless it is saved to a folder. One index at
    a time may write to a folder; others read it meanwhile and see what was committed. Methods may be called from any
    thread.

    Args:
        quantizer: The quantizer, or its bundled name, folder or Hub id.
        folder: Where to make the collection; must not hold one. None keeps it in this process.
        metric: What ranks: "cosine", "inner_product", or "l2", whose scores are negative squared distances. Of a
            quantizer of unit-norm embeddings (`is_unit_norm`) reconstructions are brought to norm 1 for all of them.
        kind: How codes are scanned: all of them ("flat"), or those in the inverted lists nearest to the query ("ivf");
            "auto" changes from flat to ivf at 50,000.
        num_lists: Inverted lists, default the square root of the number of vectors.
        encoder: Embeds texts: a sentence-transformers model, the name of one, or any object with `encode_query` and
            `encode_document`. Default: the quantizer's `base_model`, loaded when it is first needed.
        num_codebooks: Keep only this many codes of each vector: fewer bytes.
        keep_floats: Keep the embeddings besides, as float16 on disk, to rank shortlists exactly.

    Example:
    ```python
    import numpy as np
    from rqmoe_hf.index import RQMoEIndex

    embeddings = np.random.default_rng(0).normal(size=(200, 384)).astype("float32")
    index = RQMoEIndex("minilm-384", "runs/my-index")
    index.add(embeddings, ids=range(200), metadata=[{"even": number % 2 == 0} for number in range(200)])
    scores, ids = index.search(embeddings[7], top_k=3)  # float32 (3,), int64 (3,)
    scores, ids = index.search(embeddings[7], top_k=3, filter={"even": True})
    ```
    """

    def __init__(
        self,
        quantizer: RQMoEModel | str,
        folder: str | os.PathLike | None = None,
        *,
        metric: Metric = "cosine",
        kind: Kind = "auto",
        num_lists: int | None = None,
        encoder: Encoder | None = None,
        num_codebooks: int | None = None,
        keep_floats: bool = False,
    ):
        _check_choice("metric", metric, ("cosine", "inner_product", "l2"))
        _check_choice("kind", kind, ("auto", "flat", "ivf"))
        if num_lists is not None and num_lists < 1:
            raise ValueError(f"num_lists must be at least 1, got {num_lists}.")
        quantizer = load_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
        quantizer._require_initialized("be searched with")
        config = quantizer.config
        steps = config.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= steps <= config.num_codebooks:
            raise ValueError(f"num_codebooks must lie between 1 and {config.num_codebooks}, got {num_codebooks}.")
        settings = {
            "format": FORMAT,
            "quantizer": {
                "model": quantizer.name_or_path,
                "revision": quantizer.commit_hash,
                "weights": weights_checksum(quantizer),
                "num_codebooks": steps,
                "codebook_size": config.code_sizes,
                "hidden_size": config.hidden_size,
            },
            "metric": metric,
            "kind": kind,
            "num_lists": num_lists,
            "keep_floats": keep_floats,
            "encoder": encoder if isinstance(encoder, str) else None,
        }
        self._folder = None if folder is None else IndexFolder(folder)
        database = Database(None) if self._folder is None else self._folder.create(settings)
        self._open(quantizer, settings, encoder, database)

    def _open(self, quantizer: RQMoEModel, settings: dict, encoder: Encoder | None, database: Database) -> None:
        self.quantizer, self._database = quantizer, database
        self.settings = {name: value for name, value in settings.items() if name != "files"}
        steps, encoder = settings["quantizer"]["num_codebooks"], encoder or settings["encoder"]
        self._intake = Intake(quantizer, steps, encoder or quantizer.config.base_model, settings["keep_floats"])
        metric, kind, lists = settings["metric"], settings["kind"], settings["num_lists"]
        self._ranker = Ranker(quantizer, database, steps, metric, kind, lists)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        quantizer: RQMoEModel | str | None = None,
        encoder: Encoder | None = None,
        check: bool = True,
    ) -> "RQMoEIndex":
        """Opens a collection; what was prepared for scanning is memory-mapped.

        Args:
            folder: Of the collection.
            quantizer: The quantizer that made the codes, default the one that the collection names.
            encoder: Embeds texts; default the one that the collection or the quantizer names.
            check: Compare all files with their checksums, which means reading them once.

        Raises:
            ValueError: If there is no collection, a file is damaged (it is named), or the quantizer is another one.
        """
        return cls._load(IndexFolder(folder), quantizer, encoder, check)

    @classmethod
    def _load(
        cls, place: IndexFolder, quantizer: RQMoEModel | str | None, encoder: Encoder | None, check: bool,
        immutable: bool = False,
    ) -> "RQMoEIndex":  # fmt: skip
        manifest = place.read()
        made_by = manifest["quantizer"]
        if quantizer is None or isinstance(quantizer, str):
            quantizer = load_quantizer(quantizer or made_by["model"], revision=made_by["revision"])
        check_quantizer(made_by, quantizer)
        index = cls.__new__(cls)
        index._folder = place
        index._open(quantizer, manifest, encoder, place.open(check, immutable))
        if place.scan is not None and place.scan.exists():
            index._ranker.load(place.scan)
        return index

    # --- what is in it -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with self._database.reading() as state:
            return state.count

    def __contains__(self, id: Id) -> bool:
        with self._database.reading():
            return bool(self._database.find([id]))

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
            return [found[row] for row in rows]

    def documents(self, filter: Filter | None = None) -> Iterator[Document]:
        """All documents that a filter holds for, in the order in which they were added."""
        after = 0
        while True:
            with self._database.reading():
                rows = self._database.matching(filter, after, CHUNK).tolist()
                found = self._database.documents_of(rows)
            yield from (found[row] for row in rows)
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
            codes = self._database.codes_of(rows)
        if not rows:
            return np.empty((0, self.quantizer.config.hidden_size), np.float32)
        return self._ranker.restore(codes_array([codes[row] for row in rows]))

    def _rows(self, ids: Iterable[Id], missing_ok: bool) -> list[int]:
        """Row numbers of ids, in their order."""
        listed = as_ids(ids)
        found = self._database.find(listed)
        unknown = [id for id in listed if id not in found]
        if unknown and not missing_ok:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"{len(unknown)} of {len(listed)} ids are not in the index: {shown}.")
        return [found[id] for id in listed if id in found]

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
        _check_choice("duplicates", duplicates, ("error", "skip", "replace"))
        written = None if texts is None else as_texts(texts)
        packed, floats = self._intake.codes(embeddings, written, codes)
        notes = None if metadata is None else as_metadata(metadata)
        given = None if ids is None else as_ids(ids)
        check_lengths(len(packed), texts=written, metadata=notes, ids=given)
        with self._writing() as state:
            given = list(range(state.next_id, state.next_id + len(packed))) if given is None else given
            places, replaced = self._database.resolve(given, duplicates)
            self._database.delete(replaced)
            for start in range(0, len(places), CHUNK):
                rows = [_row(place, given, packed, written, notes, floats) for place in places[start : start + CHUNK]]
                self._database.insert(rows)
            added = [given[place] for place in places]
            state.count += len(added) - len(replaced)
            state.next_id = max([state.next_id, *(id + 1 for id in added if isinstance(id, int))])
        return ids_array(added)

    def update(
        self,
        ids: Iterable[Id],
        embeddings: Any = None,
        *,
        texts: Iterable[str] | None = None,
        codes: np.ndarray | None = None,
        metadata: Iterable[dict | None] | None = None,
    ) -> None:
        """Replaces parts of what is known of ids, for all of them or none; what is not given stays.

        Texts without embeddings and codes are embedded by the encoder, as in [`add`]. Metadata are replaced whole.

        Raises:
            ValueError: If an id is unknown or comes twice, or something is not as [`add`] describes.
        """
        known = as_ids(ids)
        written = None if texts is None else as_texts(texts)
        notes = None if metadata is None else as_metadata(metadata)
        packed = floats = None
        if any(part is not None for part in (embeddings, written, codes)):
            packed, floats = self._intake.codes(embeddings, written, codes)
        check_lengths(len(known), texts=written, metadata=notes, vectors=None if packed is None else list(packed))
        if len(set(known)) < len(known):
            raise ValueError("An id comes twice: update each once.")
        with self._writing():
            rows = self._rows(known, missing_ok=False)
            for start in range(0, len(rows), CHUNK):
                part = slice(start, start + CHUNK)
                made = self._database.rows_of(rows[part])
                for place, row in enumerate(made, start):
                    if packed is not None:
                        row.code = packed[place].tobytes()
                        row.floats = None if floats is None else floats[place].tobytes()
                    row.text = row.text if written is None else written[place]
                    row.metadata = row.metadata if notes is None else notes[place]
                self._database.delete(rows[part])
                self._database.insert(made)

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
        return len(rows)

    @contextmanager
    def _writing(self) -> Iterator[State]:
        if self._folder is not None:
            self._writable()
        with self._database.writing() as state:
            yield state

    # --- searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        queries: Any,
        top_k: int = 10,
        *,
        filter: Filter | None = None,
        ids: Iterable[Id] | None = None,
        shortlist: int | None = None,
        rescore: Rescore = "auto",
        nprobe: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the nearest vectors.

        Args:
            queries: Embeddings, floats `(n, hidden_size)`, or texts for the encoder. One query, `(hidden_size,)` or a
                string, gives results without the first dimension.
            top_k: Hits per query; all vectors (that the filter leaves) if there are fewer.
            filter: Consider only documents whose metadata it holds for; see `rqmoe_hf.index.filters`. It is evaluated
                before scanning. One on a field that no document has finds nothing.
            ids: Consider only these.
            shortlist: Vectors that the scan hands on to be ranked, default 100 or ten for each hit.
            rescore: How they are ranked: by the "floats" that were kept, by what the "codes" decode to, or by the
                sums of the scan's "tables"; "auto" is floats where they are kept, codes otherwise.
            nprobe: Inverted lists that are scanned, default a sixteenth of them and at least eight.

        Returns:
            Scores, float32 `(n, k)`, highest first, and ids, int64 or strings `(n, k)`. For the metric "l2" the scores
            are negative squared distances.

        Raises:
            ValueError: If queries are empty, of a wrong size or not finite, or a number is below 1.
        """
        _check_choice("rescore", rescore, ("auto", "floats", "codes", "tables"))
        for name, number in (("top_k", top_k), ("shortlist", shortlist), ("nprobe", nprobe)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if rescore == "floats" and not self.settings["keep_floats"]:
            raise ValueError("This index has no floats: make it with keep_floats=True, or use rescore='codes'.")
        vectors, single = self._intake.queries(queries)
        if rescore == "auto":
            rescore = "floats" if self.settings["keep_floats"] else "codes"
        with self._database.reading() as state:
            allowed = self._allowed(filter, ids)
            wanted = shortlist or max(SHORTLIST, 10 * top_k)
            scores, rows = self._ranker.search(vectors, top_k, wanted, rescore, nprobe, allowed, state)
            names = self._database.ids_of(np.unique(rows))
        found = ids_array([names[row] for row in rows.flatten().tolist()]).reshape(rows.shape)
        return (scores[0], found[0]) if single else (scores, found)

    def _allowed(self, filter: Filter | None, ids: Iterable[Id] | None) -> np.ndarray | None:
        """Rows that may be found, ascending; None for all."""
        rows = None if filter is None else self._database.matching(filter)
        if ids is None:
            return rows
        named = np.array(sorted(self._rows(ids, missing_ok=False)), np.int64)
        return np.unique(named) if rows is None else np.intersect1d(named, rows)

    # --- the folder ----------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike | None = None) -> None:
        """Prepares the folder for quick loading, or makes one.

        Changes are on disk without it. It writes down what scanning needs, which [`load`] otherwise makes anew, and
        the checksum of the database.

        Args:
            folder: None for the index's own. Another one must not hold an index, and gets a copy; an index without a
                folder lives in it from then on.

        Raises:
            ValueError: If there is no folder, or it holds another index.
            BlockingIOError: If another index writes to the folder.
        """
        if folder is not None and (self._folder is None or Path(folder).resolve() != self._folder.path.resolve()):
            copy = self._copied(IndexFolder(folder))
            if self._folder is None:
                self._database.close()
                self._folder, self._database = copy._folder, copy._database
                self._ranker.database = copy._database
            else:
                copy.close()
            return
        place = self._writable()
        with self._database.writing() as state:
            last = self._database.last_removal()
            if last - state.forgotten > max(state.count, REMOVALS):
                self._ranker.rebuild(state)
                self._database.forget_removals(last)
                state.forgotten = last
        with self._database.reading() as state:
            files = {}
            if state.count > SHORTLIST:
                name = f"scan-{state.version}.safetensors"
                place.snapshot(name, lambda file: self._ranker.save(file, state))
                files[name] = place.record(place.path / name)
            files[DATABASE] = place.record_database(self._database)
            place.write(self.settings | {"files": files})

    def _copied(self, place: IndexFolder) -> "RQMoEIndex":
        """A copy in a new folder."""
        copy = type(self).__new__(type(self))
        copy._folder, database = place, place.create(self.settings, self._database)
        copy._open(self.quantizer, self.settings, self._intake.encoder.encoder, database)
        copy._ranker.scanner, copy._ranker.progress = self._ranker.scanner, self._ranker.progress
        copy.save()
        return copy

    def _writable(self) -> IndexFolder:
        """The folder, of which this index is the one writer from now on."""
        if self._folder is None:
            raise ValueError("This index has no folder: name one to save it to.")
        self._folder.claim()
        return self._folder

    def close(self) -> None:
        """Ends the use of the folder, so that others may write. The index cannot be used afterwards."""
        if self._folder is not None and self._folder.is_writer:
            with self._database.reading():
                record = self._folder.record_database(self._database)
            files = self._folder.manifest["files"] | {DATABASE: record}
            self._folder.write(self._folder.manifest | {"files": files})
        self._database.close()
        if self._folder is not None:
            self._folder.release()

    def __enter__(self) -> "RQMoEIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _row(place: int, ids: list[Id], codes: np.ndarray, texts: list[str] | None, metadata: list[str | None] | None,
         floats: np.ndarray | None) -> Row:  # fmt: skip
    return Row(
        ids[place],
        codes[place].tobytes(),
        None if texts is None else texts[place],
        None if metadata is None else metadata[place],
        None if floats is None else floats[place].tobytes(),
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
