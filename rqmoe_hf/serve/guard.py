"""What stands before the application: who may ask, how much, how many at once, and how long."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_BYTES = 16_384
BODY_SECONDS = 10
Given = ParamSpec("Given")
Result = TypeVar("Result")


class Guard:
    """Passes on requests to known hosts with a small body; adds headers that tell browsers what to refuse.

    A page of another site can make its own name point to this computer, so that a browser takes the two for one site;
    its requests still name that site as their host. Without that trick, browsers let it send anything but JSON.

    Args:
        app: The application.
        hosts: Names that requests may call this server by; None for any.
        policy: Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, policy: str):
        self._app, self._hosts = app, hosts
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        try:
            if self._hosts is not None and _host(scope) not in self._hosts:
                raise HTTPException(421, f"This server answers to {', '.join(sorted(self._hosts))} only.")
            if scope["method"] == "POST" and _media_type(scope) != "application/json":
                raise HTTPException(415, "Send JSON, with the header Content-Type: application/json.")
            body = await _read(receive)
        except HTTPException as error:
            return await error_response(error.status_code, error.detail)(scope, receive, send_with_headers)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Message:
            return next(messages, None) or await receive()

        await self._app(scope, receive_again, send_with_headers)


def _header(scope: Scope, name: bytes) -> str:
    return dict(scope["headers"]).get(name, b"").decode("latin-1")


def _media_type(scope: Scope) -> str:
    """What the body of a request is said to be, in lower case, without parameters such as a charset."""
    return _header(scope, b"content-type").partition(";")[0].strip().lower()


def _host(scope: Scope) -> str | None:
    """The name that a request calls the server by, without the port."""
    try:
        return urlsplit(f"//{_header(scope, b'host')}").hostname
    except ValueError:
        return None


async def _read(receive: Receive) -> bytes:
    """The whole body."""
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > BODY_BYTES:
                    raise HTTPException(413, f"The request is too large: at most {BODY_BYTES:,} bytes.")
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS} seconds to arrive.") from None
    return body


def error_response(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as all of them look: `{"error": text}`."""
    return JSONResponse({"error": text}, status, headers)


class Workers:
    """Threads for what takes long, with a short queue; what finds the queue full is refused at once.

    Args:
        threads: How many work.
        waiting: How many requests may wait for them.
        seconds: How long a request may take, its waiting included.
    """

    def __init__(self, threads: int, waiting: int, seconds: float):
        self._pool = ThreadPoolExecutor(threads)
        self._places = threading.BoundedSemaphore(threads + waiting)
        self._seconds = seconds

    async def run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """The function's result.

        A function that takes too long goes on, and takes its place until it ends: threads cannot be stopped.

        Raises:
            HTTPException: 503 if the queue is full, 504 if it takes too long.
        """
        if not self._places.acquire(blocking=False):
            raise HTTPException(503, "Too many searches at once: try again in a second.", {"Retry-After": "1"})
        future = self._pool.submit(function, *args, **kwargs)
        future.add_done_callback(self._release)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError:
            raise HTTPException(504, f"The search took longer than {self._seconds:g} seconds.") from None

    def _release(self, _: Any) -> None:
        self._places.release()

    def close(self) -> None:
        """Starts nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
