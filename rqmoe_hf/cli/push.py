"""The command: rqmoe push."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    source: Annotated[str, typer.Argument(help="Quantizer (folder, bundled name), or codes of `rqmoe compress`.")],
    repo_id: Annotated[str, typer.Argument(help="Where to, such as org/name. Created if it does not exist.")],
    model: Annotated[str | None, typer.Option(help="Of codes: the quantizer that made them.")] = None,
    config_name: Annotated[str | None, typer.Option(help="Of codes: configuration. Default: one per rate.")] = None,
    include_code: Annotated[bool, typer.Option(help="Add the code, for users without this package.")] = False,
    replace_card: Annotated[bool, typer.Option(help="Generate the card also in place of an edited one.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Licence in the card. Default: apache-2.0 of what was trained here, none of what was not."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
) -> None:
    """Share a quantizer, or codes as a data set, on the Hub. Log in first with `hf auth login`."""
    from ..bundled import load_quantizer
    from ..hub import push_codes_to_hub, push_quantizer

    if any(Path(source).glob("part-*.parquet")):
        if model is None:
            raise ValueError("These are codes: name the quantizer that made them with --model.")
        done = push_codes_to_hub(
            source,
            repo_id,
            load_quantizer(model),
            config_name=config_name,
            private=private or None,
            revision=revision,
            commit_message=message,
        )
    else:
        done = push_quantizer(
            load_quantizer(source),
            repo_id,
            include_code=include_code,
            replace_card=replace_card,
            license=license,
            private=private or None,
            revision=revision,
            commit_message=message,
        )
    print(f"Pushed: {done.commit_url}")
