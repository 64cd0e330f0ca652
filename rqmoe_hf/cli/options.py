"""Options that several verbs share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..data.ray_engine import RayEngine

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
Engine = Annotated[str, typer.Option(help="What does the work: local (this process), or ray (workers of Ray Data).")]
Workers = Annotated[
    int | None, typer.Option(help="With ray: worker processes. Default: as many as there are CPUs for.")
]
CpusPerWorker = Annotated[int | None, typer.Option(help="With ray: CPUs, and threads, of each worker. Default: 1.")]
GpusPerWorker = Annotated[float | None, typer.Option(help="With ray: GPUs of each. Default: 1 if there are any.")]
RayAddress = Annotated[str | None, typer.Option(help="With ray: a running cluster. Default: starts one here.")]
EMBEDDINGS_HELP = "Embeddings: .parquet, .arrow, .npy, .fvecs or .bvecs file, folder or URL of parquet, or Hub id."
TEXTS_HELP = "Texts: .txt (one per line), .parquet, .jsonl or .csv file, folder or URL of parquet, or Hub id."


def choose_engine(
    name: str, workers: int | None, cpus_per_worker: int | None, gpus_per_worker: float | None, address: str | None
) -> "RayEngine | None":
    """The engine that the options name: None is this process."""
    if name == "ray":
        from ..data.ray_engine import RayEngine

        return RayEngine(workers, 1 if cpus_per_worker is None else cpus_per_worker, gpus_per_worker, address)
    if name != "local":
        raise ValueError(f"--engine must be local or ray, got {name!r}.")
    options = {"workers": workers, "cpus-per-worker": cpus_per_worker, "gpus-per-worker": gpus_per_worker,
               "ray-address": address}  # fmt: skip
    given = [f"--{option}" for option, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only with --engine ray.")
    return None


def report(files: list[Path], output: Path, engine: "RayEngine | None") -> None:
    """Says what was written, and what memory it took."""
    print(f"Wrote {len(files)} files to {output}.")
    if engine is not None and engine.peak_memory:
        peaks = ", ".join(f"{memory / 1e6:,.0f} MB" for memory in engine.peak_memory.values())
        print(f"Peak memory of the workers: {peaks}.")
