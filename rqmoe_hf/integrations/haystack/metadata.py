"""What metadata a Haystack document store holds: its fields, their values, and how many there are."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from ...index import RQMoEIndex
from .filters import to_filter

OWN = "_haystack"  # metadata beside the user's, for what the index has no place for
Filters = dict[str, Any] | None


class MetadataReports:
    """The methods of a store that report on metadata; all read every document that the filters leave.

    Field names may begin with `meta.`. Values that only look alike, such as 1, 1.0, "1" and True, are different ones.
    """

    index: RQMoEIndex

    def count_unique_metadata_by_filter(self, filters: Filters, metadata_fields: list[str]) -> dict[str, int]:
        """How many different values fields have among the documents that match."""
        names = [_bare(field) for field in metadata_fields]
        seen: dict[str, set[str]] = {name: set() for name in names}
        for metadata in self._metadata(filters):
            for name in names:
                if metadata.get(name) is not None:
                    seen[name].add(_identity(metadata[name]))
        return {name: len(values) for name, values in seen.items()}

    def get_metadata_fields_info(self) -> dict[str, dict[str, str]]:
        """The fields that there are, each with its type: "keyword", "int", "float" or "boolean"."""
        kinds = {bool: "boolean", int: "int", float: "float"}
        found: dict[str, dict[str, str]] = {}
        for metadata in self._metadata(None):
            for name, value in metadata.items():
                if value is not None:
                    found[name] = {"type": kinds.get(type(value), "keyword")}
        return found

    def get_metadata_field_min_max(self, metadata_field: str) -> dict[str, Any]:
        """The least and the greatest value of a field; None if it has none, or if they do not compare."""
        name = _bare(metadata_field)
        known = (metadata.get(name) for metadata in self._metadata(None))
        values: list[Any] = [value for value in known if isinstance(value, (int, float, str))]
        try:
            return {"min": min(values, default=None), "max": max(values, default=None)}
        except TypeError:
            return {"min": None, "max": None}

    def get_metadata_field_unique_values(
        self,
        metadata_field: str,
        search_term: str | None = None,
        from_: int = 0,
        size: int = 10,
        filters: Filters = None,
    ) -> tuple[list[Any], int]:
        """The different values of a field in the order of their texts, a page of them, and how many there are.

        Args:
            metadata_field: The field.
            search_term: Only values that contain it, in capitals or not.
            from_: The first one of the page.
            size: Of the page.
            filters: Consider only documents that match.
        """
        name = _bare(metadata_field)
        values = [metadata[name] for metadata in self._metadata(filters) if metadata.get(name) is not None]
        different = {_identity(value): value for value in values if (search_term or "").lower() in str(value).lower()}
        ordered = sorted(different.values(), key=lambda value: (str(value), type(value).__name__))
        return ordered[from_ : from_ + size], len(ordered)

    async def count_unique_metadata_by_filter_async(
        self, filters: Filters, metadata_fields: list[str]
    ) -> dict[str, int]:
        """As [`count_unique_metadata_by_filter`]."""
        return await asyncio.to_thread(self.count_unique_metadata_by_filter, filters, metadata_fields)

    async def get_metadata_fields_info_async(self) -> dict[str, dict[str, str]]:
        """As [`get_metadata_fields_info`]."""
        return await asyncio.to_thread(self.get_metadata_fields_info)

    async def get_metadata_field_min_max_async(self, metadata_field: str) -> dict[str, Any]:
        """As [`get_metadata_field_min_max`]."""
        return await asyncio.to_thread(self.get_metadata_field_min_max, metadata_field)

    async def get_metadata_field_unique_values_async(
        self, metadata_field: str, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], int]:
        """As [`get_metadata_field_unique_values`]."""
        return await asyncio.to_thread(self.get_metadata_field_unique_values, metadata_field, *args, **kwargs)

    def _metadata(self, filters: Filters) -> Iterator[dict[str, Any]]:
        """The user's metadata of the documents that match."""
        for document in self.index.documents(to_filter(filters)):
            yield {name: value for name, value in document.metadata.items() if name != OWN}


def _bare(field: str) -> str:
    return field.removeprefix("meta.")


def _identity(value: Any) -> str:
    """A text that is the same for the same value, and another one for 1, 1.0, "1" and True."""
    return json.dumps(value, sort_keys=True)
