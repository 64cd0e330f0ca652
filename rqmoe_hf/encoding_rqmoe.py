"""The engine: tables that depend on the weights only, and encoding with them. Pure functions over tensors.

Every function of a codeword alone is computed once per weight version and looked up: its share of the first expert
layer and of the gate. The share of the condition is computed once per partial code and is common to all of its
candidates. What is left per candidate is one addition, the activation and the last expert layer.

Shapes use n vectors, b partial codes per vector (the beam), K codewords, d hidden_size, c condition_size,
S = M - 1 steps with experts, N experts, H intermediate_size, L expert layers, of which the first F are evaluated from
looked-up features: all L where the products of later with earlier layers are small ("folded"), else one. The features
have the width w = F * N * H + gate width (+ d where F < L).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 32 << 20, 1 << 30  # temporary tensors of one chunk
TABLE_ROWS = 16384  # codewords evaluated at a time when tables are built
# A choice between two codes whose squared distances differ by less than this share of the vector's squared norm is
# made again in float64: rounding in float32 depends on the batch, and must not decide.
TIE_TOLERANCE = 4e-6
FAR = 1e4  # entries of what fills up smaller codebooks, in standard deviations: no search chooses that


@dataclass
class Tables:
    """Everything the engine needs; see the module docstring for the letters."""

    first: torch.Tensor  # (K, d) float32, the plain codebook of the first step
    base: torch.Tensor  # (S, K, d) float32, the part of a deformed codeword that is linear in the codeword
    proxy: torch.Tensor  # (S, d, K) float32: -2 times the proxy codewords (see `_fill_proxy`), ready for distances
    proxy_norms: torch.Tensor  # (S, K) float32, the squared norms of the proxy codewords
    instructions: torch.Tensor | None  # (S, K, c); None if the condition is the reconstruction
    features: torch.Tensor | None  # (S, K, w), the codeword's share of [F layers | gate | hidden]; None: additive
    condition_proj: torch.Tensor | None  # (S, c, d + w): condition to [offset | its share of the features]
    gate_proj: torch.Tensor | None  # (S, H, N), second layer of an MLP gate
    inner_up: torch.Tensor | None  # (S, L - 1, N, d, H), first matrices of the later layers, where F < L
    inner_down: torch.Tensor | None  # (S, L - 1, N, H, d), second matrices of the earlier layers, where F < L
    across: dict[tuple[int, int], torch.Tensor] | None  # (earlier, later): (S, N, H, H), later first @ earlier second
    output_scale: torch.Tensor | None  # (S, 1, d)
    down: torch.Tensor | None  # (S, F * N * H, d), second matrices of the last F layers, scaled
    decoding: Any = None  # what decoding_rqmoe derives from these tables, on first use
    sizes: list[int] | None = None  # of the codebooks, where they differ
    pairs: dict[int, Any] = field(default_factory=dict)  # what local_search_rqmoe derives, per number of codes
    num_experts: int = 0
    inner_size: int = 0  # F * N * H
    intermediate_size: int = 0


def build_tables(
    codebooks: torch.Tensor,
    instructions: torch.Tensor | None,
    experts: torch.nn.Module | None,
    dtype: torch.dtype,
    sizes: list[int] | None = None,
) -> Tables:
    """Computes the tables of the current weights.

    Args:
        codebooks: `(M, K, d)`.
        instructions: `(M - 1, K, c)` or None.
        experts: An `RQMoEExperts`, or None for an additive quantizer.
        dtype: Of the experts' arithmetic. float64 raises everything to float64; otherwise codewords and distances are
            float32.
        sizes: Codewords of each codebook, where they differ from K.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(codebooks.device.type, enabled=False):
        codebooks = codebooks.to(exact, copy=sizes is not None)
        for codebook, size in zip(codebooks, sizes or (), strict=False):
            codebook[size:] = FAR
        if experts is None:
            steps = codebooks[1:]
            proxy = (-2 * steps.mT.contiguous(), steps.square().sum(-1))
            tables = Tables(codebooks[0], steps, *proxy, *[None] * 9)
            tables.sizes = sizes
            return tables
        weights = {name: weight.to(exact) for name, weight in experts.named_parameters(recurse=False)}
        tables = _expert_tables(codebooks, weights, experts.residual, dtype)
        tables.sizes = sizes
        tables.instructions = None if instructions is None else instructions.to(dtype)
        _fill_proxy(tables, experts.condition_proj.shape[-1])
    return tables


