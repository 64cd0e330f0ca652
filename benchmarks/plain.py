"""The RQ-MoE algorithm as published, without any of the engine's shortcuts: what the engine is measured against.

Every step sends all codewords through the concatenated projection, the gate and all experts, one expert after the
other; decoding goes step by step. The weights are those of an `RQMoEModel`, so both compute the same function.
"""

import torch
from torch.nn import functional as F

from rqmoe_hf import RQMoEModel

MAX_ROWS = 65_536  # candidates evaluated at a time


class PlainRQMoE:
    """Encodes and decodes with the weights of `model`, float32."""

    def __init__(self, model: RQMoEModel):
        self.model = model
        self.config = model.config
        weights = model.experts
        # One projection of [codeword, condition], as the paper writes it.
        self.concat = torch.cat([weights.codeword_proj, weights.condition_proj], dim=-1)

    def deform(self, step: int, codewords: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """F of codewords `(r, d)` under conditions `(r, c)`, for a step counted from 0 among those with experts."""
        weights = self.model.experts
        z = F.linear(torch.cat([codewords, condition], dim=-1), self.concat[step], weights.bias[step])
        gate = weights.gate(z[None], slice(step, step + 1))[0]
        mixture = 0.0
        for expert in range(self.config.num_experts):
            hidden = z
            for up, down in zip(weights.up_proj[step, :, expert], weights.down_proj[step, :, expert], strict=True):
                hidden = hidden + F.linear(F.relu(F.linear(hidden, up)), down)
            mixture = mixture + gate[:, expert : expert + 1] * hidden
        mixture = weights.output_scale[step] * mixture
        return codewords + mixture if self.config.residual else mixture

    def encode(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy codes `(n, M)` and reconstructions `(n, d)`, in chunks of bounded memory."""
        target = self.model._standardize(embeddings)
        chunks = target.split(max(1, MAX_ROWS // self.config.codebook_size))
        codes, reconstructions = zip(*(self._encode_chunk(chunk) for chunk in chunks), strict=True)
        return torch.cat(codes), self.model._unstandardize(torch.cat(reconstructions))

    def _encode_chunk(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, books = self.config, self.model.codebooks
        rows = torch.arange(len(target), device=target.device)
        first = torch.cdist(target, books[0]).argmin(dim=1)
        codes, reconstruction = [first], books[0][first]
        condition = self._first_condition(first)
        for step in range(config.num_codebooks - 1):
            candidates = books[step + 1].expand(len(target), -1, -1).flatten(0, 1)
            conditions = condition[:, None].expand(-1, config.codebook_size, -1).flatten(0, 1)
            deformed = self.deform(step, candidates, conditions).view(len(target), config.codebook_size, -1)
            code = ((target - reconstruction)[:, None] - deformed).square().sum(dim=-1).argmin(dim=1)
            reconstruction = reconstruction + deformed[rows, code]
            codes.append(code)
            condition = self._next_condition(condition, reconstruction, step, code)
        return torch.stack(codes, dim=1), reconstruction

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstructions of codes `(n, M)`, step by step."""
        reconstruction = self.model.codebooks[0][codes[:, 0]]
        condition = self._first_condition(codes[:, 0])
        for step in range(self.config.num_codebooks - 1):
            code = codes[:, step + 1]
            reconstruction = reconstruction + self.deform(step, self.model.codebooks[step + 1][code], condition)
            condition = self._next_condition(condition, reconstruction, step, code)
        return self.model._unstandardize(reconstruction)

    def _first_condition(self, code: torch.Tensor) -> torch.Tensor:
        tables = self.model.codebooks if self.model.instructions is None else self.model.instructions
        return tables[0][code]

    def _next_condition(
        self, condition: torch.Tensor, reconstruction: torch.Tensor, step: int, code: torch.Tensor
    ) -> torch.Tensor:
        if self.model.instructions is None:
            return reconstruction
        return (
            condition + self.model.instructions[step + 1][code] if step + 2 < self.config.num_codebooks else condition
        )
