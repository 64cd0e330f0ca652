"""A server of the page, until it is stopped."""

import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from ..index import RQMoEShards
from .app import make_app
from .connections import Connection
from .guard import Workers
from .live import LiveIndex
from .live_shards import LiveShards

CONNECTIONS = 100


def run(
    folder: Path,
    quantizer: str | None,
    encoder: str | None,
    host: str,
    port: int,
    exact_up_to: int = 100_000,
    shards: Sequence[Path] = (),
    replicas: int = 0,
) -> None:
    """Serves an index until the process is interrupted.

    Args:
        folder: Of the index.
        quantizer: See `LiveIndex`.
        encoder: See `LiveIndex`.
        host: Address to listen at.
        port: To listen at; 0 takes one that is free.
        exact_up_to: See `LiveIndex`.
        shards: Folders of further shards.
        replicas: Replicas of each shard that Ray Serve keeps; 0 searches in this process.

    Raises:
        ValueError: As `LiveIndex`, or as `RQMoEShards` or `ReplicatedShards`.
        OSError: If the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        address = listening.getsockname()[0]
        loopback_only = ipaddress.ip_address(address).is_loopback
        if not loopback_only:
            print(
                f"rqmoe: whoever reaches {address} can search this index and read its texts: there is no password.",
                file=sys.stderr,
            )
        if shards or replicas:
            _serve_shards([folder, *shards], quantizer, encoder, replicas, listening, loopback_only)
            return
        _serve(make_app(LiveIndex(folder, quantizer, encoder, exact_up_to), loopback_only), listening)


def _serve_shards(
    folders: Sequence[Path], quantizer: str | None, encoder: str | None, replicas: int, listening: socket.socket,
    loopback_only: bool,
) -> None:  # fmt: skip
    """Serves shards until the process is interrupted, and ends their replicas."""
    opened: RQMoEShards
    searches = None
    if replicas:
        from .replicas import SEARCHES, ReplicatedShards

        if not os.environ.get("RAY_ADDRESS"):
            print("rqmoe: the ports of Ray itself are open at all addresses of this computer; see Ray's documentation "
                  "on security.", file=sys.stderr)  # fmt: skip
        opened, searches = ReplicatedShards(folders, quantizer, encoder, replicas), Workers(SEARCHES, CONNECTIONS, 60)
    else:
        opened = RQMoEShards(folders, quantizer, encoder)
    with opened:
        _serve(make_app(LiveShards(opened, folders[0].resolve().parent.name), loopback_only, searches), listening)


def _serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answers requests until the process is interrupted."""
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if listening.family == socket.AF_INET6 else address
    print(f"http://{shown}:{port} (Ctrl+C ends it)", flush=True)
    settings = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])
