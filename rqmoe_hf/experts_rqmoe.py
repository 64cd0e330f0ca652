"""The mixtures of experts that deform codebooks: the paper's level 2.

Letters as in `modeling_rqmoe`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_rqmoe import RQMoEConfig


class RQMoEExperts(nn.Module):
    """The mixtures of all steps after the first, stacked, so that they can be evaluated in parallel."""

    def __init__(self, config: RQMoEConfig):
        super().__init__()
        steps, layers, experts = config.num_codebooks - 1, config.num_expert_layers, config.num_experts
        size, width = config.hidden_size, config.intermediate_size
        self.residual = config.residual
        self.dropout = config.dropout
        self.codeword_proj = nn.Parameter(torch.empty(steps, size, size))
        self.condition_proj = nn.Parameter(torch.empty(steps, size, config.condition_size))
        self.bias = nn.Parameter(torch.empty(steps, size))
        self.gate_up_proj = nn.Parameter(torch.empty(steps, width, size)) if config.gate == "mlp" else None
        gate_input = width if config.gate == "mlp" else size
        self.gate_proj = nn.Parameter(torch.empty(steps, experts, gate_input)) if config.gate != "none" else None
        self.gate_bias = nn.Parameter(torch.empty(steps, experts)) if config.gate == "linear" else None
        self.up_proj = nn.Parameter(torch.empty(steps, layers, experts, width, size))
        self.down_proj = nn.Parameter(torch.empty(steps, layers, experts, size, width))
        self.output_scale = nn.Parameter(torch.empty(steps, size))

    def gate(self, hidden: torch.Tensor, steps: slice = slice(None)) -> torch.Tensor:
        """Weights of the experts, `(S, n, N)`, from the conditioned codewords `(S, n, d)`."""
        if self.gate_proj is None:
            return hidden.new_ones(*hidden.shape[:2], 1)
        if self.gate_up_proj is not None:
            hidden = F.dropout(F.relu(hidden @ self.gate_up_proj[steps].mT), self.dropout, self.training)
        logits = hidden @ self.gate_proj[steps].mT
        if self.gate_bias is not None:
            logits = logits + self.gate_bias[steps, None]
        return logits.softmax(dim=-1)

    def forward(self, codewords: torch.Tensor, condition: torch.Tensor, steps: slice = slice(None)) -> torch.Tensor:
        """Deforms the codewords `(S, n, d)` of some steps by the conditions `(S, n, c)`; returns `(S, n, d)`.

        The experts compute in the dtype of their weights; the codewords that they are added to keep their own.
        """
        dtype = self.codeword_proj.dtype
        hidden = codewords.to(dtype) @ self.codeword_proj[steps].mT
        hidden = hidden + condition.to(dtype) @ self.condition_proj[steps].mT
        hidden = hidden + self.bias[steps, None]
        weights = self.gate(hidden, steps).mT[..., None]  # (S, N, n, 1)
        hidden = hidden[:, None]  # (S, 1, n, d), from the first layer on (S, N, n, d)
        for up, down in zip(self.up_proj[steps].unbind(1), self.down_proj[steps].unbind(1), strict=True):
            inner = F.dropout(F.relu(hidden @ up.mT), self.dropout, self.training)  # (S, N, n, H)
            hidden = hidden + inner @ down.mT
        mixture = self.output_scale[steps, None] * (weights * hidden).sum(dim=1)
        return codewords + mixture if self.residual else mixture
