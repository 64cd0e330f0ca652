"""The commands: rqmoe compress and rqmoe decompress."""

from typing import Annotated

import typer

from .options import (
    EMBEDDINGS_HELP,
    BeamSize,
    Column,
    CpusPerWorker,
    DType,
    Engine,
    GpusPerWorker,
    LocalSearch,
    NumCandidates,
    NumCodebooks,
    Output,
    Quantizer,
    RayAddress,
    Revision,
    Split,
    Workers,
    choose_engine,
    report,
)


def compress(
    embeddings: Annotated[str, typer.Argument(help=EMBEDDINGS_HELP)],
    output: Output,
    model: Quantizer,
    column: Column = "embeddings",
    split: Split = "train",
    num_codebooks: NumCodebooks = None,
    num_candidates: NumCandidates = None,
    beam_size: BeamSize = None,
    local_search: LocalSearch = None,
    dtype: DType = "float32",
    shard_size: Annotated[int, typer.Option(help="Vectors per output file.")] = 65_536,
    revision: Revision = None,
    engine: Engine = "local",
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
) -> None:
    """Compress embeddings to codes, as parquet shards. A run that was stopped continues where it was."""
    from ..bundled import load_quantizer
    from ..data import compress_shards

    ray = choose_engine(engine, workers, cpus_per_worker, gpus_per_worker, ray_address)
    quantizer = load_quantizer(model, dtype, revision)
    search = (num_codebooks, num_candidates, beam_size, local_search)
    report(compress_shards(embeddings, output, quantizer, column, split, *search, shard_size, ray), output, ray)


def decompress(
    codes: Annotated[str, typer.Argument(help="File or folder of `rqmoe compress`.")],
    output: Output,
    model: Quantizer,
    dtype: DType = "float32",
    revision: Revision = None,
) -> None:
    """Restore embeddings from codes, as parquet shards. A run that was stopped continues where it was."""
    from ..bundled import load_quantizer
    from ..data import decompress_shards

    files = decompress_shards(codes, output, load_quantizer(model, dtype, revision))
    print(f"Wrote {len(files)} files to {output}.")
