"""Decoding with the tables of `encoding_rqmoe`, all steps in parallel where the condition is a sum of instructions.

There, everything before the first activation is linear in the codes so far: it is a sum of one looked-up row per code,
which takes a tenth of the time of the matrix products that it replaces. What is linear to the end is summed likewise.

Letters as in `encoding_rqmoe`; m is the number of codes given, a prefix of the M of the model.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from .encoding_rqmoe import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES, Tables, deform, look_up, mix

MAX_LOOKUP_BYTES = 256 << 20  # of the row tables; a model that needs more multiplies matrices instead


@dataclass
class Lookups:
    """Rows to sum."""

    features: torch.Tensor  # (sum over S of (step + 2) * K, w): for each step the codes before it, then its codeword
    linear: dict[int, torch.Tensor] = field(default_factory=dict)  # per m: (m * K, d) float32


def decode_codes(codes: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Decodes codes `(n, m)` to standardised float32 vectors `(n, d)`."""
    steps = codes.shape[1] - 1
    codes = codes.long()
    size = tables.first.shape[1]
    features = 0 if tables.features is None else tables.features.shape[-1]
    lookups = _lookups(tables) if steps and features else None
    per_vector = 4 * max(1, steps) * (3 * size + 2 * features)
    budget = CPU_CHUNK_BYTES if codes.device.type == "cpu" else DEVICE_CHUNK_BYTES
    output = torch.empty(len(codes), size, dtype=torch.float32, device=codes.device)
    with torch.autocast(codes.device.type, enabled=False):
        rows = max(1, budget // per_vector)
        for start in range(0, len(codes), rows):
            chunk = slice(start, start + rows)
            if lookups is not None:
                output[chunk] = _decode_by_lookup(codes[chunk], tables, lookups)
            else:
                output[chunk] = _decode_by_product(codes[chunk], tables)
    return output


def _lookups(tables: Tables) -> Lookups | None:
    """The row tables, made on first use; None where they do not exist or are too large."""
    if tables.instructions is None or tables.decoding is not None:
        return tables.decoding
    steps, codewords, width = tables.features.shape
    rows = codewords * sum(step + 2 for step in range(steps))
    if rows * width * tables.features.element_size() > MAX_LOOKUP_BYTES:
        return None
    size = tables.first.shape[1]
    parts = []
    for step in range(steps):
        parts += [(tables.instructions[: step + 1] @ tables.condition_proj[step, :, size:]).flatten(0, 1)]
        parts += [tables.features[step]]
    tables.decoding = Lookups(torch.cat(parts))
    return tables.decoding


def _linear(tables: Tables, lookups: Lookups, length: int) -> torch.Tensor:
    """Rows `(m * K, d)`: what each code adds to the vector without passing an activation, for codes of one length.

    A code adds its own codeword's linear part, and the offset that its instruction gives all later steps.
    """
    if length not in lookups.linear:
        linear = torch.cat([tables.first[None], tables.base[: length - 1]])
        offsets = tables.condition_proj[: length - 1, :, : linear.shape[-1]].float()
        later = offsets.flip(0).cumsum(dim=0).flip(0)  # (m - 1, c, d): the sum over a step and all after it
        linear[: length - 1] += tables.instructions[: length - 1].float() @ later
        lookups.linear[length] = linear.flatten(0, 1)
    return lookups.linear[length]


def _decode_by_lookup(codes: torch.Tensor, tables: Tables, lookups: Lookups) -> torch.Tensor:
    vectors, length = codes.shape
    codewords = len(tables.first)
    rows = codes + torch.arange(length, device=codes.device) * codewords
    output = F.embedding_bag(rows, _linear(tables, lookups, length), mode="sum")
    bags, before = [], 0
    for step in range(length - 1):
        bags.append((rows[:, : step + 2] + before).flatten())
        before += (step + 2) * codewords
    sizes = torch.arange(2, length + 1, device=codes.device).repeat_interleave(vectors)
    features = F.embedding_bag(torch.cat(bags), lookups.features, sizes.cumsum(0) - sizes, mode="sum")
    mixed = mix(tables, slice(length - 1), features.view(length - 1, vectors, -1))
    return output + mixed.sum(dim=0, dtype=output.dtype)


def _decode_by_product(codes: torch.Tensor, tables: Tables) -> torch.Tensor:
    steps = codes.shape[1] - 1
    output = tables.first[codes[:, 0]]
    if not steps:
        return output
    later = codes[:, 1:].T  # (S, n)
    if tables.features is None:
        return output + look_up(tables.base[:steps], later).sum(dim=0)
    size = output.shape[1]
    if tables.instructions is not None:
        instructions = look_up(tables.instructions[:steps], codes[:, :-1].T).cumsum(dim=0)  # (S, n, c)
        shared = instructions @ tables.condition_proj[:steps]
        deformed = deform(tables, slice(steps), later, shared).add_(shared[..., :size])
        return output + deformed.sum(dim=0)
    for step in range(steps):
        shared = output.to(tables.condition_proj.dtype)[None] @ tables.condition_proj[step]
        deformed = deform(tables, slice(step, step + 1), later[step : step + 1], shared)
        output = output + deformed[0] + shared[0, :, :size]
    return output
