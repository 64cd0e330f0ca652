"""The command: rqmoe embed."""

from typing import Annotated

import typer

from .options import (
    TEXTS_HELP,
    CpusPerWorker,
    DType,
    Engine,
    GpusPerWorker,
    Output,
    RayAddress,
    Split,
    TextColumn,
    Workers,
    choose_engine,
    report,
)


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
    compress: Annotated[
        str | None, typer.Option(help="Quantizer (bundled name, folder, or Hub id): write its codes, not embeddings.")
    ] = None,
    engine: Engine = "local",
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
) -> None:
    """Turn texts into embeddings (or into their codes), as parquet shards. A run that was stopped continues where it was."""
    from ..bundled import load_quantizer
    from ..data import embed_texts

    ray = choose_engine(engine, workers, cpus_per_worker, gpus_per_worker, ray_address)
    quantizer = None if compress is None else load_quantizer(compress)
    options = (text_column, split, dtype, batch_size, shard_size, device, quantizer, ray)
    report(embed_texts(texts, output, encoder, *options), output, ray)
