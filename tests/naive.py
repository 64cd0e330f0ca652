"""The family as loops over vectors, steps, codewords and experts, in float64, straight from the papers' equations."""

import torch


def deformed_codeword(weights: dict, config, step: int, codeword: int, condition: torch.Tensor) -> torch.Tensor:
    """f_k of one step (counted from 0; the first step is a plain codebook)."""
    plain = weights["codebooks"][step, codeword]
    if step == 0 or config.num_experts == 0:
        return plain
    part = {name.removeprefix("experts."): w[step - 1] for name, w in weights.items() if name.startswith("experts.")}
    z = part["codeword_proj"] @ plain + part["condition_proj"] @ condition + part["bias"]
    if config.gate == "linear":
        gate = torch.softmax(part["gate_proj"] @ z + part["gate_bias"], 0)
    elif config.gate == "mlp":
        gate = torch.softmax(part["gate_proj"] @ torch.relu(part["gate_up_proj"] @ z), 0)
    else:
        gate = torch.ones(1, dtype=z.dtype)
    mixture = torch.zeros_like(z)
    for expert in range(config.num_experts):
        hidden = z
        for layer in range(config.num_expert_layers):
            inner = torch.relu(part["up_proj"][layer, expert] @ hidden)
            hidden = hidden + part["down_proj"][layer, expert] @ inner
        mixture = mixture + gate[expert] * hidden
    deformed = part["output_scale"] * mixture
    return plain + deformed if config.residual else deformed


def _double(model) -> dict:
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def encode(model, vectors: torch.Tensor) -> torch.Tensor:
    """Greedy codes over all codewords, `(n, M)`."""
    weights, config = _double(model), model.config
    result = []
    for vector in (vectors.double() - weights["mean"]) / weights["scale"]:
        codes, reconstruction = [], torch.zeros_like(vector)
        instruction = torch.zeros(config.condition_size, dtype=torch.double)
        for step in range(config.num_codebooks):
            condition = instruction if config.conditioning == "instruction" else reconstruction
            deformed = torch.stack(
                [deformed_codeword(weights, config, step, k, condition) for k in range(config.codebook_size)]
            )
            code = int((vector - reconstruction - deformed).square().sum(1).argmin())
            codes.append(code)
            reconstruction = reconstruction + deformed[code]
            if "instructions" in weights and step < config.num_codebooks - 1:
                instruction = instruction + weights["instructions"][step, code]
        result.append(codes)
    return torch.tensor(result)


def partial_sums(model, codes: torch.Tensor) -> torch.Tensor:
    """Standardised reconstructions after each step, `(n, m, d)`."""
    weights, config = _double(model), model.config
    result = []
    for row in codes.tolist():
        sums, reconstruction = [], torch.zeros(config.hidden_size, dtype=torch.double)
        instruction = torch.zeros(config.condition_size, dtype=torch.double)
        for step, code in enumerate(row):
            condition = instruction if config.conditioning == "instruction" else reconstruction
            reconstruction = reconstruction + deformed_codeword(weights, config, step, code, condition)
            sums.append(reconstruction)
            if "instructions" in weights and step < config.num_codebooks - 1:
                instruction = instruction + weights["instructions"][step, code]
        result.append(torch.stack(sums))
    return torch.stack(result)


def decode(model, codes: torch.Tensor) -> torch.Tensor:
    """Reconstructions in the units of the embeddings, `(n, d)`."""
    return partial_sums(model, codes)[:, -1] * model.scale.double() + model.mean.double()