def _expert_tables(
    codebooks: torch.Tensor, weights: dict[str, torch.Tensor], residual: bool, dtype: torch.dtype
) -> Tables:
    """All tables but the instructions and the proxy."""
    codewords, up, down = codebooks[1:], weights["up_proj"], weights["down_proj"]
    layers, experts, width, size = up.shape[1:]
    # Folding replaces 2 * (L - 1) * d * H multiplications by (L - 1) * (L * H / 2 + d) * H, and saves passes over d.
    folded = layers > 1 and layers * width <= 2 * size
    first_up = up[:, : layers if folded else 1].flatten(1, 3)  # (S, F * N * H, d)
    conditioned = codewords @ weights["codeword_proj"].mT + weights["bias"][:, None]  # (S, K, d)
    scale = weights["output_scale"][:, None]  # (S, 1, d)
    gate = weights.get("gate_up_proj", weights.get("gate_proj"))
    features, projections = [conditioned @ first_up.mT], [first_up @ weights["condition_proj"]]
    if gate is not None:
        features.append(conditioned @ gate.mT)
        projections.append(gate @ weights["condition_proj"])
    if "gate_bias" in weights:
        features[1] += weights["gate_bias"][:, None]
    if layers > 1 and not folded:
        features.append(conditioned)
        projections.append(weights["condition_proj"])
    offset = scale.mT * weights["condition_proj"]  # (S, d, c)
    return Tables(
        first=codebooks[0],
        base=scale * conditioned + codewords if residual else scale * conditioned,
        proxy=torch.empty_like(codewords.mT, memory_format=torch.contiguous_format),
        proxy_norms=torch.empty_like(codewords[..., 0]),
        instructions=None,
        features=torch.cat(features, dim=-1).to(dtype),
        condition_proj=torch.cat([offset, *projections], dim=1).mT.to(dtype).contiguous(),
        gate_proj=weights["gate_proj"].mT.to(dtype).contiguous() if "gate_up_proj" in weights else None,
        inner_up=up[:, 1:].mT.to(dtype).contiguous() if layers > 1 and not folded else None,
        inner_down=down[:, :-1].mT.to(dtype).contiguous() if layers > 1 and not folded else None,
        across={
            (earlier, later): (up[:, later] @ down[:, earlier]).mT.to(dtype).contiguous()
            for later in range(layers)
            for earlier in range(later)
        }
        if folded
        else None,
        output_scale=scale.to(dtype),
        down=(scale[:, None, None] * down[:, 0 if folded else -1 :].mT).flatten(1, 3).to(dtype).contiguous(),
        num_experts=experts,
        inner_size=first_up.shape[1],
        intermediate_size=width,
    )


def _fill_proxy(tables: Tables, condition_size: int) -> None:
    """Deforms all codewords by the mean condition of their step, less the condition's own linear share.

    The pre-selection moves this table by the linear share of the actual condition: a first-order expansion of the
    deformed codebook around the mean condition, which costs one matrix product for all codewords.
    """
    steps, codewords = tables.base.shape[:2]
    mean = tables.first.new_zeros(1, 1, condition_size).to(tables.condition_proj.dtype)
    for step in range(steps):
        if tables.instructions is not None:
            mean = mean + tables.instructions[step].mean(dim=0)
        shared = mean @ tables.condition_proj[step : step + 1]
        for rows in torch.arange(codewords, device=mean.device).split(TABLE_ROWS):
            proxy = deform(tables, slice(step, step + 1), rows[None], shared)[0]
            tables.proxy[step, :, rows] = -2 * proxy.T
            tables.proxy_norms[step, rows] = proxy.square().sum(-1)


