"""Vector stores for RAG frameworks, each behind the extra of its name: langchain, llama-index, haystack."""

from collections.abc import Iterator
from contextlib import contextmanager


class OptionalDependencyError(ImportError):
    """A framework is not installed; says which extra brings it."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around the imports of a framework.

    Raises:
        OptionalDependencyError: If one of them is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(f'{error}. Install it: pip install "rqmoe-hf[{extra}]"') from error
