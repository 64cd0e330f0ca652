"""Configuration of RQ-MoE quantizers."""

# No `from __future__ import annotations` here: it would turn the annotations into strings, which @strict cannot check.
import os
from functools import wraps
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import PreTrainedConfig

from .limits_rqmoe import check_codebooks, check_common, check_entries, check_sizes


class RQMoEConfigError(StrictDataclassError, ValueError):
    """A configuration that makes no quantizer, or one beyond all measure."""


def _refuses_by_value_error(cls: type) -> type:
    """Lets a config that cannot be built say so as a ValueError, whatever `transformers` and `strict` raise."""
    build = cls.__init__  # type: ignore[misc]

    @wraps(build)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_common(kwargs)
        try:
            build(self, *args, **kwargs)
        except (StrictDataclassError, AttributeError, TypeError, KeyError) as error:
            raise RQMoEConfigError(f"These settings make no quantizer: {error}") from error

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_refuses_by_value_error
@strict
class RQMoEConfig(PreTrainedConfig):
    """Describes one member of the residual quantization family (RQ-MoE, arXiv 2605.14359).

    The members are told apart by `num_experts`, `residual`, `gate` and `conditioning`; the class methods [`additive`],
    [`official`] and [`qinco`] fill them in. The defaults are RQ-MoE as in the paper.

    Args:
        hidden_size: Dimension of the embeddings (the paper's d).
        num_codebooks: Quantization steps, hence codes per vector (M).
        codebook_size: Codewords per codebook, 2 to 65,536 (K); of the largest one if they differ.
        codebook_sizes: Codewords of each codebook, where they differ: six of 1,024 and one of 16 make 64 bits.
        search_blocks: Numbers of codebooks that are searched together, block after block, each on what the earlier
            ones leave. For additive quantizers only. `None` is one block of all. `[13, 13]`: the first 13 codes are
            those of a quantizer of the first 13 codebooks. `[1, 13]`: the first code is the nearest codeword.
        num_experts: Experts per step (N). 0 makes an additive quantizer: plain codebooks, nothing else.
        num_expert_layers: Residual bottleneck layers in each expert (L).
        intermediate_size: Width of the bottleneck (H).
        instruction_size: Width of the instruction stream (D_e). `None` means `hidden_size`, which suffices by the
            paper's Theorem 4.2; smaller is cheaper.
        conditioning: What deforms the codebooks of a step: the sum of the `"instruction"` vectors of the codes so far
            (RQ-MoE: all steps decode in parallel), or the `"reconstruction"` so far (QINCo: one step after the other).
        residual: Whether the experts' output is added to the codeword (the paper) or replaces it (the official code).
        gate: `"linear"` (the paper), `"mlp"` (two layers without bias, the official code) or `"none"` (one expert).
        dropout: Dropout inside the experts and the MLP gate, active only in the gradient pass of training.
        training_loss: `"normalized_residual"` is the paper's sum over steps of log(1 + |r_{m+1}|^2 / |r_m|^2);
            `"per_step"` sums the squared errors of all prefixes; `"last_step"` is the squared error of the whole code.
        num_candidates: Default number of codewords per beam entry that the encoder evaluates exactly.
        beam_size: Default number of partial codes that the encoder keeps per vector.
        local_search: Default rounds of local search with which the encoder improves the codes of the beam: slower, and
            closer. 0 is none. It keeps a table of all pairs of codewords, for each of search_blocks: up to 32,768
            codewords in a block of several codebooks.
        base_model: Id of the encoder whose embeddings this quantizer was trained for.
        unit_norm: Whether the embeddings that it was initialised on all had norm 1. `None`: not on record.
    """

    model_type = "rqmoe"
    keys_to_ignore_at_inference = ["step_errors"]

    hidden_size: int = 384
    num_codebooks: int = 8
    codebook_size: int = 256
    codebook_sizes: list[int] | None = None
    search_blocks: list[int] | None = None
    num_experts: int = 2
    num_expert_layers: int = 1
    intermediate_size: int = 256
    instruction_size: int | None = None
    conditioning: Literal["instruction", "reconstruction"] = "instruction"
    residual: bool = True
    gate: Literal["linear", "mlp", "none"] = "linear"
    dropout: float | int = 0.0
    training_loss: Literal["normalized_residual", "per_step", "last_step"] = "normalized_residual"
    num_candidates: int = 8
    beam_size: int = 4
    local_search: int = 0
    base_model: str | None = None
    unit_norm: bool | None = None

    @classmethod
    def additive(cls, **kwargs) -> "RQMoEConfig":
        """Plain codebooks that are summed: RQ, LSQ, PQ or any other additive quantizer."""
        return cls(**{"num_experts": 0, **kwargs})

    @classmethod
    def official(cls, **kwargs) -> "RQMoEConfig":
        """RQ-MoE as in its authors' code: no residual connection, a two-layer gate, instructions of `hidden_size`."""
        return cls(**{"residual": False, "gate": "mlp", **kwargs})

    @classmethod
    def qinco(cls, **kwargs) -> "RQMoEConfig":
        """QINCo (arXiv 2401.14732): one expert, conditioned on the reconstruction so far."""
        settings = {"num_experts": 1, "gate": "none", "conditioning": "reconstruction", "residual": False}
        return cls(**{**settings, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a config.json; see `PreTrainedConfig.from_pretrained`.

        Raises:
            ValueError: If it is none of a quantizer, or asks for more than any quantizer needs.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (AttributeError, TypeError, KeyError, RecursionError, ValueError) as error:
            if isinstance(error, HFValidationError):  # of the name, not of the file
                raise
            raise RQMoEConfigError(
                f"The config.json of {os.fspath(pretrained_model_name_or_path)} is damaged or describes no quantizer: "
                f"{error}"
            ) from error

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Makes a config of the content of a config.json; see `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: As [`from_pretrained`].
        """
        check_entries(config_dict, cls)
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Checks the values that a type cannot express."""
        at_least_one = ("hidden_size", "num_codebooks", "num_expert_layers", "intermediate_size")
        for name in (*at_least_one, "num_candidates", "beam_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 2 <= self.codebook_size <= 65536:
            raise ValueError(f"codebook_size must lie between 2 and 65536, got {self.codebook_size}.")
        check_codebooks(self)
        if self.num_experts < 0:
            raise ValueError(f"num_experts must be 0 (an additive quantizer) or more, got {self.num_experts}.")
        if self.gate == "none" and self.num_experts > 1:
            raise ValueError(f"gate='none' needs num_experts=1, got {self.num_experts}: set gate='linear'.")
        if self.local_search < 0:
            raise ValueError(f"local_search must be 0 (none) or a number of rounds, got {self.local_search}.")
        if self.instruction_size is not None and self.instruction_size < 1:
            raise ValueError(f"instruction_size must be at least 1, got {self.instruction_size}.")
        if self.conditioning == "reconstruction" and self.instruction_size not in (None, self.hidden_size):
            raise ValueError(
                f"conditioning='reconstruction' works in hidden_size={self.hidden_size} dimensions, "
                f"got instruction_size={self.instruction_size}: leave it out."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        check_sizes(self)

    @property
    def condition_size(self) -> int:
        """Width of the vector that deforms the codebooks: the instruction's, or the embedding's."""
        return self.hidden_size if self.instruction_size is None else self.instruction_size

    @property
    def has_experts(self) -> bool:
        """Whether any step has a mixture of experts; the first step is always a plain codebook."""
        return self.num_experts > 0 and self.num_codebooks > 1

    @property
    def code_sizes(self) -> int | list[int]:
        """What the functions for packed codes take as `codebook_size`: one number, or one per step."""
        return self.codebook_size if self.codebook_sizes is None else self.codebook_sizes

    @property
    def bits_per_code(self) -> int:
        """Bits that a code (of the largest codebook) takes when packed: log2(codebook_size), rounded up."""
        return (self.codebook_size - 1).bit_length()

    @property
    def bits_per_vector(self) -> int:
        """Bits of all codes of a vector."""
        sizes = self.codebook_sizes or [self.codebook_size] * self.num_codebooks
        return sum((size - 1).bit_length() for size in sizes)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one packed vector takes."""
        return -(-self.bits_per_vector // 8)
