"""The command line: one file per verb, each a thin call into the package."""

import sys

import typer

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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress sentence embeddings to 8 to 64 bytes each. Start with `rqmoe demo`.",
)
for command in (demo, embed, train, compress, decompress, evaluate, push, serve, info, convert):
    app.command()(command)
app.add_typer(index, name="index")


def main() -> None:
    """Runs the command line. What the user can mend is a message and exit code 1, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"rqmoe: {error}", file=sys.stderr)
        sys.exit(1)
