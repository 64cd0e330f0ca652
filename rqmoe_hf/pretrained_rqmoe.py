"""A checkpoint's way to the disk and back, and what the weights of a new model are.

Codebooks of different sizes are one tensor `(M, K, d)` in memory, in which the smaller ones are filled up, and one
`(T, d)` of all T codewords in the file, step after step, without what fills up.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_rqmoe import RQMoEConfig
from .experts_rqmoe import RQMoEExperts
from .limits_rqmoe import check_finite, check_weight_files

# Of save_pretrained: what it hands on to push_to_hub.
_HUB_ARGUMENTS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags",
)  # fmt: skip


class RQMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and weight initialisation."""

    config: RQMoEConfig
    mean: torch.Tensor
    scale: torch.Tensor
    codebooks: nn.Parameter
    instructions: nn.Parameter | None
    commit_hash: str | None
    cast_from: tuple[str, str] | None
    base_model_prefix = "quantizer"
    main_input_name = "embeddings"
    model_tags = ["rqmoe", "embedding-compression", "vector-quantization"]
    _no_split_modules = ["RQMoEExperts"]
    # Codewords and statistics are what distances are formed from; the experts' weights follow the requested dtype.
    _keep_in_fp32_modules_strict = ["mean", "scale", "codebooks"]
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Loads a checkpoint; see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: If weights are missing, superfluous, of a wrong shape or cut off. transformers would go on
                with random ones, and a quantizer with random weights still gives codes.
        """
        loaded: Any
        # Wrong shapes are named below. transformers would raise RuntimeError, as does torch for devices and memory.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} are damaged: {error}. Download or save them again."
            ) from error
        model, loading = loaded
        wrong = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
        if wrong:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} do not belong to its config.json: "
                + "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in wrong.items())
            )
        check_finite(model.state_dict(), str(pretrained_model_name_or_path))
        if not os.path.isdir(pretrained_model_name_or_path):
            config = os.path.join(kwargs.get("subfolder", ""), "config.json")
            revision, cache = kwargs.get("revision") or "main", kwargs.get("cache_dir")
            cached = try_to_load_from_cache(str(pretrained_model_name_or_path), config, cache, revision)
            found = re.search(r"snapshots[/\\](\w+)", cached) if isinstance(cached, str) else None
            model.commit_hash = None if found is None else found[1]
        return (model, loading) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Looks at the headers first: transformers would allocate, and fill at random, whatever the files lack."""
        if checkpoint_files is not None:
            check_weight_files(checkpoint_files, _stored_shapes(model), model.config.name_or_path)
            if model.config.codebook_sizes is not None:
                read = {name: tensor for file in checkpoint_files for name, tensor in load_file(file).items()}
                state_dict, checkpoint_files = read, None
        if state_dict is not None:
            state_dict = unpack_codebooks(state_dict, model.config)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes codebooks as they lie in the file, which is what `Trainer` gives when it resumes."""
        state_dict |= unpack_codebooks(state_dict, self.config)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RQMoEPreTrainedModel):
            init.zeros_(module.mean)
            init.zeros_(module.scale)
            init.normal_(module.codebooks)
            if module.instructions is not None:
                init.normal_(module.instructions)
        if isinstance(module, RQMoEExperts):
            self._init_experts(module)

    def _init_experts(self, experts: RQMoEExperts) -> None:
        """Starts the deformation at zero, so that training begins exactly at the additive codebooks.

        With the residual connection the output scale is zero (ReZero). Without it the conditioned codeword is the
        codeword itself and the experts' last layers are zero. Never both factors of a product: that has no gradient.
        """
        for weight in experts.parameters(recurse=False):
            if weight.ndim > 2:
                init.normal_(weight, std=weight.shape[-1] ** -0.5)
            else:
                init.zeros_(weight)
        if not experts.residual:
            identity = torch.eye(self.config.hidden_size, device=experts.codeword_proj.device)
            init.copy_(experts.codeword_proj, identity.expand_as(experts.codeword_proj))
            init.zeros_(experts.condition_proj)
            init.zeros_(experts.down_proj)
            init.ones_(experts.output_scale)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Saves config and weights; `push_to_hub`, `repo_id` and the like as in `PreTrainedModel.save_pretrained`."""
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        weights = pack_codebooks(self.state_dict() if state_dict is None else state_dict, self.config)
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **hub)

    def push_to_hub(self, repo_id: str, **kwargs):  # type: ignore[override]
        """Sends weights, config, evaluation and card to the Hub in one commit; see `rqmoe_hf.hub.push_quantizer`."""
        try:
            from rqmoe_hf.hub import push_quantizer
        except ImportError:  # this file came with trust_remote_code and the package is not installed
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return push_quantizer(self, repo_id, **kwargs)  # type: ignore[arg-type]


def pack_codebooks(weights: Mapping[str, torch.Tensor], config: RQMoEConfig) -> dict[str, torch.Tensor]:
    """Weights as a file has them: without what fills up smaller codebooks."""
    packed = dict(weights)
    if config.codebook_sizes is not None and "codebooks" in packed and packed["codebooks"].dim() == 3:
        pairs = zip(packed["codebooks"], config.codebook_sizes, strict=True)
        packed["codebooks"] = torch.cat([codebook[:size] for codebook, size in pairs])
    return packed


def unpack_codebooks(weights: Mapping[str, torch.Tensor], config: RQMoEConfig) -> dict[str, torch.Tensor]:
    """Weights as a model has them: smaller codebooks are filled up with zeros, unless they are filled up already."""
    unpacked, sizes = dict(weights), config.codebook_sizes
    for name, codewords in weights.items():
        if sizes is None or name.rpartition(".")[2] != "codebooks" or codewords.dim() != 2:
            continue
        if len(codewords) == sum(sizes):  # else it is of another model, and loading says so
            unpacked[name] = nn.utils.rnn.pad_sequence(list(codewords.split(sizes)), batch_first=True)
    return unpacked


def _stored_shapes(model: RQMoEPreTrainedModel) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that a file may have of each weight."""
    shapes = {name: [tuple(tensor.shape)] for name, tensor in model.state_dict().items()}
    if model.config.codebook_sizes is not None:
        shapes["codebooks"].insert(0, (sum(model.config.codebook_sizes), model.config.hidden_size))
    return shapes
