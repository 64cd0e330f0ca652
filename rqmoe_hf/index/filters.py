r"""Metadata filters: a small dictionary language, compiled to an SQLite condition whose values are bound.

`{"lang": "en"}` asks for equality, `{"year": {"$gte": 2020, "$lt": 2025}}` for a range, and several fields at once
must all hold. Fields inside others are written with dots (`"author.name"`; `r"a\.b"` is a field with a dot in its own
name). `$id` is the document's id. The operators:

| operator | holds where the field |
| --- | --- |
| `$eq`, `$ne` | equals the value, or does not |
| `$gt`, `$gte`, `$lt`, `$lte` | is of the value's kind (number or string) and lies so |
| `$in`, `$nin` | equals one of the values, or none |
| `$contains` | is a list that holds the value |
| `$text`, `$itext` | is a string that holds this one; the latter ignores case |
| `$exists` | is there (`True`) or not (`False`) |
| `$empty` | is missing, null, `""` or `[]` (`True`), or none of these (`False`) |
| `$and`, `$or`, `$not` | combine whole filters: lists of them, or one |

A condition on a field that a document lacks is false. `$ne`, `$nin`, `$not` and `{"$exists": False}` are the exact
opposites of the others and therefore true there. `None` stands for a field that is missing or null. As in Python,
`True` equals 1. Strings of the metadata are compared up to the character U+0000, if they hold it.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Filter = dict[str, object]
Scalar = str | int | float | bool | None

COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
OPPOSITES = {"$ne": "$eq", "$nin": "$in"}
HOLDS = {"$text": "instr({}, ?)", "$itext": "instr(casefold({}), casefold(?))"}
FIELD_OPERATORS = ("$eq", "$ne", *COMPARISONS, "$in", "$nin", "$contains", *HOLDS, "$exists", "$empty")
ID = "$id"
DEPTH = 32  # of nested filters; SQLite has a limit of its own on deep expressions


@dataclass
class Field:
    """A field as SQLite reads it.

    Args:
        name: As the user wrote it.
        kind: Expression for its JSON type; NULL if it is missing.
        value: Expression for its value; JSON text for lists and dictionaries.
        bound: What is to be bound for each of the two.
    """

    name: str
    kind: str
    value: str
    bound: list[Scalar]


def compile_filter(filter: Filter, depth: int = 0) -> tuple[str, list[Scalar]]:
    """An SQLite condition over the columns `id` and `metadata` (JSON), and the values to bind to it.

    It calls a function `casefold`, which the connection must have.

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
        _logical(name, value, depth) if name.startswith("$") and name != ID else _conditions(_field(name), value)
        for name, value in filter.items()
    ]
    return _joined(parts, "AND", "1")


def _logical(name: str, value: object, depth: int) -> tuple[str, list[Scalar]]:
    if name == "$not" and isinstance(value, dict):
        condition, values = compile_filter(value, depth + 1)
        return f"NOT {condition}", values
    if name not in ("$and", "$or") or not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{name!r} is not understood here: expected a field's name, {ID}, $and or $or with a list of filters, or "
            f"$not with a filter, got {value!r}."
        )
    parts = [compile_filter(part, depth + 1) for part in value]
    return _joined(parts, "AND", "1") if name == "$and" else _joined(parts, "OR", "0")


def _conditions(field: Field, wanted: object) -> tuple[str, list[Scalar]]:
    if not isinstance(wanted, dict):
        return _condition(field, "$eq", wanted)
    if not wanted:
        raise ValueError(f"The filter on {field.name!r} is empty: expected one of {', '.join(FIELD_OPERATORS)}.")
    return _joined([_condition(field, operator, value) for operator, value in wanted.items()], "AND", "1")


