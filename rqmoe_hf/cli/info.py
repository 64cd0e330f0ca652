"""The command: rqmoe info."""

from pathlib import Path
from typing import Annotated

import typer


def info(
    name: Annotated[
        str | None,
        typer.Argument(help="Quantizer, or codes of `rqmoe compress`. Default: list the bundled quantizers."),
    ] = None,
) -> None:
    """Show what a quantizer is, or which quantizer made some codes."""
    from ..bundled import bundled_quantizers, load_quantizer

    if name is None:
        for bundled, folder in bundled_quantizers().items():
            print(f"{bundled}\t{folder}")
        return
    path = Path(name)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("part-*.parquet"))):
        from ..data import codes_info

        rows = codes_info(name)
    else:
        model = load_quantizer(name)
        config = model.config
        rows = {
            "base encoder": config.base_model,
            "dimension": config.hidden_size,
            "codes": f"{config.num_codebooks} x {config.bits_per_code} bits ({config.codebook_size} codewords)",
            "bytes per vector": f"{config.bytes_per_vector} (float32: {4 * config.hidden_size})",
            "experts": f"{config.num_experts} x {config.num_expert_layers} layers" if config.has_experts else "none",
            "conditioning": config.conditioning if config.has_experts else "none",
            "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
            "default search": f"{config.num_candidates} candidates, beam {config.beam_size}",
            "initialised": model.is_initialized,
        }
    for label, value in rows.items():
        print(f"{label:>18}  {value}")
