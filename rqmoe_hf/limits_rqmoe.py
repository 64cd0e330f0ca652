"""What a checkpoint may ask for: far above what any quantizer needs, far below what would bring a machine down.

A config.json and the header of a weight file come from strangers. A few bytes of theirs could ask for terabytes, or
steer transformers away from reading weights, so both are checked before anything is allocated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from math import isqrt
from typing import Any

import torch
from safetensors import safe_open

LARGEST = {
    "hidden_size": 65_536,
    "instruction_size": 65_536,
    "num_codebooks": 4_096,
    "num_experts": 4_096,
    "num_expert_layers": 4_096,
    "intermediate_size": 1_048_576,
    "num_candidates": 65_536,
    "beam_size": 4_096,
    "local_search": 10_000,
}
MAX_NUMBERS = 1 << 32  # of weights, or of one kind of table made from them: 17 GB in float32
MAX_PAIRS = 1 << 30  # entries of a table of pairs of local search: 2 GiB
LARGEST_WEIGHT = 1e15
MAX_LABELS = 1_000  # transformers makes a dictionary of them; a quantizer has none
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
CONFIG_TYPES = ("float64", "float32", "float16", "bfloat16")
# What else transformers reads from a config: code of kernels, other files, other arithmetic.
STEERING = frozenset((
    "quantization_config", "compression_config", "fusion_config", "distributed_config", "per_layer_config",
    "transformers_weights", "attn_implementation", "experts_implementation", "tp_plan", "device_map", "gguf_file",
    "adapter_kwargs",
))  # fmt: skip


def count_weights(config: Any) -> int:
    """How many numbers a model of this configuration has, computed without making one."""
    steps, codewords, size = config.num_codebooks, config.codebook_size, config.hidden_size
    total = steps * codewords * size + size + 1  # codebooks, mean, scale
    if not config.has_experts:
        return total
    condition, width, experts = config.condition_size, config.intermediate_size, config.num_experts
    gates = {"none": 0, "linear": experts * (size + 1), "mlp": width * (size + experts)}
    step = size * (size + condition + 2) + gates[config.gate]
    step += 2 * config.num_expert_layers * experts * width * size
    if config.conditioning == "instruction":
        step += codewords * condition
    return total + (steps - 1) * step


def count_features(config: Any) -> int:
    """How many numbers the largest table of the encoder has at most: what experts make of all codewords."""
    if not config.has_experts:
        return 0
    features = config.num_expert_layers * config.num_experts * config.intermediate_size
    return (config.num_codebooks - 1) * config.codebook_size * (features + config.intermediate_size)


def check_sizes(config: Any) -> None:
    """Raises ValueError if a configuration asks for more than any quantizer needs."""
    for name, largest in LARGEST.items():
        value = getattr(config, name)
        if value is not None and value > largest:
            raise ValueError(f"{name} must be at most {largest:,}, got {_shown(value)}.")
    for what, count in (("weights", count_weights(config)), ("numbers in tables", count_features(config))):
        if count > MAX_NUMBERS:
            raise ValueError(
                f"This configuration asks for {count:,} {what}; at most {MAX_NUMBERS:,} are allowed: choose a smaller "
                "hidden_size, num_codebooks, codebook_size, num_experts or intermediate_size."
            )
    if config.local_search:
        sizes = iter(config.codebook_sizes or [config.codebook_size] * config.num_codebooks)
        blocks = [list(islice(sizes, count)) for count in config.search_blocks or [config.num_codebooks]]
        check_pairs([block for block in blocks if len(block) > 1])  # a single code is not searched for


def check_pairs(blocks: Iterable[Sequence[int]]) -> None:
    """Raises ValueError if local search's tables of pairs of codewords, one for each block, would be too large.

    Args:
        blocks: Codebook sizes of each block.
    """
    counts = [sum(sizes) for sizes in blocks]
    pairs = [count**2 for count in counts]
    if max(pairs, default=0) > MAX_PAIRS or sum(pairs) > MAX_NUMBERS:
        raise ValueError(
            f"Local search keeps a table of all pairs of a block's codewords: at most {MAX_PAIRS:,} of a block "
            f"({isqrt(MAX_PAIRS):,} codewords) and {MAX_NUMBERS:,} of all blocks are allowed, got {_shown(counts)} "
            "codewords in the blocks. Set local_search=0, or choose smaller codebooks or search_blocks."
        )


def check_codebooks(config: Any) -> None:
    """Raises ValueError unless sizes and blocks of the codebooks, where they are given, fit their number."""
    sizes, blocks, count = config.codebook_sizes, config.search_blocks, config.num_codebooks
    if sizes is not None and (len(sizes) != count or max(sizes) != config.codebook_size or min(sizes) < 2):
        raise ValueError(
            f"codebook_sizes must name {count} sizes (num_codebooks), from 2 to {config.codebook_size} "
            f"(codebook_size, the largest of them), got {sizes}."
        )
    if blocks is None:
        return
    if min(blocks, default=0) < 1 or sum(blocks) != count:
        raise ValueError(
            f"search_blocks must be numbers of codebooks, from 1, and {count} together (num_codebooks), got {blocks}."
        )
    if config.num_experts:
        raise ValueError(f"search_blocks are for additive quantizers: set num_experts=0, got {config.num_experts}.")


def check_entries(entries: dict[str, Any], config_class: Any) -> None:
    """Raises ValueError if the entries of a config.json reach for anything but the description of a quantizer."""
    kind = config_class.model_type
    if entries.get("model_type", kind) != kind:
        raise ValueError(f"The config.json describes a model of the type {_shown(entries['model_type'])}, not {kind}.")
    known = {field.name for field in fields(config_class)}
    known |= {"model_type", "num_labels", "name_or_path", "output_attentions"}
    for name in entries:
        # An attribute of the class would be shadowed: its methods, or the map that redirects attributes.
        if name.removeprefix("_") in STEERING or (name not in known and hasattr(config_class, name)):
            raise ValueError(f"A quantizer's config.json must not set {name!r}: remove it.")


def check_common(values: dict[str, Any]) -> None:
    """Raises ValueError if values that transformers expands before any validation are out of bounds."""
    labels = values.get("num_labels")
    if labels is not None and not (type(labels) is int and 0 <= labels <= MAX_LABELS):
        raise ValueError(f"num_labels must be an integer from 0 to {MAX_LABELS:,}, got {_shown(labels)}.")
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in CONFIG_TYPES:
            raise ValueError(f"{name} must be one of {', '.join(CONFIG_TYPES)}, got {_shown(dtype)}.")


def check_weight_files(files: Iterable[str], expected: dict[str, list[tuple[int, ...]]], origin: str) -> None:
    """Compares the headers of weight files with the weights that a model has, before any of them is allocated.

    Args:
        files: Of the checkpoint.
        expected: Of each of the model's weights the shapes that it may have in a file.
        origin: Where the files come from, for messages.

    Raises:
        ValueError: If a file is no safetensors file, or holds other weights.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"The weights of {origin} are no safetensors file: {file} is not read. Convert it.")
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name.removeprefix("quantizer.")] = (tuple(part.get_shape()), part.get_dtype())
    wrong = {
        "missing keys": [name for name in expected if name not in found],
        "unexpected keys": [name for name in found if name not in expected],
        "mismatched keys": [
            f"{name} has the shape {found[name][0]} instead of {shapes[0]}"
            for name, shapes in expected.items()
            if name in found and found[name][0] not in shapes
        ],
        "no floats": [f"{name} ({dtype})" for name, (_, dtype) in found.items() if dtype not in WEIGHT_TYPES],
    }
    problems = [f"{kind}: {', '.join(_shown(name) for name in names[:5])}" for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(f"The weights of {origin} do not belong to its config.json: {'; '.join(problems)}.")


def check_finite(weights: dict[str, torch.Tensor], origin: str) -> None:
    """Raises ValueError if weights hold NaN, infinity, or numbers whose squares distances cannot hold.

    The nearest codeword would be none of the codebook.
    """
    held = {name: tensor for name, tensor in weights.items() if not tensor.is_meta}
    broken = [name for name, tensor in held.items() if not (tensor.abs() < LARGEST_WEIGHT).all()]  # NaN fails it, too
    if broken:
        raise ValueError(
            f"The weights of {origin} hold NaN, infinity or numbers above {LARGEST_WEIGHT:g}: "
            f"{', '.join(broken[:5])}. Save them again."
        )


def _shown(value: Any) -> str:
    """A value for a message, cut to a readable length."""
    text = f"{value:,}" if type(value) is int and abs(value) < 10**18 else str(value)[:200]
    return text if len(text) < 200 else f"{text}..."
