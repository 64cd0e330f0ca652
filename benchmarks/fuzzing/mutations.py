"""Mutations: of bytes, of JSON, and of JSON or numbers inside of other formats, such that what is around them fits."""

import copy
import json
import random
from typing import Any

EXTREMES: list[Any] = [
    0, 1, -1, 2, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "../../etc/passwd", "/dev/zero",
    "\x00", "\ud800", "8", [], {}, [[]], [0], [1, 2, 3], [2**40] * 4, {"a": 1}, "a" * 5_000, ["a"] * 300,
]  # fmt: skip
KEYS = [
    "num_labels", "id2label", "dtype", "torch_dtype", "quantization_config", "attribute_map", "to_dict", "auto_map",
    "attn_implementation", "transformers_weights", "per_layer_config", "architectures", "model_type", "rope_scaling",
    "validate_architecture", "problem_type", "__class__", "__dict__", "name_or_path", "has_experts", "fusion_config",
    "use_return_dict", "configuration_files", "files", "format", "is_encoder_decoder", "label2id", "sub_configs",
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few random changes: flips, cuts, insertions, splices, and numbers in the place of others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        # The head and the end are where formats say how long everything is.
        place = rng.choice((rng.randrange(len(changed)), rng.randrange(min(len(changed), 200)),
                            len(changed) - 1 - rng.randrange(min(len(changed), 200))))  # fmt: skip
        kind = rng.randrange(7)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2, 16, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
            changed[place : place + width] = (number % 256**width).to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            del changed[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[place:place] = other[start : start + rng.choice((1, 4, 16, 256))]
        else:
            other = rng.choice(others)
            start, width = rng.randrange(len(other)), rng.choice((4, 16, 256))
            changed[place : place + width] = other[start : start + width]
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with a few values replaced, removed, added or moved."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return rng.choice(EXTREMES)
        holder, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(EXTREMES))
        elif kind == 2:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 3 and type(holder[key]) in (int, float):
            number = holder[key]
            holder[key] = rng.choice((number + 1, number - 1, -number, number * 2, number * 1_000, str(number)))
        else:
            holder[key] = copy.deepcopy(rng.choice(EXTREMES))
    return changed


def _places(value: Any):
    """Every dictionary or list with every key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def dump_json(value: Any, rng: random.Random) -> bytes:
    """As text; now and then nested so deeply that a parser runs out of its stack."""
    if rng.random() < 0.002:
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Either its bytes, or its header as JSON with the length put right."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, others)
    length = int.from_bytes(data[:8], "little")
    header = dump_json(mutate_json(json.loads(data[8 : 8 + length]), rng), rng)
    body = data[8 + length :]
    if rng.random() < 0.2:
        body = mutate_bytes(body, rng, others)
    return len(header).to_bytes(8, "little") + header + body
