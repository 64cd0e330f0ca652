"""The command: rqmoe convert."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """Foreign formats."""

    official = "official"
    qinco = "qinco"
    faiss = "faiss"


def convert(
    file: Annotated[Path, typer.Argument(help="The foreign file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for config.json and model.safetensors.")],
    format: Annotated[
        Format,
        typer.Option(help="official: RQ-MoE's model.pt or checkpoint.pt; qinco: QINCo v1; faiss: an index file."),
    ],
    scale: Annotated[
        float | None,
        typer.Option(help="What the training embeddings were divided by (official only: its files lack it)."),
    ] = None,
) -> None:
    """Convert a quantizer of another project. Pickled files are read without running anything in them."""
    from ..convert import convert_faiss, convert_official, convert_qinco
    from ..saving import save_whole

    if (format == Format.official) != (scale is not None):
        raise ValueError(
            "--scale belongs to --format official and is needed there: the files of the official code do not hold "
            "what the embeddings were divided by, the largest value of its training set (1 if they were not scaled)."
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty: choose a new one.")
    converters = {Format.faiss: convert_faiss, Format.qinco: convert_qinco}
    model = converters[format](file) if scale is None else convert_official(file, scale)
    save_whole(model, output)
    config = model.config
    print(f"Wrote {output}: {config.num_codebooks} codebooks of {config.codebook_size} x {config.hidden_size}.")
