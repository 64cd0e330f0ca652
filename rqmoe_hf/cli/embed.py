"""The command: rqmoe embed."""

from typing import Annotated

import typer

from .options import TEXTS_HELP, DType, Output, Split, TextColumn


def embed(
    texts: Annotated[str, typer.Argument(help=TEXTS_HELP)],
    output: Output,
    encoder: Annotated[str, typer.Option(help="sentence-transformers encoder: Hub id or folder.")],
    text_column: TextColumn = "text",
    split: Split = "train",
    dtype: DType = "float32",
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    shard_size: Annotated[int, typer.Option(help="Texts per output file.")] = 16_384,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the best there is.")] = None,
) -> None:
    """Turn texts into embeddings, as parquet shards. A run that was stopped continues where it was."""
    from ..data import embed_texts

    files = embed_texts(texts, output, encoder, text_column, split, dtype, batch_size, shard_size, device)
    print(f"Wrote {len(files)} files to {output}.")
