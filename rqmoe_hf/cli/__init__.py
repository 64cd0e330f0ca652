"""The command line: one file per verb, each a thin call into the package."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .. import __version__
from .compress import compress, decompress
from .convert import convert
from .demo import demo
from .embed import embed
from .evaluate import evaluate
from .index import app as index
from .info import info
from .push import push
from .serve import serve
from .train import train

USED = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "numba", "datasets")  # named with the version
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (demo, embed, train, compress, decompress, evaluate, push, serve, info, convert):
    app.command()(command)
app.add_typer(index, name="index")


def _show_version(wanted: bool) -> None:
    """Prints what a report of an error should name, and ends the command."""
    if wanted:
        print(f"rqmoe_hf {__version__}, Python {sys.version.split()[0]}")
        for name in USED:
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} is not installed")
        raise typer.Exit()


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions, also of libraries.")
    ] = False,
) -> None:
    """Compress sentence embeddings to 8 to 64 bytes each. Start with `rqmoe demo`."""


def main() -> None:
    """Runs the command line. What the user can mend is a message and exit code 1, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"rqmoe: {error}", file=sys.stderr)
        sys.exit(1)
