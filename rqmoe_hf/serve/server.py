"""A server of the page, until it is stopped."""

import ipaddress
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn

from .app import make_app
from .live import LiveIndex

CONNECTIONS = 100


def run(
    folder: Path, quantizer: str | None, encoder: str | None, host: str, port: int, exact_up_to: int = 100_000
) -> None:
    """Serves an index until the process is interrupted.

    Args:
        folder: Of the index.
        quantizer: See `LiveIndex`.
        encoder: See `LiveIndex`.
        host: Address to listen at.
        port: To listen at; 0 takes one that is free.
        exact_up_to: See `LiveIndex`.

    Raises:
        ValueError: As `LiveIndex`.
        OSError: If the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        address, port = listening.getsockname()[:2]
        loopback_only = ipaddress.ip_address(address).is_loopback
        if not loopback_only:
            print(
                f"rqmoe: whoever reaches {address} can search this index and read its texts: there is no password.",
                file=sys.stderr,
            )
        app = make_app(LiveIndex(folder, quantizer, encoder, exact_up_to), loopback_only)
        print(f"http://{f'[{address}]' if family == socket.AF_INET6 else address}:{port} (Ctrl+C ends it)", flush=True)
        settings = uvicorn.Config(
            app,
            ws="none",
            log_level="warning",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])
