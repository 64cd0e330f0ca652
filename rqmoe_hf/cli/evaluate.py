"""The command: rqmoe evaluate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    EMBEDDINGS_HELP,
    TEXTS_HELP,
    BeamSize,
    Column,
    DType,
    LocalSearch,
    NumCandidates,
    Quantizer,
    Revision,
    Split,
    TextColumn,
)


def evaluate(
    model: Quantizer,
    source: Annotated[str | None, typer.Argument(metavar="[EMBEDDINGS]", help=EMBEDDINGS_HELP)] = None,
    embeddings: Annotated[str | None, typer.Option(help="The same as an option.")] = None,
    texts: Annotated[str | None, typer.Option(help=TEXTS_HELP)] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of the texts. Default: the quantizer's.")] = None,
    queries: Annotated[
        str | None, typer.Option(help="Queries. Default: a tenth of the embeddings, at most 1,000.")
    ] = None,
    column: Column = "embeddings",
    text_column: TextColumn = "text",
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(help="Use at most so many. [default: 100000, of texts 5000]")] = None,
    prefixes: Annotated[bool, typer.Option(help="Report every prefix of the codes, not only the whole.")] = False,
    num_candidates: NumCandidates = None,
    beam_size: BeamSize = None,
    local_search: LocalSearch = None,
    dtype: DType = "float32",
    revision: Revision = None,
    save: Annotated[bool, typer.Option(help="Make this the evaluation beside the quantizer, for its card.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Measure a quantizer on texts or embeddings it was not trained on, and compare with its card.

    Error, recall and use of the codes; then whether to trust the quantizer with such texts, to fine-tune it, or to
    train another one.
    """
    from ..bundled import load_quantizer, quantizer_source
    from ..data.sources import load_embeddings, sample_array
    from ..evaluation import evaluate as measure
    from ..record import record_of

    if sum(given is not None for given in (source, embeddings, texts)) != 1:
        raise ValueError("Give embeddings, or --texts, to measure on.")
    if save:
        _check_save(queries=queries, prefixes=prefixes or None, num_candidates=num_candidates, beam_size=beam_size,
                    local_search=local_search, json=output)  # fmt: skip
    quantizer = load_quantizer(model, dtype, revision)
    if texts is not None:
        vectors = _embed_sample(texts, encoder or quantizer.config.base_model, text_column, split, limit or 5_000)
    else:
        vectors = sample_array(load_embeddings(source or embeddings, column, split), limit or 100_000, seed=0)  # type: ignore[arg-type]
    if save:
        return _save(quantizer, vectors, model, texts or source or embeddings)
    asked = None if queries is None else sample_array(load_embeddings(queries, column, split), 100_000, seed=0)
    steps = list(range(1, quantizer.config.num_codebooks + 1)) if prefixes else None
    reports = measure(quantizer, vectors, asked, steps, num_candidates, beam_size, local_search)
    print(f"{len(vectors):,} embeddings of {vectors.shape[1]} dimensions, quantizer {model}")
    print("bytes     MSE  cosine    R@1   R@10  recall@10  entropy (bits)")
    for report in reports:
        entropy = sum(report.code_entropy) / report.num_codebooks
        print(
            f"{report.bytes_per_vector:5d}  {report.mse:.4g}  {report.cosine:.4f}  {report.recall_at_1_1:.3f}  "
            f"{report.recall_at_1_10:.3f}      {report.recall_10_at_10:.3f}  {entropy:.2f}"
        )
    fit = _compare(quantizer, vectors, record_of(quantizer, quantizer_source(model), revision), model)
    if output is not None:
        rows = [report.as_dict() for report in reports]
        output.write_text(json.dumps({"reports": rows, "fit": fit}, indent=1) + "\n", "utf-8")


def _compare(quantizer, vectors, record, model: str) -> dict | None:
    """Prints the sample beside the card; the figures as a dictionary."""
    from ..fit import MIN_VECTORS, VERDICTS, check_fit

    if record is None or len(vectors) < MIN_VECTORS:
        lack = f"{model} carries no evaluation of these weights" if record is None else f"fewer than {MIN_VECTORS} vectors"
        print(f"\nNo comparison with the card: {lack}.")
        return None
    fit = check_fit(quantizer, vectors, record)
    print("\n             yours   card")
    for label, figures in (("MSE", fit.mse), ("recall@10", fit.recall_10_at_10), ("mean norm", fit.mean_norm),
                           ("entropy", fit.code_entropy)):  # fmt: skip
        print(f"{label:<10}  {figures[0]:6.3f} {figures[1]:6.3f}")
    for reason in fit.reasons:
        print(f"- {reason}")
    print(f"Verdict: {VERDICTS[fit.verdict].replace('MODEL', model)}.")
    return fit.as_dict()


def _embed_sample(texts: str, encoder: str | None, text_column: str, split: str, limit: int):
    """Embeddings of a random sample of texts."""
    import numpy as np

    from ..data.batches import encode_batches, load_encoder
    from ..data.sources import load_table

    if encoder is None:
        raise ValueError("The quantizer does not record its encoder: name it with --encoder.")
    table = load_table(texts, split)
    if text_column not in table.column_names:
        raise ValueError(f"There is no column {text_column!r}; the columns are {', '.join(table.column_names)}.")
    rows = np.sort(np.random.default_rng(0).permutation(len(table))[:limit])
    return encode_batches(load_encoder(encoder), table.select(rows)[text_column][:], 64, show_progress_bar=True)


def _check_save(**options) -> None:
    """Raises ValueError if an option is given that the evaluation beside a quantizer leaves no choice of."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: not with --save, which measures every prefix by the quantizer's own search, with a "
            "tenth of the embeddings as queries. Run the command once with --save and once without."
        )


def _save(quantizer, vectors, model: str, source) -> None:
    """Replaces the evaluation and the card beside a quantizer in a folder."""
    from ..hub import write_card
    from ..record import RECORD_FILE, measure
    from ..saving import write_text

    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--save writes beside a quantizer in a folder, but {model} is none.")
    record = measure(quantizer, vectors)
    write_text(folder / RECORD_FILE, record.to_json())
    card = "and the card" if write_card(folder) else "; the card was edited by hand and stays"
    print(f"Wrote {folder / RECORD_FILE} {card}: MSE {record.whole['mse']:.4g} on {len(vectors):,} of {source}.")
