"""The application: one page, and the three requests that it makes."""

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ..index import Document
from .guard import LOOPBACK_NAMES, Guard, Workers, error_response
from .live import LiveIndex, Refused, Setting
from .live_shards import LiveShards

QUERY_CHARACTERS, TOP_K, SHORTLIST = 2_000, 100, 10_000
TEXT_CHARACTERS, FIELDS, NAME_CHARACTERS, VALUE_CHARACTERS = 4_000, 20, 60, 200  # of a document that is shown
SECONDS = 30


class Search(BaseModel):
    """What the page asks for; numbers that are left out are the index's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Annotated[str, Field(max_length=QUERY_CHARACTERS)]
    top_k: Annotated[int, Field(ge=1, le=TOP_K)] = 10
    shortlist: Annotated[int, Field(ge=1, le=SHORTLIST)] = 100
    num_codebooks: Annotated[int, Field(ge=1)] | None = None
    rescore: Literal["floats", "codes", "tables"] | None = None

    @property
    def setting(self) -> Setting:
        """How to search."""
        return Setting(self.shortlist, self.num_codebooks, self.rescore)


def make_app(live: LiveIndex | LiveShards, loopback_only: bool = True, searches: Workers | None = None) -> ASGIApp:
    """The application over an index.

    Args:
        live: The index, or shards.
        loopback_only: Refuse requests that call this server by another name than computers call themselves.
        searches: Threads that search. Default: two, for which eight requests may wait.
    """
    searches, comparisons = searches or Workers(2, 8, SECONDS), Workers(1, 4, SECONDS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        searches.close()
        comparisons.close()

    app = FastAPI(title="rqmoe", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    _add_errors(app)
    _add_requests(app, live, searches, comparisons)
    app.get("/", response_class=HTMLResponse)(lambda: page)
    return Guard(app, LOOPBACK_NAMES if loopback_only else None, content_policy(page))


def _add_requests(app: FastAPI, live: LiveIndex | LiveShards, searches: Workers, comparisons: Workers) -> None:
    @app.get("/api/index")
    async def describe() -> dict[str, Any]:
        limits = {"query_characters": QUERY_CHARACTERS, "top_k": TOP_K, "shortlist": SHORTLIST}
        return await searches.run(live.describe) | {"limits": limits}

    @app.post("/api/search")
    async def search(asked: Search) -> dict[str, Any]:
        hits = await searches.run(live.search, asked.query, asked.top_k, asked.setting)
        pairs = zip(hits.documents, hits.scores, strict=True)
        return {
            "hits": [{**_shown(document), "score": score} for document, score in pairs],
            "embedding_seconds": hits.embedding_seconds,
            "search_seconds": hits.search_seconds,
        }

    @app.post("/api/compare")
    async def compare(asked: Search) -> dict[str, Any]:
        compared = await comparisons.run(live.compare, asked.query, asked.setting)
        pairs = zip(compared.exact, compared.found, strict=True)
        return {
            "exact": [{**_shown(document), "found": found} for document, found in pairs],
            "recall": compared.recall,
            "exact_seconds": compared.seconds,
        }


def _add_errors(app: FastAPI) -> None:
    """All errors look alike, and say no more than the asker can use."""

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = []
        for one in error.errors()[:5]:
            names = [name for name in one["loc"][1:] if isinstance(name, str)]
            problems.append(f"{'.'.join(names) or 'body'}: {one['msg']}")
        return error_response(422, f"{'; '.join(problems)}.")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error_response(422, str(error))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, "The search failed; what the server printed says why.")


def _shown(document: Document) -> dict[str, Any]:
    """A document for the page, where integers above 2**53 and long texts have no place."""
    fields = []
    for name, value in list(document.metadata.items())[:FIELDS]:
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        fields.append([shortened(name, NAME_CHARACTERS), shortened(written, VALUE_CHARACTERS)])
    text = None if document.text is None else shortened(document.text, TEXT_CHARACTERS)
    return {"id": str(document.id), "text": text, "metadata": fields}


def shortened(text: str, characters: int) -> str:
    """A text, or its beginning and an ellipsis."""
    return text if len(text) <= characters else f"{text[:characters]}\u2026"


def content_policy(page: str) -> str:
    """The Content-Security-Policy under which nothing but the page's own script and style is run."""
    own = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
            for content in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
