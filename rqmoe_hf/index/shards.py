"""Collections that were built apart and are searched together, with the results of one that holds all their rows."""

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling_rqmoe import RQMoEModel
from .documents import Document, Id, in_order
from .filters import Filter
from .index import RQMoEIndex
from .inputs import as_ids, ids_array
from .intake import Encoder, Intake
from .joining import Found, check_shards, fit_tables, joined
from .merging import merge
from .ranking import SHORTLIST, Plan, make_plan, number_of_lists, outgrown, probed_lists
from .rescoring import Rescorer, normalized
from .scanning import Scanner
from .settings import Rescore, check_search
from .shard import Question, Shard

ATTEMPTS = 3  # while others write to the shards


class RQMoEShards:
    """Several indexes as one: the hits, scores and order are those of one index with all rows, shard after shard.

    All codes are scored by the same tables, norms and inverted lists, fitted to the shards together by the rules of
    one index; every shard gives its shortlist, the best of all of them is the one index's shortlist, and is ranked as
    there. For shards that were not saved together the first search fits tables and reads all codes; [`save`] writes
    that down. Every shard is scanned by a thread of its own. Shards may be changed meanwhile, by an
    `RQMoEIndex` of their own; the tables stay.

    Args:
        folders: Of the shards, in their order.
        quantizer: See `RQMoEIndex.load`; the same for all.
        encoder: See `RQMoEIndex.load`.
        check: See `RQMoEIndex.load`. Without it ids are not compared, either.

    Raises:
        ValueError: As `RQMoEIndex.load`; or because the shards are of different quantizers, metrics or other settings,
            or an id is in two of them.

    Example:
    ```python
    import numpy as np
    from rqmoe_hf.index import RQMoEIndex, RQMoEShards

    embeddings = np.random.default_rng(0).normal(size=(200, 384)).astype("float32")
    for number, rows in enumerate(np.split(np.arange(200), 2)):  # may be done on different machines
        with RQMoEIndex("minilm-384-32-bytes", f"runs/shard-{number}") as index:
            index.add(embeddings[rows], ids=rows)
    with RQMoEShards(["runs/shard-0", "runs/shard-1"]) as shards:
        scores, ids = shards.search(embeddings[7], top_k=3)  # float32 (3,), int64 (3,)
    ```
    """

    _threads = 4  # that may search at a time without waiting for each other

    def __init__(
        self,
        folders: Sequence[str | os.PathLike],
        quantizer: RQMoEModel | str | os.PathLike | None = None,
        encoder: Encoder | None = None,
        check: bool = True,
    ):
        folders = self._checked_folders(folders)
        self._indexes: list[RQMoEIndex] = []
        try:
            for folder in folders:
                index = RQMoEIndex.load(folder, quantizer, encoder, check)
                self._indexes.append(index)
                quantizer = index.quantizer
            self._join([Shard(index) for index in self._indexes], self._indexes[0].quantizer, encoder, check)
        except BaseException:
            for index in self._indexes:
                index.close()
            raise

    @staticmethod
    def _checked_folders(folders: Sequence[str | os.PathLike]) -> list[Path]:
        """The folders of different shards."""
        if isinstance(folders, (str, os.PathLike)) or not len(folders):
            raise ValueError(f"Expected a list of folders, one per shard, got {folders!r}.")
        paths = [Path(folder).absolute() for folder in folders]
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError("A folder is named twice: name every shard once.")
        return paths

    def _join(self, shards: Sequence[Any], quantizer: RQMoEModel, encoder: Encoder | None, check: bool) -> None:
        """Takes shards, here or elsewhere, that agree on everything but their tables."""
        self.quantizer, self._shards = quantizer, shards
        self._pool = ThreadPoolExecutor(self._threads * len(shards))
        facts = self._each("facts")
        check_shards(self._shards, facts, self._each("keys") if check else None)
        self.settings: dict[str, Any] = facts[0].settings
        steps, encoder = self.settings["quantizer"]["num_codebooks"], encoder or self.settings["encoder"]
        self._intake = Intake(quantizer, steps, encoder or quantizer.config.base_model, self.settings["keep_floats"])
        self._rescorer = Rescorer(quantizer, steps, self.settings["metric"])
        self._preparing = threading.Lock()
        self._tables: str | None = None

    def _prepare(self, again: bool = False) -> None:
        """Sees to it that all shards are scored by the same tables: those that they have, or new ones."""
        with self._preparing:
            if self._tables is not None and not again:
                return
            facts = self._each("facts")
            total, lists = sum(fact.count for fact in facts), facts[0].lists
            kind, given = self.settings["kind"], self.settings["num_lists"]
            wanted = number_of_lists(kind, given, total, self._rescorer.first_lists)
            alike = facts[0].tables is not None and len({fact.tables for fact in facts}) == 1
            if not total:
                return
            if not alike or outgrown(total, facts[0].fitted, lists, wanted):
                scanner = self._fitted(wanted)
                self._each("share", scanner.tables, total)
            elif self._tables == facts[0].tables:
                return
            else:
                scanner = Scanner(self._shards[0].tables(), self._intake.code_bytes, self._rescorer.scanned)
            self._rescorer.scanner, self._tables = scanner, scanner.tables.digest

    def _fitted(self, lists: int) -> Scanner:
        """An empty scanner with new tables."""
        return fit_tables(self._shards, self._rescorer, lists)

    def _each(self, method: str, *arguments: Any, apart: Sequence[tuple] | None = None) -> list[Any]:
        """What a method of every shard returns; `apart` are further arguments of each."""
        apart = apart or [()] * len(self._shards)
        tasks = [self._pool.submit(getattr(shard, method), *arguments, *more)
                 for shard, more in zip(self._shards, apart, strict=True)]  # fmt: skip
        return [task.result() for task in tasks]

    # --- what is in them -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(self._each("count"))

    def __contains__(self, id: Id) -> bool:
        return any(self._each("find", [id]))

    def count(self, filter: Filter | None = None) -> int:
        """How many vectors a filter holds for; see `rqmoe_hf.index.filters`."""
        return sum(self._each("count", filter))

    def get(self, ids: Iterable[Id], missing_ok: bool = False) -> list[Document]:
        """Texts and metadata, as `RQMoEIndex.get`."""
        listed = as_ids(ids)
        found = {document.id: document for part in self._each("get", listed) for document in part}
        if not missing_ok:
            _check_known(listed, found)
        return [found[id] for id in listed if id in found]

    def reconstruct(self, ids: Iterable[Id]) -> np.ndarray:
        """What the codes restore, float32 `(n, hidden_size)`, as `RQMoEIndex.reconstruct`."""
        listed = as_ids(ids)
        found = {id: code for part in self._each("codes_of_ids", listed) for id, code in part.items()}
        _check_known(listed, found)
        if not listed:
            return np.empty((0, self.quantizer.config.hidden_size), np.float32)
        codes = np.frombuffer(b"".join(found[id] for id in listed), np.uint8)
        return self._rescorer.restore(codes.reshape(len(listed), -1))

    # --- searching -------------------------------------------------------------------------------------------------

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
        """Finds the nearest vectors of all shards; arguments, results and errors are those of `RQMoEIndex.search`."""
        rescore = check_search(self.settings, rescore, top_k=top_k, shortlist=shortlist, nprobe=nprobe)
        vectors, single = self._intake.queries(queries)
        self._prepare()
        named = None if ids is None else as_ids(ids)
        if self._rescorer.metric == "cosine":
            vectors = normalized(vectors)
        for _ in range(ATTEMPTS):
            apart = self._apart(named)
            counts = self._each("count", filter, apart=apart)
            restricted = filter is not None or named is not None
            plan = make_plan(sum(counts), top_k, shortlist or max(SHORTLIST, 10 * top_k), rescore, restricted)
            if not plan.everything:
                plan = plan.widened(self._rescorer.widening(rescore), sum(counts))
            found = self._candidates(vectors, plan, filter, apart, nprobe, restricted, rescore == "floats")
            if not plan.everything:
                found.rows = self._rescorer.narrowed(vectors, found.rows, plan.shortlist, found)
            scores, rows = self._rescorer.rank(vectors, found.rows, plan.count, rescore, found)
            if (rows >= 0).all():
                names = ids_array(in_order(found.ids, rows.flatten().tolist())).reshape(rows.shape)
                return (scores[0], names[0]) if single else (scores, names)
        raise ValueError("The shards were changed faster than they could be searched: search again.")

    def _apart(self, ids: list[Id] | None) -> list[tuple]:
        """The ids that are wanted of each shard, as further arguments."""
        if ids is None:
            return [(None,)] * len(self._shards)
        found = self._each("find", ids)
        _check_known(ids, set().union(*found))
        return [(part,) for part in found]

    def _candidates(
        self, vectors: np.ndarray, plan: Plan, filter: Filter | None, apart: list[tuple], nprobe: int | None,
        restricted: bool, floats: bool,
    ) -> Found:  # fmt: skip
        """The shortlists of all shards as one."""
        if not plan.count:
            return Found(np.empty((len(vectors), 0), np.int64))
        lists = self._rescorer.scanner.lists if self._rescorer.scanner is not None else 1
        probed, asked = probed_lists(nprobe, lists), self._rescorer.asked(vectors)
        question = Question(asked, plan.scanned, plan.share, probed, plan.everything, floats, self._tables or "",
                            filter)  # fmt: skip
        found = joined(self._each("candidates", question, apart=apart), plan)
        if restricted or plan.everything or probed >= lists:
            return found
        short = (found.rows >= 0).sum(axis=1) < plan.count  # the lists scanned hold too few
        if short.any():
            question.queries, question.nprobe = asked[short], lists
            found.replace(short, joined(self._each("candidates", question, apart=apart), plan))
        return found

    # --- the folders -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Prepares the folders for being opened together quickly, with the tables that they share.

        Raises:
            BlockingIOError: If another index writes to one of the folders.
        """
        self._prepare(again=True)
        for index in self._indexes:
            index.save()

    def merge(self, folder: str | os.PathLike) -> RQMoEIndex:
        """One index with all rows, shard after shard, in a new folder; the shards stay.

        Codes are copied, not made anew. The folder appears when everything is in it.

        Raises:
            ValueError: If the folder is there and not empty.
        """
        return merge(self._indexes, folder)

    def close(self) -> None:
        """Ends the use of the folders. The shards cannot be used afterwards."""
        self._pool.shutdown()
        for index in self._indexes:
            index.close()

    def __enter__(self) -> "RQMoEShards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_known(ids: Sequence[Id], found: Any) -> None:
    """Raises a ValueError unless all ids were found."""
    unknown = [id for id in ids if id not in found]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise ValueError(f"{len(unknown)} of {len(ids)} ids are in none of the shards: {shown}.")
