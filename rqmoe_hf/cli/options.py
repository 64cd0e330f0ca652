"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Quantizer = Annotated[str, typer.Option("--model", help="Quantizer: bundled name, folder, or Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a quantizer on the Hub.")]
DType = Annotated[str, typer.Option(help="Arithmetic: float32, or bfloat16 (faster where the processor has it).")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to. Repeating a command resumes it.")]
Column = Annotated[str, typer.Option(help="Column that holds the embeddings.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the texts.")]
Split = Annotated[str, typer.Option(help="Split of a Hub data set.")]
NumCodebooks = Annotated[
    int | None, typer.Option(help="Keep only the first codes of each vector: fewer bytes. Default: all.")
]
NumCandidates = Annotated[
    int | None, typer.Option(help="Codewords evaluated exactly per step. More is slower and slightly better.")
]
BeamSize = Annotated[int | None, typer.Option(help="Partial codes kept. More is slower and better.")]
LocalSearch = Annotated[
    int | None, typer.Option(help="Rounds that improve the codes afterwards. More is slower and better.")
]
EMBEDDINGS_HELP = "Embeddings: .parquet, .arrow, .npy, .fvecs or .bvecs file, folder of parquet, or Hub id."
TEXTS_HELP = "Texts: .txt (one per line), .parquet, .jsonl or .csv file, folder of parquet, or Hub id."
