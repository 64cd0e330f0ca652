"""Metadata filters: a small dictionary language, compiled to an SQLite condition whose values are bound.

`{"lang": "en"}` asks for equality, `{"year": {"$gte": 2020, "$lt": 2025}}` for a range, and several fields at once
must all hold. Fields inside others are written with dots (`"author.name"`). The operators:

| operator | holds where the field |
| --- | --- |
| `$eq`, `$ne` | equals the value, or does not |
| `$gt`, `$gte`, `$lt`, `$lte` | is of the value's kind (number or string) and lies so |
| `$in`, `$nin` | equals one of the values, or none |
| `$contains` | is a list that holds the value |
| `$exists` | is there (`True`) or not (`False`) |
| `$and`, `$or`, `$not` | combine whole filters: lists of them, or one |

A condition on a field that a document lacks is false. `$ne`, `$nin`, `$not` and `{"$exists": False}` are the exact
opposites of the others and therefore true there. `None` stands for a field that is missing or null. As in Python,
`True` equals 1.
"""

import json
import math
from collections.abc import Sequence

Filter = dict[str, object]
Scalar = str | int | float | bool | None

COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
OPPOSITES = {"$ne": "$eq", "$nin": "$in"}
FIELD_OPERATORS = ("$eq", "$ne", *COMPARISONS, "$in", "$nin", "$contains", "$exists")
DEPTH = 32  # of nested filters; SQLite has a limit of its own on deep expressions


def compile_filter(filter: Filter, depth: int = 0) -> tuple[str, list[Scalar]]:
    """An SQLite condition over a column `metadata` (JSON) and the values to bind to it.

    Args:
        filter: See the module's docstring. An empty one holds everywhere.
        depth: Of this filter in others.

    Raises:
        ValueError: If it is not such a filter.
    """
    if not isinstance(filter, dict) or not all(isinstance(field, str) for field in filter):
        raise ValueError(f'A filter is a dictionary such as {{"lang": "en"}}, got {filter!r}.')
    if depth > DEPTH:
        raise ValueError(f"The filter is nested more than {DEPTH} deep.")
    parts = [
        _logical(name, value, depth) if name.startswith("$") else _field(name, value) for name, value in filter.items()
    ]
    return _joined(parts, "AND", "1")


def _logical(name: str, value: object, depth: int) -> tuple[str, list[Scalar]]:
    if name == "$not" and isinstance(value, dict):
        condition, values = compile_filter(value, depth + 1)
        return f"NOT {condition}", values
    if name not in ("$and", "$or") or not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{name!r} is not understood here: expected a field's name, $and or $or with a list of filters, or $not "
            f"with a filter, got {value!r}."
        )
    parts = [compile_filter(part, depth + 1) for part in value]
    return _joined(parts, "AND", "1") if name == "$and" else _joined(parts, "OR", "0")


def _field(name: str, wanted: object) -> tuple[str, list[Scalar]]:
    path = _path(name)
    if not isinstance(wanted, dict):
        return _condition(path, "$eq", wanted, name)
    if not wanted:
        raise ValueError(f"The filter on {name!r} is empty: expected one of {', '.join(FIELD_OPERATORS)}.")
    return _joined([_condition(path, operator, value, name) for operator, value in wanted.items()], "AND", "1")


def _condition(path: str, operator: str, value: object, name: str) -> tuple[str, list[Scalar]]:
    """One operator on one field. It is never NULL, so that NOT gives the exact opposite."""
    if operator in OPPOSITES:
        condition, values = _condition(path, OPPOSITES[operator], value, name)
        return f"NOT {condition}", values
    if operator == "$exists":
        if not isinstance(value, bool):
            raise ValueError(f"$exists on {name!r} expects True or False, got {value!r}.")
        return f"(json_type(metadata, ?) IS {'NOT ' if value else ''}NULL)", [path]
    if operator == "$eq":
        scalar = _scalar(value, operator, name)
        return f"({_same_kind(scalar)} AND json_extract(metadata, ?) IS ?)", [path, path, scalar]
    if operator == "$in":
        return _in(path, value, name)
    if operator == "$contains":
        scalar = _scalar(value, operator, name)
        found = "EXISTS (SELECT 1 FROM json_each(metadata, ?) AS item WHERE item.atom IS ?)"
        return f"(json_type(metadata, ?) IS 'array' AND {found})", [path, path, scalar]
    if operator in COMPARISONS:
        scalar = _scalar(value, operator, name)
        if scalar is None:
            raise ValueError(f"{operator} on {name!r} expects a number or a string, got None.")
        compared = f"json_extract(metadata, ?) {COMPARISONS[operator]} ?"
        return f"({_same_kind(scalar)} AND {compared})", [path, path, scalar]
    raise ValueError(f"The operator {operator!r} on {name!r} is not one of {', '.join(FIELD_OPERATORS)}.")


def _in(path: str, wanted: object, name: str) -> tuple[str, list[Scalar]]:
    """The values travel as one JSON list, of any length."""
    if not isinstance(wanted, (list, tuple, set, frozenset)):
        raise ValueError(f"$in on {name!r} expects a list of values, got {wanted!r}.")
    scalars = [_scalar(value, "$in", name) for value in wanted]
    if any(isinstance(value, float) and math.isinf(value) for value in scalars):
        raise ValueError(f"$in on {name!r} expects finite numbers, got {wanted!r}.")
    plain = "coalesce(json_type(metadata, ?), 'null') NOT IN ('null', 'array', 'object')"
    found = f"({plain} AND json_extract(metadata, ?) IN (SELECT atom FROM json_each(?) WHERE atom IS NOT NULL))"
    parts: list[tuple[str, list[Scalar]]] = [(found, [path, path, json.dumps(scalars)])]
    if None in scalars:
        parts.append(_condition(path, "$eq", None, name))
    return _joined(parts, "OR", "0")


def _same_kind(value: Scalar) -> str:
    """That the field is of the value's kind: to SQLite any string is above any number, and a list equals its text."""
    if value is None:
        return "coalesce(json_type(metadata, ?), 'null') IS 'null'"
    kinds = "('text')" if isinstance(value, str) else "('integer', 'real', 'true', 'false')"
    return f"coalesce(json_type(metadata, ?), '') IN {kinds}"


def _scalar(value: object, operator: str, name: str) -> Scalar:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's numbers
        value = value.item()  # type: ignore[attr-defined]
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{operator} on {name!r} expects a string, a number, a boolean or None, got {value!r}.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{operator} on {name!r}: {value} does not fit into 64 bits.")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{operator} on {name!r} expects a value, got NaN, which nothing equals.")
    return value


def _path(name: str) -> str:
    """The field as a JSON path. It is bound like a value, and quoted for SQLite's own syntax."""
    if not all(name.split(".")) or json.dumps(name, ensure_ascii=False) != f'"{name}"':
        raise ValueError(
            f"A filter's field may not be empty or hold quotation marks, backslashes or control codes, got {name!r}."
        )
    return "$" + "".join(f'."{part}"' for part in name.split("."))


def _joined(parts: Sequence[tuple[str, list[Scalar]]], word: str, empty: str) -> tuple[str, list[Scalar]]:
    if not parts:
        return empty, []
    values = [value for _, bound in parts for value in bound]
    return "(" + f" {word} ".join(condition for condition, _ in parts) + ")", values