def deform(tables: Tables, steps: slice, codes: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Deformed codewords, less the share of the condition (the offset).

    Args:
        tables: The tables.
        steps: Which of the S steps with experts, m of them.
        codes: `(m, r)`, one codeword each.
        shared: `(m, r or 1, d + w)`: the condition of each code times `condition_proj`.

    Returns:
        `(m, r, d)`, float32 (float64 if the tables are).
    """
    base = look_up(tables.base[steps], codes)
    features = look_up(tables.features[steps], codes).add_(shared[..., base.shape[-1] :])
    return base.add_(mix(tables, steps, features))


def mix(tables: Tables, steps: slice, features: torch.Tensor) -> torch.Tensor:
    """Runs gate and experts on features `(m, r, w)`: the part of a codeword that is not linear, `(m, r, d)`."""
    size, experts = tables.down.shape[-1], tables.num_experts
    inner = features[..., : tables.inner_size]
    gate_width = features.shape[-1] - tables.inner_size - (0 if tables.inner_up is None else size)
    gate = features[..., tables.inner_size : tables.inner_size + gate_width]
    if tables.gate_proj is not None:
        gate = F.relu(gate) @ tables.gate_proj[steps]
    weights = gate.softmax(dim=-1)[..., None] if gate_width else None  # (m, r, N, 1)
    inner = inner.unflatten(-1, (-1, experts, tables.intermediate_size))  # (m, r, F, N, H)
    inner = F.relu(inner) if tables.across is None else _folded_layers(tables.across, steps, inner)
    if tables.inner_up is None:
        inner = inner if weights is None else inner.mul_(weights[..., None, :, :])
        return inner.flatten(-3) @ tables.down[steps]
    last, skipped = _later_layers(tables, steps, inner[..., 0, :, :], features[..., -size:], weights)
    last = last if weights is None else last.mul_(weights)
    return skipped.mul_(tables.output_scale[steps]) + last.flatten(-2) @ tables.down[steps]


def _folded_layers(across: dict[tuple[int, int], torch.Tensor], steps: slice, features: torch.Tensor) -> torch.Tensor:
    """Activations of all layers, `(m, r, L, N, H)`, from what codeword and condition give each of them, same shape.

    What an earlier layer adds to the hidden vector reaches a later layer through the product of their two matrices,
    so the hidden vector itself is never formed.
    """
    active = torch.empty_like(features, memory_format=torch.contiguous_format)
    for layer in range(features.shape[2]):
        for expert in range(features.shape[3]):
            state = features[:, :, layer, expert]
            for earlier in range(layer):
                state = torch.baddbmm(state, active[:, :, earlier, expert], across[earlier, layer][steps, expert])
            active[:, :, layer, expert] = state.relu()
    return active


def _later_layers(
    tables: Tables, steps: slice, inner: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the layers between the first activation and the last.

    Args:
        tables: The tables.
        steps: As in [`deform`].
        inner: Activation of the first layer, `(m, r, N, H)`; overwritten.
        hidden: What enters the first layer, `(m, r, d)`.
        weights: Of the experts, `(m, r, N, 1)`; None if there is one expert.

    Returns:
        The activation of the last layer, and what the layers before it add to `hidden`, mixed: `(m, r, d)`.
    """
    mixed = -hidden
    for expert in range(tables.num_experts):
        state, activation = hidden, inner[..., expert, :]
        for layer in range(tables.inner_up.shape[1]):
            state = torch.baddbmm(state, activation, tables.inner_down[steps, layer, expert])
            activation = torch.bmm(state, tables.inner_up[steps, layer, expert]).relu_()
        inner[..., expert, :] = activation
        mixed = mixed + state if weights is None else torch.addcmul(mixed, state, weights[..., expert, :])
    return inner, mixed


def encode_vectors(
    target: torch.Tensor,
    tables_for: Callable[[torch.dtype], Tables],
    dtype: torch.dtype,
    num_candidates: int,
    beam_size: int,
    num_codebooks: int,
    settle_ties: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search for the codes of standardised vectors, in chunks of bounded memory.

    Args:
        target: float32 `(n, d)`.
        tables_for: Gives the tables of a dtype.
        dtype: Of the experts' arithmetic.
        num_candidates: Codewords per partial code that are evaluated exactly. They are chosen among all partial codes
            of a vector together, by the proxy table.
        beam_size: Partial codes kept per vector.
        num_codebooks: Steps.
        settle_ties: Encode vectors with near ties again in float64 (only where dtype is float32), so that their codes
            do not depend on the batch.

    Returns:
        int64 codes `(n, num_codebooks)` and float32 reconstructions `(n, d)`, standardised.
    """
    settings = (num_candidates, beam_size, num_codebooks)
    codes = torch.empty(len(target), num_codebooks, dtype=torch.long, device=target.device)
    reconstruction = torch.empty_like(target)
    with torch.autocast(target.device.type, enabled=False):
        tables = tables_for(dtype)
        rows = _chunk_rows(tables, num_candidates, beam_size, target.device.type)
        for part in range(0, len(target), rows):
            chunk = slice(part, part + rows)
            codes[chunk], residual, tied = _beam_search(target[chunk], tables, *settings)
            reconstruction[chunk] = target[chunk] - residual
            if settle_ties and dtype == torch.float32 and tied.any():
                again = part + tied.nonzero()[:, 0]
                exact = target[again].double()
                codes[again], residual, _ = _beam_search(exact, tables_for(torch.float64), *settings)
                reconstruction[again] = (exact - residual).float()
    return codes, reconstruction


def _chunk_rows(tables: Tables, num_candidates: int, beam_size: int, device: str) -> int:
    """Vectors per chunk, so that the largest temporary tensors stay within the budget."""
    codewords, size = tables.first.shape
    features = 0 if tables.features is None else tables.features.shape[-1]
    evaluated = min(num_candidates, codewords) if features else 1
    per_vector = 4 * beam_size * (2 * codewords + evaluated * (2 * features + 3 * size) + 4 * size)
    budget = CPU_CHUNK_BYTES if device == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, min(16384, budget // per_vector))


def _beam_search(
    target: torch.Tensor, tables: Tables, num_candidates: int, beam_size: int, num_codebooks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One chunk: codes `(n, num_codebooks)`, residuals `(n, d)`, and which vectors met a near tie, bool `(n,)`."""
    tolerance = TIE_TOLERANCE * target.square().sum(-1)
    keep = beam_size if num_codebooks > 1 else 1
    scores = torch.addmm(tables.first.square().sum(-1), target, tables.first.T, alpha=-2)
    best, tied = _smallest(scores, keep, tolerance)
    codes = best[..., None]  # (n, b, steps so far)
    chosen = tables.first[best]
    residual = target[:, None] - chosen  # (n, b, d)
    condition = chosen if tables.instructions is None else tables.instructions[0][best]
    for step in range(num_codebooks - 1):
        last = step == num_codebooks - 2
        parent, code, residual, near = _extend(
            residual, condition, tables, step, num_candidates, 1 if last else beam_size, tolerance
        )
        tied |= near
        codes = torch.cat([_rows(codes, parent), code[..., None]], dim=-1)
        if last:
            break
        if tables.instructions is not None:
            condition = _rows(condition, parent) + tables.instructions[step + 1][code]
        elif tables.features is not None:
            condition = target[:, None] - residual
    return codes[:, 0], residual[:, 0], tied


def _extend(
    residual: torch.Tensor,
    condition: torch.Tensor,
    tables: Tables,
    step: int,
    num_candidates: int,
    keep: int,
    tolerance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the beam search: the best `keep` of all one-code extensions of the partial codes.

    Args:
        residual: `(n, b, d)`.
        condition: `(n, b, c)`.
        tables: The tables.
        step: Which of the S steps.
        num_candidates: Extensions evaluated exactly per partial code.
        keep: Partial codes to return.
        tolerance: `(n,)`, below which a difference of squared distances is a near tie.

    Returns:
        For each kept extension the partial code it extends and the code it adds, int64 `(n, keep)`, the residual that
        it leaves, `(n, keep, d)`; and which vectors met a near tie, `(n,)`.
    """
    vectors, beam, size = residual.shape
    codewords = tables.proxy.shape[2]
    shared = None
    if tables.features is not None:
        shared = condition.to(tables.condition_proj.dtype) @ tables.condition_proj[step]  # (n, b, d + w)
        residual = residual - shared[..., :size]
    scores = torch.addmm(tables.proxy_norms[step], residual.flatten(0, 1), tables.proxy[step]).view(vectors, -1)
    if beam > 1:  # squared distances of different partial codes are compared: the part without codeword counts too
        scores.view(vectors, beam, -1).add_(residual.square().sum(-1, keepdim=True))
    count = keep if shared is None else max(keep, num_candidates * beam)
    candidates, tied = _smallest(scores, count, tolerance)  # (n, a)
    parent, code = candidates // codewords, candidates % codewords
    target = _rows(residual, parent)
    if shared is None:
        return parent, code, target - tables.base[step][code], tied
    deformed = deform(tables, slice(step, step + 1), code.view(1, -1), _rows(shared, parent).flatten(0, 1)[None])
    left = target - deformed.view(vectors, -1, size)  # (n, a, d)
    best, near = _smallest(left.square().sum(-1), keep, tolerance)
    return parent.gather(1, best), code.gather(1, best), _rows(left, best), tied | near


def _smallest(values: torch.Tensor, count: int, tolerance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the `count` smallest values per row, and whether the next one is as small within the tolerance."""
    if count >= values.shape[1]:
        order = torch.arange(values.shape[1], device=values.device).expand_as(values)
        return order, torch.zeros(len(values), dtype=torch.bool, device=values.device)
    smallest, indices = values.topk(count + 1, largest=False)
    return indices[:, :-1], smallest[:, -1] - smallest[:, -2] < tolerance


def look_up(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Rows of stacked tables: `(m, K, w)` and `(m, r)` to `(m, r, w)`."""
    if len(tables) == 1:
        return tables[0].index_select(0, codes[0])[None]
    offsets = torch.arange(len(tables), device=codes.device)[:, None] * tables.shape[1]
    return F.embedding(codes + offsets, tables.flatten(0, 1))


def _rows(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of each vector's own table: `(n, b, w)` and `(n, a)` to `(n, a, w)`."""
    if values.shape[1] == 1:
        return values.expand(-1, indices.shape[1], -1) if indices.shape[1] > 1 else values
    offsets = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (indices + offsets).flatten()).view(*indices.shape, -1)
