"""The commands: rqmoe index build, add, search, align, merge, info and verify."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import EMBEDDINGS_HELP, Column, Quantizer, Revision, Split, TextColumn

if TYPE_CHECKING:
    from ..index import RQMoEIndex

app = typer.Typer(no_args_is_help=True, help="Search compressed embeddings and their texts. Start with `build`.")
Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]
Shards = Annotated[list[Path], typer.Argument(help="Folders of the shards, in their order.")]
Source = Annotated[
    str, typer.Argument(help=f"{EMBEDDINGS_HELP} Or texts (.txt, .jsonl, .csv, ...), or codes of `rqmoe compress`.")
]
EncoderName = Annotated[
    str | None, typer.Option("--encoder", help="sentence-transformers encoder of the texts. Default: the quantizer's.")
]
IdColumn = Annotated[str, typer.Option(help="Column that holds the ids. Without it they are counted.")]
Metadata = Annotated[list[str] | None, typer.Option("--metadata", help="Column to keep as metadata. May be repeated.")]
BatchSize = Annotated[int, typer.Option(help="Vectors that are committed together.")]
Known = Annotated[
    str, typer.Option("--duplicates", help="Of ids that the index has already: error, skip or replace.")
]


@app.command()
def build(
    folder: Folder,
    source: Source,
    model: Quantizer,
    metric: Annotated[str, typer.Option(help="cosine, inner_product or l2.")] = "cosine",
    kind: Annotated[str, typer.Option(help="flat, ivf, or auto: by size.")] = "auto",
    keep_floats: Annotated[bool, typer.Option("--keep-floats", help="Keep float16 vectors, to rank exactly.")] = False,
    num_codebooks: Annotated[int | None, typer.Option(help="Keep only the first codes of each vector.")] = None,
    encoder: EncoderName = None,
    column: Column = "embeddings",
    text_column: TextColumn = "text",
    id_column: IdColumn = "id",
    metadata: Metadata = None,
    split: Split = "train",
    batch_size: BatchSize = 16_384,
    duplicates: Known = "error",
    revision: Revision = None,
) -> None:
    """Make an index from embeddings, texts or codes. A run that was stopped continues where it was."""
    from ..bundled import load_quantizer
    from ..index import RQMoEIndex
    from ..index.storage import MANIFEST

    quantizer = load_quantizer(model, revision=revision)
    if (folder / MANIFEST).exists():
        index = RQMoEIndex.load(folder, quantizer, encoder)
        held = index.settings | {"num_codebooks": index.settings["quantizer"]["num_codebooks"]}
        asked: dict[str, Any] = {"metric": metric, "kind": kind, "keep_floats": keep_floats}
        if num_codebooks is not None:
            asked["num_codebooks"] = num_codebooks
        other = [f"{name} {held[name]}" for name, value in asked.items() if held[name] != value]
        if other:
            raise ValueError(f"{folder} holds an index with {', '.join(other)}: choose a new folder or delete it.")
    else:
        index = RQMoEIndex(
            quantizer,
            folder,
            metric=metric,  # type: ignore[arg-type]
            kind=kind,  # type: ignore[arg-type]
            encoder=encoder,
            num_codebooks=num_codebooks,
            keep_floats=keep_floats,
        )
    _fill(index, source, column, text_column, id_column, metadata, split, batch_size, duplicates)


@app.command()
def add(
    folder: Folder,
    source: Source,
    encoder: EncoderName = None,
    column: Column = "embeddings",
    text_column: TextColumn = "text",
    id_column: IdColumn = "id",
    metadata: Metadata = None,
    split: Split = "train",
    batch_size: BatchSize = 16_384,
    duplicates: Known = "error",
) -> None:
    """Add to an index. A run that was stopped continues where it was."""
    from ..index import RQMoEIndex

    index = RQMoEIndex.load(folder, encoder=encoder)
    _fill(index, source, column, text_column, id_column, metadata, split, batch_size, duplicates)


def _fill(
    index: "RQMoEIndex", source: str, column: str, text_column: str, id_column: str, metadata: list[str] | None,
    split: str, batch_size: int, duplicates: str,
) -> None:  # fmt: skip
    with index:
        read = index.add_from(source, column=column, text_column=text_column, id_column=id_column,
                              metadata_columns=metadata or [], split=split, batch_size=batch_size,
                              duplicates=duplicates)  # type: ignore[arg-type]  # fmt: skip
        index.save()
        print(f"Added {read:,} vectors; the index holds {len(index):,}.")


@app.command()
def search(
    folder: Folder,
    queries: Annotated[list[str] | None, typer.Argument(help="Questions. Without any, they are asked for.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Hits per question.")] = 5,
    filter: Annotated[str | None, typer.Option(help='Filter on metadata, as JSON: {"lang": "en"}.')] = None,
    shortlist: Annotated[int | None, typer.Option(help="Vectors that are ranked by their reconstructions.")] = None,
    encoder: EncoderName = None,
    shards: Annotated[
        list[Path] | None,
        typer.Option("--shard", help="Folder of another shard, searched as one with it. May be repeated."),
    ] = None,
) -> None:
    """Search an index, or several shards as one, with texts, once or one after the other."""
    from ..index import RQMoEIndex, RQMoEShards

    try:
        wanted = None if filter is None else json.loads(filter)
    except ValueError:
        raise ValueError(f'--filter expects JSON such as {{"lang": "en"}}, got {filter}') from None
    opened = RQMoEShards([folder, *shards], encoder=encoder) if shards else RQMoEIndex.load(folder, encoder=encoder)
    with opened as index:
        for query in queries or _asked():
            scores, ids = index.search(query, top_k, filter=wanted, shortlist=shortlist)
            found = {document.id: document for document in index.get(ids, missing_ok=True)}
            for score, document in zip(scores, map(found.get, ids.tolist()), strict=True):
                if document is None:  # a writer has removed it in between
                    continue
                notes = f"  {json.dumps(document.metadata, ensure_ascii=False)}" if document.metadata else ""
                print(f"{score:.3f}  {document.id}  {' '.join((document.text or '').split())[:160]}{notes}")
            print()


def _asked():
    """Questions that are typed in, until an empty line or the end of input."""
    while True:
        try:
            query = input("query> ")
        except EOFError:
            return
        if not query.strip():
            return
        yield query


@app.command()
def align(shards: Shards) -> None:
    """Fit the tables of scanning to all shards together, and keep them in each: they open quickly, and can be served."""
    from ..index import RQMoEShards

    with RQMoEShards(shards) as opened:
        opened.save()
        print(f"{len(shards)} shards of {len(opened):,} vectors are scored by the same tables.")


@app.command()
def merge(shards: Shards, output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")]) -> None:
    """Copy all shards into one index. Nothing is encoded anew, and the shards stay."""
    from ..index import RQMoEShards

    with RQMoEShards(shards) as opened, opened.merge(output) as merged:
        print(f"{output} holds {len(merged):,} vectors.")


@app.command()
def info(folder: Folder) -> None:
    """Show what an index holds and which quantizer made its codes."""
    from ..index.storage import describe

    for label, value in describe(folder).items():
        print(f"{label:>18}  {value}")


@app.command()
def verify(folder: Folder) -> None:
    """Check every file and every entry of an index."""
    from ..index import verify as check

    found = check(folder)
    for problem in found:
        print(problem)
    if found:
        raise typer.Exit(1)
    print(f"{folder} is whole.")
