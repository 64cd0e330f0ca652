"""The command: rqmoe serve."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of the index.")],
    encoder: Annotated[
        str | None, typer.Option(help="sentence-transformers encoder of the queries. Default: the index's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Quantizer. Default: the one that the index names.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this computer's own lets others search, unasked.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes one that is free.", min=0, max=65535)] = 8000,
    exact_up_to: Annotated[
        int, typer.Option(help="Vectors up to which searches are compared with exact ones.", min=0)
    ] = 100_000,
    shards: Annotated[
        list[Path] | None,
        typer.Option("--shard", help="Folder of another shard, searched as one with it. May be repeated."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="What searches: local, this process; or ray, replicas of each shard that Ray Serve keeps."),
    ] = "local",
    replicas: Annotated[int, typer.Option(help="Replicas of each shard, for --engine ray.", min=1)] = 2,
) -> None:
    """Look at an index in the browser: hits, memory, and recall as shortlist and bytes change."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be one of local, ray, got {engine!r}.")
    try:
        from ..serve.server import run
    except ImportError as error:
        raise ValueError("The page's web server is not installed: pip install 'rqmoe-hf[serve]'.") from error
    if engine == "ray":
        try:
            from ..serve.replicas import ReplicatedShards  # noqa: F401
        except ImportError as error:
            raise ValueError('Ray Serve is not installed: pip install "rqmoe-hf[ray]".') from error
    run(folder, model, encoder, host, port, exact_up_to, shards or [], replicas if engine == "ray" else 0)
