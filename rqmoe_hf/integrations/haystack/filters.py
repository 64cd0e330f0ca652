"""Haystack's filters in the language of the index."""

from datetime import datetime
from typing import Any

from ...index.filters import compile_filter
from .. import needs_extra

with needs_extra("haystack"):
    from haystack.errors import FilterError

COMPARISONS = {">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}
OPERATORS = {"==": "$eq", "!=": "$ne", "in": "$in", "not in": "$nin", **COMPARISONS}


def to_filter(filters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Haystack's filters in the index's language; see `rqmoe_hf.index.filters`.

    Raises:
        FilterError: If they are malformed, or on other fields than `meta` and `id`.
    """
    if not filters:
        return None
    translated = _to_filter(filters)
    try:
        compile_filter(translated)
    except ValueError as error:
        raise FilterError(str(error)) from error
    return translated


def _to_filter(filters: dict[str, Any]) -> dict[str, Any]:
    if "field" in filters:
        return _to_condition(filters)
    if "operator" not in filters or "conditions" not in filters:
        raise FilterError(f"Expected 'field', 'operator' and 'value', or 'operator' and 'conditions', got {filters}.")
    parts = [_to_filter(condition) for condition in filters["conditions"]]
    if filters["operator"] not in ("AND", "OR", "NOT"):
        raise FilterError(f"The logical operator must be AND, OR or NOT, got {filters['operator']!r}.")
    return {"$not": {"$and": parts}} if filters["operator"] == "NOT" else {f"${filters['operator'].lower()}": parts}


def _to_condition(condition: dict[str, Any]) -> dict[str, Any]:
    if "operator" not in condition or "value" not in condition:
        raise FilterError(f"A condition needs 'field', 'operator' and 'value', got {condition}.")
    field, operator, value = condition["field"], condition["operator"], condition["value"]
    if operator not in OPERATORS:
        raise FilterError(f"The operator on {field!r} must be one of {', '.join(OPERATORS)}, got {operator!r}.")
    if field in ("content", "blob", "embedding", "sparse_embedding", "score"):
        raise FilterError(f"Filters may be on fields of meta and on id, got {field!r}.")
    value = value.isoformat() if isinstance(value, datetime) else value
    if operator in ("in", "not in") and not isinstance(value, list):
        raise FilterError(f"{operator!r} on {field!r} needs a list, got {value!r}.")
    if operator in COMPARISONS:
        if value is None:
            return {"$or": []}
        if isinstance(value, list) or (isinstance(value, str) and not _is_date(value)):
            raise FilterError(f"{operator!r} on {field!r} needs a number or a date in ISO format, got {value!r}.")
    return {"$id" if field == "id" else field.removeprefix("meta."): {OPERATORS[operator]: value}}


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
