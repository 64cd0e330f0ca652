"""The command: rqmoe info."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Revision


def info(
    name: Annotated[
        str | None,
        typer.Argument(help="Quantizer, or codes of `rqmoe compress`. Default: list the bundled quantizers."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Show what a quantizer is, or which quantizer made some codes."""
    from ..bundled import bundled_quantizers, load_quantizer, quantizer_source
    from ..codes import describe_sizes
    from ..record import record_of

    if name is None:
        for bundled, folder in bundled_quantizers().items():
            print(f"{bundled}\t{folder}")
        return
    path = Path(name)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("part-*.parquet"))):
        from ..data import codes_info

        rows = codes_info(name)
    else:
        model = load_quantizer(name, revision=revision)
        config = model.config
        rows = {
            "base encoder": config.base_model,
            "dimension": config.hidden_size,
            "codes": f"{describe_sizes(config.num_codebooks, config.code_sizes)}, {config.bits_per_vector} bits",
            **(
                {"searched": f"in blocks of {', '.join(map(str, config.search_blocks))} codes"}
                if config.search_blocks
                else {}
            ),
            "bytes per vector": f"{config.bytes_per_vector} (float32: {4 * config.hidden_size})",
            "experts": f"{config.num_experts} x {config.num_expert_layers} layers" if config.has_experts else "none",
            "conditioning": config.conditioning if config.has_experts else "none",
            "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
            "default search": f"{config.num_candidates} candidates, beam {config.beam_size}, "
            f"{config.local_search} rounds of local search",
            "initialised": model.is_initialized,
        }
        record = record_of(model, quantizer_source(name), revision)
        if record is not None:
            whole = record.whole
            rows["MSE"] = f"{whole['mse']:.4g} (storing the mean only: {record.variance:.4g})"
            rows["recall@10"] = f"{whole['recall_10_at_10']:.3f} among {record.num_vectors:,} vectors"
            rows["speed"] = (
                f"{record.speed['encode_per_second']:,} encoded, {record.speed['decode_per_second']:,} decoded per "
                f"second ({record.environment['torch_threads']} threads, {record.environment['processor']})"
            )
    for label, value in rows.items():
        print(f"{label:>18}  {value}")
