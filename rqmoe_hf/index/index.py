"""A searchable collection of compressed embeddings, with texts and metadata."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitInfo

from ..bundled import load_quantizer
from ..data.jobs import check_quantizer
from ..modeling_rqmoe import RQMoEModel
from .collection import Collection
from .documents import Database, Id, in_order
from .filters import Filter
from .inputs import ids_array
from .intake import Encoder
from .ranking import SHORTLIST
from .settings import Kind, Metric, Rescore, check_search, make_settings
from .sharing import download_index, push_index
from .storage import DATABASE, IndexFolder

REMOVALS = 10_000  # are kept on record in any case


class RQMoEIndex(Collection):
    """Vectors as codes of a quantizer, with ids of the user's, texts and metadata; searched with uncompressed queries.

    With a folder every change is on disk when the call returns, whole or not at all, and the folder is the collection:
    [`load`] opens it again. Without one the index ends with the process, unless it is saved to a folder. One index at
    a time may write to a folder; others read it meanwhile and see what was committed. Methods may be called from any
    thread, and take turns; the quantizer must not be changed meanwhile. A forked process has to load the folder for
    itself. Copy an index that is open with [`save`]: a process that opens and closes its database by other means takes
    SQLite's locks away (https://www.sqlite.org/howtocorrupt.html, section 2.2).

    Args:
        quantizer: The quantizer, or its bundled name, folder or Hub id.
        folder: Where to make the collection; must not hold one. None keeps it in this process.
        metric: What ranks: "cosine", "inner_product", or "l2", whose scores are negative squared distances. Of a
            quantizer of unit-norm embeddings (`is_unit_norm`) reconstructions are brought to norm 1 for all of them.
        kind: How codes are scanned: all of them ("flat"), or those in the inverted lists nearest to the query ("ivf");
            "auto" changes from flat to ivf at 50,000.
        num_lists: Inverted lists, default the square root of the number of vectors. If the quantizer's first codebook
            is searched by itself (its `search_blocks` starts with 1), the default is a list for each of its codewords,
            and the first code takes no memory. Any other number gives lists found by k-means, and whole codes in them.
        encoder: Embeds texts: a sentence-transformers model, the name of one, or any object with `encode_query` and
            `encode_document`. Default: the quantizer's `base_model`, loaded when it is first needed.
        num_codebooks: Keep only this many codes of each vector: fewer bytes.
        keep_floats: Keep the embeddings besides, as float16 on disk, to rank shortlists exactly.

    Example:
    ```python
    import numpy as np
    from rqmoe_hf.index import RQMoEIndex

    embeddings = np.random.default_rng(0).normal(size=(200, 384)).astype("float32")
    index = RQMoEIndex("minilm-384-32-bytes", "runs/my-index")
    index.add(embeddings, ids=range(200), metadata=[{"even": number % 2 == 0} for number in range(200)])
    scores, ids = index.search(embeddings[7], top_k=3)  # float32 (3,), int64 (3,)
    scores, ids = index.search(embeddings[7], top_k=3, filter={"even": True})
    ```
    """

    def __init__(
        self,
        quantizer: RQMoEModel | str | os.PathLike,
        folder: str | os.PathLike | None = None,
        *,
        metric: Metric = "cosine",
        kind: Kind = "auto",
        num_lists: int | None = None,
        encoder: Encoder | None = None,
        num_codebooks: int | None = None,
        keep_floats: bool = False,
    ):
        quantizer = quantizer if isinstance(quantizer, RQMoEModel) else load_quantizer(quantizer)
        settings = make_settings(quantizer, metric, kind, num_lists, encoder, num_codebooks, keep_floats)
        place = None if folder is None else IndexFolder(folder)
        database = Database(None) if place is None else place.create(settings)
        super().__init__(quantizer, settings, encoder, database, place)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        encoder: Encoder | None = None,
        check: bool = True,
    ) -> "RQMoEIndex":
        """Opens a collection; what was prepared for scanning is memory-mapped.

        A folder that cannot be written is opened for searching. Others may write to it meanwhile only if they had it
        open before.

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
    def _of(cls, *parts: Any) -> "RQMoEIndex":
        """An index of parts that are there already; see [`Collection`]."""
        index = cls.__new__(cls)
        Collection.__init__(index, *parts)
        return index

    @classmethod
    def _load(
        cls, place: IndexFolder, quantizer: RQMoEModel | str | os.PathLike | None, encoder: Encoder | None,
        check: bool, immutable: bool = False,
    ) -> "RQMoEIndex":  # fmt: skip
        manifest = place.read()
        made_by = manifest["quantizer"]
        if quantizer is None:
            quantizer = load_quantizer(made_by["model"], revision=made_by["revision"])
        elif not isinstance(quantizer, RQMoEModel):
            quantizer = load_quantizer(quantizer)
        check_quantizer(made_by, quantizer, place.path)
        while True:
            failure, before = None, manifest
            try:
                index = cls._of(quantizer, manifest, encoder, place.open(check, immutable), place, immutable)
                if place.scan is None or index._ranker.load(place.scan):
                    return index
            except (ValueError, OSError) as error:
                failure = error
            manifest = place.read()
            if manifest == before:  # no writer has replaced the files meanwhile
                if failure is not None:
                    raise failure
                return index

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
            shortlist: Vectors that are ranked, default 100 or ten for each hit: those that the scan finds, or, with
                experts and from 100,000 vectors on, a quarter of them, which an approximate decoder chooses.
            rescore: How they are ranked: by the "floats" that were kept, by what the "codes" decode to, or by the
                sums of the scan's "tables"; "auto" is floats where they are kept, codes otherwise.
            nprobe: Inverted lists that are scanned, default a sixteenth of them and at least 32.

        Returns:
            Scores, float32 `(n, k)`, highest first, and ids, int64 or strings `(n, k)`. For the metric "l2" the scores
            are negative squared distances.

        Raises:
            ValueError: If queries are empty, of a wrong size or not finite, or a number is below 1.
        """
        rescore = check_search(self.settings, rescore, top_k=top_k, shortlist=shortlist, nprobe=nprobe)
        vectors, single = self._intake.queries(queries)
        with self._database.reading() as state:
            allowed = self._allowed(filter, ids)
            wanted = shortlist or max(SHORTLIST, 10 * top_k)
            scores, rows, names = self._ranker.search(vectors, top_k, wanted, rescore, nprobe, allowed, state)
        found = ids_array(in_order(names, rows.flatten().tolist())).reshape(rows.shape)
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
        the checksum of the database. With experts and from 100,000 vectors on an approximate decoder is part of that,
        which takes a few minutes to learn the first time, and each time that the collection has grown fourfold.

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
                self._ranker.refit(state)
                self._database.forget_removals(last)
                state.forgotten = last
        with self._database.reading() as state:
            files = {}
            if state.count > SHORTLIST or self._ranker.shared is not None:
                name = f"scan-{state.version}.safetensors"
                place.snapshot(name, lambda file: self._ranker.save(file, state))
                files[name] = place.record(place.path / name)
            files[DATABASE] = place.record_database(self._database)
            place.write(self.settings | {"files": files})

    def _copied(self, place: IndexFolder, settings: dict[str, Any] | None = None) -> "RQMoEIndex":
        """A copy in a new folder."""
        settings, encoder = settings or self.settings, self._intake.encoder.encoder
        with self._database.lock:
            if self._ranker.scanner is not None:  # the copy shares it, so that there must be nothing left to do to it
                with self._database.reading() as state:
                    self._ranker.refit(state, anew=False)
            copy = self._of(self.quantizer, settings, encoder, place.create(settings, self._database), place)
            copy._ranker.scanner, copy._ranker.progress = self._ranker.scanner, self._ranker.progress
            copy.save()
        return copy

    def push_to_hub(
        self,
        repo_id: str,
        *,
        quantizer_id: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Sends the collection to a data set repository, in one commit: codes, ids, texts, metadata.

        Args:
            repo_id: Where to, such as "org/my-index"; created if it does not exist.
            quantizer_id: Hub id of the quantizer, if it was loaded from a folder. Push it first.
            private: Make a new repository private.
            token: Hub token.
            revision: Branch; created if it does not exist.
            commit_message: Default "Upload index".

        Raises:
            ValueError: If nothing says how others can load the quantizer.
        """
        return push_index(self, repo_id, quantizer_id, private, token, revision, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        encoder: Encoder | None = None,
        *,
        folder: str | os.PathLike | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
    ) -> "RQMoEIndex":
        """Loads a collection from the Hub.

        Args:
            repo_id: Of the data set repository.
            quantizer: See [`load`].
            encoder: See [`load`].
            folder: Where to put a copy that can be changed. None reads what lies in the Hub's cache.
            revision: Branch, tag or commit.
            token: Hub token.

        Raises:
            ValueError: As [`load`]; or the folder holds an index already.
        """
        place = download_index(repo_id, revision, token, folder)
        return cls._load(IndexFolder(place), quantizer, encoder, check=True, immutable=folder is None)

    def close(self) -> None:
        """Ends the use of the folder, so that others may write. The index cannot be used afterwards."""
        with self._database.lock:
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
