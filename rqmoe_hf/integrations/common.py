"""What the adapters share: opening a collection, and ids, which all frameworks have as strings."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..index import RQMoEIndex
from ..index.inputs import INT64
from ..modeling_rqmoe import RQMoEModel

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")  # as `str` writes them: "007" is another id than 7


def open_index(
    quantizer: RQMoEModel | str | os.PathLike | None,
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
                "A new collection needs a quantizer: a bundled one by its name, such as "
                "quantizer='minilm-384-32-bytes', a folder, a Hub id, or an RQMoEModel."
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


def own_ids(index: RQMoEIndex, ids: Iterable[str], missing_ok: bool = False) -> list[Any]:
    """Ids as the index has them: integers, if it was made without ids or with such.

    Args:
        index: The index.
        ids: Ids as a framework has them.
        missing_ok: Leave out what can be no id of the index.
    """
    if index.id_type is not int:
        return list(ids)
    found = [int(id) if _is_own(id) else id for id in ids]
    return [id for id in found if isinstance(id, int)] if missing_ok else found


def _is_own(id: str) -> bool:
    """Whether an index with integers as ids can have an id whose text this is."""
    return INTEGER.fullmatch(id) is not None and INT64.min <= int(id) <= INT64.max
