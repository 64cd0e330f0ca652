"""The command: rqmoe demo."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions to Python's documentation.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="sentence-transformers encoder. Default: the MiniLM of the demo extra.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Quantizer. Default: the bundled one that fits.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train a quantizer on the spot instead (minutes).")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of that training.")] = Path("runs/demo"),
) -> None:
    """Embed, compress and search the documentation of your own Python: no download, no data of yours."""
    from ..demo import run_demo

    print("Collecting and embedding the documentation of Python's standard library (cached after the first time).")
    result = run_demo(questions or [], encoder, model, train, output)
    for answer in result.answers:
        print(f"\n{answer.question}?")
        print(f"  {'over the codes':<48}uncompressed")
        for compressed, exact in zip(answer.compressed, answer.exact, strict=True):
            print(f"  {_hit(result.names, *compressed):<48}{_hit(result.names, *exact)}")
    report, seconds, count = result.report, result.seconds, len(result.texts)
    print(f"\n{count:,} passages: {result.float_bytes / 1e6:.1f} MB as float32, {result.compressed_bytes / 1e6:.2f} MB "
          f"as codes of {report.bytes_per_vector} bytes ({result.float_bytes / result.compressed_bytes:.0f}x smaller)")  # fmt: skip
    print(f"against exact search: recall@10 {report.recall_10_at_10:.3f}, nearest neighbour first "
          f"{report.recall_at_1_1:.3f}, among the first ten {report.recall_at_1_10:.3f}; cosine {report.cosine:.3f}")  # fmt: skip
    print(f"embedded in {seconds['embed']:.1f} s, compressed in {seconds['compress']:.2f} s "
          f"({count / seconds['compress']:,.0f}/s), decompressed in {seconds['decompress']:.2f} s "
          f"({count / seconds['decompress']:,.0f}/s)")  # fmt: skip


def _hit(names: list[str], passage: int, score: float) -> str:
    return f"{score:.3f}  {names[passage][:40]}"
