"""What users give an index, checked and brought into one form."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .documents import Id

INT64 = np.iinfo(np.int64)


def as_vectors(vectors: Any, size: int, what: str = "embeddings") -> np.ndarray:
    """Embeddings or queries as finite floats `(n, size)`; one vector becomes one row.

    Raises:
        ValueError: If they are anything else.
    """
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().float().cpu().numpy()
    try:
        array = np.asarray(vectors)
        array = array if np.issubdtype(array.dtype, np.floating) else _from_lists(vectors, array, what)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {what} as floats of shape (n, {size}): {error}.") from error
    array = array[None] if array.ndim == 1 and array.size else array
    if array.ndim != 2 or array.shape[1] != size:
        raise ValueError(
            f"Expected {what} of shape (n, {size}), the quantizer's hidden_size, got {array.shape}: they come from "
            "another encoder than the quantizer was trained for."
        )
    return array


def _from_lists(vectors: Any, array: np.ndarray, what: str) -> np.ndarray:
    if isinstance(vectors, np.ndarray) or array.dtype.kind not in "iuO":
        raise ValueError(f"{what} are {array.dtype}")
    return np.array([np.asarray(row, np.float32) for row in vectors], np.float32)


def check_finite(vectors: np.ndarray, what: str = "embeddings", first: int = 0, largest: float = np.inf) -> None:
    """Raises a ValueError that names the first row with NaN, infinity or an entry of `largest` or more."""
    bad = ~(np.abs(vectors) < largest).all(axis=1)  # NaN fails it, too
    if bad.any():
        more = f", infinity or an entry of {largest:g} or more" if np.isfinite(largest) else " or infinity"
        raise ValueError(f"Row {first + int(bad.argmax())} of the {what} holds NaN{more}: drop or mend it.")


def as_ids(ids: Any) -> list[Id]:
    """Ids as Python integers of 64 bits, or as strings.

    Raises:
        ValueError: If some are neither, or kinds are mixed.
    """
    if isinstance(ids, (str, int, np.integer)):
        raise ValueError(f"Expected a list of ids, got the single {ids!r}: write [{ids!r}].")
    listed = [id.item() if isinstance(id, np.generic) else id for id in ids]
    for id in listed:
        whole = isinstance(id, int) and not isinstance(id, bool) and INT64.min <= id <= INT64.max
        if not whole and not (isinstance(id, str) and id and is_unicode(id)):
            raise ValueError(f"Ids are integers of 64 bits or strings that are not empty, got {id!r}.")
    if len({type(id) for id in listed}) > 1:
        raise ValueError("Ids must be all integers or all strings, got both.")
    return listed


def as_texts(texts: Any, what: str = "texts") -> list[str]:
    """Texts as a list of strings.

    Raises:
        ValueError: If some are no strings, or cannot be stored as UTF-8.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str) or not is_unicode(text):
            raise ValueError(f"Expected {what} as strings, but number {number} is {text!r}.")
    return listed


def as_metadata(metadata: Iterable[Any]) -> list[str | None]:
    """Metadata as JSON objects; None where there is none.

    Raises:
        ValueError: If some are not dictionaries of what JSON has.
    """
    written = []
    for number, one in enumerate(metadata):
        if one is not None and not isinstance(one, dict):
            raise ValueError(f"Metadata are dictionaries, one per vector, but number {number} is {one!r}.")
        try:
            text = json.dumps(one, ensure_ascii=False, allow_nan=False, default=_plain) if one else None
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The metadata of number {number} cannot be written as JSON: {error}.") from error
        if text is not None and not is_unicode(text):
            raise ValueError(f"The metadata of number {number} hold a string that is no Unicode: {one!r}.")
        written.append(text)
    return written


def _plain(value: object) -> object:
    """Numpy's values as Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON type")


def is_unicode(text: str) -> bool:
    """Whether a string can be stored: lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_lengths(count: int, **given: Sequence | None) -> None:
    """Raises a ValueError if something that is given has not one entry per vector."""
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"There are {len(values)} {name} for {count} vectors: give one each.")


def ids_array(ids: Sequence[Id | None]) -> np.ndarray:
    """Ids as users get them: int64, or an array of strings (dtype object)."""
    if all(isinstance(id, int) for id in ids):
        return np.array(ids, np.int64)
    return np.array(ids, object)
