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
) -> None:
    """Look at an index in the browser: hits, memory, and recall as shortlist and bytes change."""
    try:
        from ..serve.server import run
    except ImportError as error:
        raise ValueError("The page's web server is not installed: pip install 'rqmoe-hf[serve]'.") from error
    run(folder, model, encoder, host, port, exact_up_to)
