"""What makes one collection of several shards: equal settings, ids of their own, shared tables, one shortlist."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .documents import Id, codes_array
from .fitting import fit_scanner, rows_to_fit
from .ranking import Plan, sample_places
from .rescoring import Rescorer
from .scanning import Scanner
from .shard import Candidates, Facts

SHARD_BITS = 48  # of a row number; the shard's number is above them, so that rows are in the order of the shards


@dataclass
class Found:
    """Candidates of all shards, by numbers of rows that are theirs alone.

    Args:
        rows: int64 `(n, m)`; -1 where there are no more.
        ids: By row.
        codes: Packed codes by row.
        floats: Bytes of float16 vectors by row.
    """

    rows: np.ndarray
    ids: dict[int, Id] = field(default_factory=dict)
    codes: dict[int, bytes] = field(default_factory=dict)
    floats: dict[int, bytes] = field(default_factory=dict)
    file: str = "The answer of a shard"

    def codes_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Packed codes by row."""
        return {int(row): self.codes[int(row)] for row in rows}

    def floats_of(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Bytes of the float16 vectors by row; rows without are left out."""
        return {int(row): self.floats[int(row)] for row in rows if int(row) in self.floats}

    def replace(self, which: np.ndarray, other: "Found") -> None:
        """Puts others in the place of some queries' candidates."""
        self.rows[which] = other.rows
        self.ids |= other.ids
        self.codes |= other.codes
        self.floats |= other.floats


def joined(answers: Sequence[Candidates], plan: Plan) -> Found:
    """One shortlist of those of all shards: the highest scores, the lower row first among equals."""
    found, all_rows = Found(np.empty(0, np.int64)), []
    for number, answer in enumerate(answers):
        first = number << SHARD_BITS
        all_rows.append(np.where(answer.rows < 0, -1, answer.rows + first))
        for row, id, code in zip((answer.known + first).tolist(), answer.ids, answer.codes, strict=True):
            found.ids[row], found.codes[row] = id, code.tobytes()
        found.floats |= {row + first: floats for row, floats in answer.floats.items()}
    rows = np.hstack(all_rows)
    if not plan.everything:
        scores = np.hstack([answer.scores for answer in answers])
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores), axis=1)[:, : plan.scanned]
        rows = np.take_along_axis(rows, order, axis=1)
    if rows.shape[1] < plan.count:  # somebody has removed rows meanwhile
        rows = np.pad(rows, ((0, 0), (0, plan.count - rows.shape[1])), constant_values=-1)
    found.rows = rows
    return found


def fit_tables(shards: Sequence[Any], rescorer: Rescorer, lists: int) -> Scanner:
    """An empty scanner whose tables are those of one index with the rows of all shards."""
    parts = [shard.rows() for shard in shards]
    rows = np.concatenate([part + (number << SHARD_BITS) for number, part in enumerate(parts)])
    rows = rows[sample_places(len(rows), rows_to_fit(rescorer.quantizer, lists))]
    numbers, codes = rows >> SHARD_BITS, []
    for number, shard in enumerate(shards):
        codes += shard.codes_of(rows[numbers == number] - (number << SHARD_BITS))
    return fit_scanner(rescorer.quantizer, codes_array(codes), rescorer.steps, rescorer.scanned, lists)


def check_shards(shards: Sequence[Any], facts: Sequence[Facts], keys: Sequence[np.ndarray] | None) -> None:
    """Raises ValueError unless shards are alike in what they are, and have different ids.

    Args:
        shards: The shards.
        facts: What each is.
        keys: Numbers of the ids of each; None to not compare ids.
    """
    for name in ("weights", "num_codebooks"):
        _check_alike(facts, f"quantizer's {name}", [fact.settings["quantizer"][name] for fact in facts])
    for name in ("metric", "kind", "num_lists", "keep_floats"):
        _check_alike(facts, name, [fact.settings[name] for fact in facts])
    filled = [fact for fact in facts if fact.id_type is not None]
    _check_alike(filled, "type of ids", [fact.id_type for fact in filled])
    if keys is None:
        return
    values, times = np.unique(np.concatenate(keys), return_counts=True)
    suspects = values[times > 1]
    if not len(suspects):
        return
    holders: dict[Id, list[str]] = {}
    for shard, fact, own in zip(shards, facts, keys, strict=True):
        if np.isin(suspects, own).any():
            for id in shard.ids_of_keys(suspects):
                holders.setdefault(id, []).append(fact.name)
    twice = {id: names for id, names in holders.items() if len(names) > 1}
    if twice:
        id, names = next(iter(twice.items()))
        raise ValueError(
            f"{len(twice)} ids are in more than one shard, such as {id!r} in {' and '.join(names[:2])}: "
            "ids must be unique across shards. Remove one of each, or build the shard with other ids."
        )


def _check_alike(facts: Sequence[Facts], what: str, values: Sequence[Any]) -> None:
    """Raises a ValueError that names the first shard whose value is not the first one's."""
    for fact, value in zip(facts, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"The shards differ in their {what}: {facts[0].name} has {values[0]}, {fact.name} has {value}. Build "
                "all of them with the same."
            )
