"""What the adapters share: opening a collection, and ids, which all frameworks have as strings."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..index import RQMoEIndex
from ..modeling_rqmoe import RQMoEModel


def open_index(
    quantizer: RQMoEModel | str | None,
    folder: str | os.PathLike | None,
    index: RQMoEIndex | None,
    settings: dict[str, Any],
) -> RQMoEIndex:
    """The index that is given, or the one in the folder, or a new one.

    Args:
        quantizer: Needed for a new one.
        folder: Where it is or will be; None keeps a new one in this process.
        index: One that is open already.
        settings: Further arguments of `RQMoEIndex`. If there is an index already, it must have been made with them.

    Raises:
        ValueError: If there is no quantizer for a new index, or an existing one has other settings.
    """
    if index is None and (folder is None or not (Path(folder) / "manifest.json").is_file()):
        if quantizer is None:
            raise ValueError(
                "A new collection needs a quantizer: a bundled one by its name, such as quantizer='minilm-384', a "
                "folder, a Hub id, or an RQMoEModel."
            )
        return RQMoEIndex(quantizer, folder, **settings)
    if index is None:
        index = RQMoEIndex.load(folder, quantizer)  # type: ignore[arg-type]
    elif quantizer is not None or folder is not None:
        raise ValueError("An index has its quantizer and folder already: give either these or the index.")
    known = index.settings | {"num_codebooks": index.settings["quantizer"]["num_codebooks"]}
    for name, value in settings.items():
        if value is not None and known.get(name) != value:
            raise ValueError(
                f"The collection was made with {name}={known.get(name)!r}, not {value!r}: leave it out, or make "
                "another collection."
            )
    return index


def own_ids(index: RQMoEIndex, ids: Iterable[str]) -> list[Any]:
    """Ids as the index has them: integers, where it was made without ids or with such."""
    listed = list(ids)
    if not listed or not all(id.removeprefix("-").isdecimal() and len(id) < 19 for id in listed):
        return listed
    numbers = [int(id) for id in listed]
    if listed[0] in index or numbers[0] in index:
        return listed if listed[0] in index else numbers
    first = next(index.documents(), None)
    return listed if first is None or isinstance(first.id, str) else numbers