def _condition(field: Field, operator: str, value: object) -> tuple[str, list[Scalar]]:
    """One operator on one field. It is never NULL, so that NOT gives the exact opposite."""
    if operator in OPPOSITES:
        condition, values = _condition(field, OPPOSITES[operator], value)
        return f"NOT {condition}", values
    if operator in ("$exists", "$empty"):
        return _presence(field, operator, value)
    if operator == "$in":
        return _in(field, value)
    if operator not in FIELD_OPERATORS:
        raise ValueError(f"The operator {operator!r} on {field.name!r} is not one of {', '.join(FIELD_OPERATORS)}.")
    scalar = _scalar(value, operator, field.name)
    if operator == "$contains":
        elements = f"json_each(CASE {field.kind} WHEN 'array' THEN {field.value} END)"
        return f"EXISTS (SELECT 1 FROM {elements} WHERE atom IS ?)", [*field.bound, *field.bound, scalar]
    if operator in HOLDS and not isinstance(scalar, str):
        raise ValueError(f"{operator} on {field.name!r} expects a string, got {value!r}.")
    if operator in COMPARISONS and scalar is None:
        raise ValueError(f"{operator} on {field.name!r} expects a number or a string, got None.")
    if operator in HOLDS:
        compared = HOLDS[operator].format(field.value)
    else:
        compared = f"{field.value} {COMPARISONS.get(operator, 'IS')} ?"
    return f"({_same_kind(field, scalar)} AND {compared})", [*field.bound, *field.bound, scalar]


def _presence(field: Field, operator: str, value: object) -> tuple[str, list[Scalar]]:
    if not isinstance(value, bool):
        raise ValueError(f"{operator} on {field.name!r} expects True or False, got {value!r}.")
    if operator == "$exists":
        return f"({field.kind} IS {'NOT ' if value else ''}NULL)", field.bound
    cases = f"WHEN 'null' THEN 1 WHEN 'text' THEN {field.value} = '' WHEN 'array' THEN {field.value} = '[]' ELSE 0"
    empty = f"(CASE coalesce({field.kind}, 'null') {cases} END)"
    return (empty if value else f"NOT {empty}"), field.bound * 3


def _in(field: Field, wanted: object) -> tuple[str, list[Scalar]]:
    """The values travel as one JSON list, of any length."""
    if not isinstance(wanted, (list, tuple, set, frozenset)):
        raise ValueError(f"$in on {field.name!r} expects a list of values, got {wanted!r}.")
    scalars = [_scalar(value, "$in", field.name) for value in wanted]
    if any(isinstance(value, float) and math.isinf(value) for value in scalars):
        raise ValueError(f"$in on {field.name!r} expects finite numbers, got {wanted!r}.")
    # SQLite's JSON ends strings at the character U+0000, which metadata are compared up to anyway. Ids are not.
    apart = {value for value in scalars if field.name == ID and isinstance(value, str) and "\0" in value}
    listed = json.dumps([value for value in scalars if value not in apart])
    plain = f"coalesce({field.kind}, 'null') NOT IN ('null', 'array', 'object')"
    found = f"({plain} AND {field.value} IN (SELECT atom FROM json_each(?) WHERE atom IS NOT NULL))"
    parts: list[tuple[str, list[Scalar]]] = [(found, [*field.bound, *field.bound, listed])]
    parts += [_condition(field, "$eq", value) for value in apart]
    if None in scalars:
        parts.append(_condition(field, "$eq", None))
    return _joined(parts, "OR", "0")


def _same_kind(field: Field, value: Scalar) -> str:
    """That the field is of the value's kind: to SQLite any string is above any number, and a list equals its text."""
    if value is None:
        return f"coalesce({field.kind}, 'null') IS 'null'"
    kinds = "('text')" if isinstance(value, str) else "('integer', 'real', 'true', 'false')"
    return f"coalesce({field.kind}, '') IN {kinds}"


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


def _field(name: str) -> Field:
    """The field as a JSON path. It is bound like a value, and quoted for SQLite's own syntax."""
    if name == ID:
        return Field(name, "typeof(id)", "id", [])
    parts = [part.replace(r"\.", ".") for part in re.split(r"(?<!\\)\.", name)]
    if not all(part and json.dumps(part, ensure_ascii=False) == f'"{part}"' for part in parts):
        raise ValueError(
            "A filter's field may not be empty or hold quotation marks, control codes, or backslashes but before a "
            f"dot, got {name!r}."
        )
    path = "$" + "".join(f'."{part}"' for part in parts)
    return Field(name, "json_type(metadata, ?)", "json_extract(metadata, ?)", [path])


def _joined(parts: Sequence[tuple[str, list[Scalar]]], word: str, empty: str) -> tuple[str, list[Scalar]]:
    if not parts:
        return empty, []
    values = [value for _, bound in parts for value in bound]
    return "(" + f" {word} ".join(condition for condition, _ in parts) + ")", values
