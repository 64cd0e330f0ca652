"""One collection made of several, row by row, without encoding anything anew."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .documents import CHUNK, State
from .index import RQMoEIndex


def merge(indexes: Sequence[RQMoEIndex], folder: str | os.PathLike) -> RQMoEIndex:
    """Writes one index with the rows of all, in their order, and opens it.

    Args:
        indexes: With equal settings and different ids.
        folder: New, or empty.

    Raises:
        ValueError: If the folder is there and not empty.
    """
    target, first = Path(folder), indexes[0]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: choose a new folder, or delete it.")
    scratch = target.with_name(f".{target.name}.merging")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that ended before it was done
    settings, encoder = first.settings, first._intake.encoder.encoder
    try:
        made = settings["quantizer"]
        with RQMoEIndex(first.quantizer, scratch, metric=settings["metric"], kind=settings["kind"],
                        num_lists=settings["num_lists"], num_codebooks=made["num_codebooks"],
                        keep_floats=settings["keep_floats"]) as merged:  # fmt: skip
            merged.settings = settings
            for index in indexes:
                _copy(index, merged)
            merged.save()
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return RQMoEIndex.load(target, first.quantizer, encoder, check=False)


def _copy(source: RQMoEIndex, target: RQMoEIndex) -> None:
    """Appends the rows of one index, of one state of it, to another."""
    with source._database.reading() as theirs:
        rows = source._database.matching(None).tolist()
        for start in range(0, len(rows), CHUNK):
            part = source._database.rows_of(rows[start : start + CHUNK])
            with target._writing() as state:
                target._database.insert(part, state)
                state.count += len(part)
        with target._writing() as state:
            _carry_on(state, theirs)


def _carry_on(state: State, theirs: State) -> None:
    """Counts ids on, and remembers which sources are in."""
    state.next_id = max(state.next_id, theirs.next_id)
    state.sources = json.dumps(json.loads(state.sources) | json.loads(theirs.sources))
