"""The command: rqmoe evaluate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import EMBEDDINGS_HELP, BeamSize, Column, DType, NumCandidates, Quantizer, Revision, Split


def evaluate(
    embeddings: Annotated[str, typer.Argument(help=EMBEDDINGS_HELP)],
    model: Quantizer,
    queries: Annotated[
        str | None, typer.Option(help="Queries. Default: a tenth of the embeddings, at most 1,000.")
    ] = None,
    column: Column = "embeddings",
    split: Split = "train",
    limit: Annotated[int, typer.Option(help="Use at most this many embeddings.")] = 100_000,
    prefixes: Annotated[bool, typer.Option(help="Report every prefix of the codes, not only the whole.")] = False,
    num_candidates: NumCandidates = None,
    beam_size: BeamSize = None,
    dtype: DType = "float32",
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Measure a quantizer on embeddings it was not trained on: error, recall, use of the codes."""
    from ..bundled import load_quantizer
    from ..data import load_embeddings
    from ..data.sources import sample_array
    from ..evaluation import evaluate as measure

    quantizer = load_quantizer(model, dtype, revision)
    vectors = sample_array(load_embeddings(embeddings, column, split), limit, seed=0)
    asked = None if queries is None else sample_array(load_embeddings(queries, column, split), limit, seed=0)
    steps = list(range(1, quantizer.config.num_codebooks + 1)) if prefixes else None
    reports = measure(quantizer, vectors, asked, steps, num_candidates, beam_size)
    print(f"{len(vectors):,} embeddings of {vectors.shape[1]} dimensions, quantizer {model}")
    print("bytes     MSE  cosine    R@1   R@10  recall@10  entropy (bits)")
    for report in reports:
        entropy = sum(report.code_entropy) / report.num_codebooks
        print(
            f"{report.bytes_per_vector:5d}  {report.mse:.4g}  {report.cosine:.4f}  {report.recall_at_1_1:.3f}  "
            f"{report.recall_at_1_10:.3f}      {report.recall_10_at_10:.3f}  {entropy:.2f}"
        )
    if output is not None:
        output.write_text(json.dumps([report.as_dict() for report in reports], indent=1) + "\n", "utf-8")
