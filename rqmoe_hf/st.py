"""The sentence-transformers module. Its import path is part of saved models: never move it."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .bundled import load_quantizer
from .codes import pack_codes
from .modeling_rqmoe import RQMoEModel

logger = logging.getLogger(__name__)
CARD_TEMPLATE = Path(__file__).parent / "hub" / "templates" / "encoder.md"
OUTPUTS = ("reconstruction", "codes", "none")


class RQMoEQuantizer(Module):
    """Quantizes the sentence embeddings of the modules before it.

    Args:
        model: The quantizer.
        asymmetric: Leave what `encode_query` embeds uncompressed. Scores between exact queries and compressed
            documents are more accurate than those between two compressed vectors.
        normalize: Give reconstructions norm 1. Default: if the quantizer was trained on embeddings of norm 1. They
            are shorter otherwise, as the mean of all vectors with a code is, and inner products rank them worse.

        num_codebooks: Keep only the first codes of each vector, hence fewer bytes. Default: all.

    What `encode`, `encode_query` and `encode_document` take in addition:

    - quantize: "reconstruction" (float32 `(n, hidden_size)`, the default), "codes" (packed uint8
      `(n, bytes_per_vector)`) or "none" (the embeddings as they are). Given explicitly it holds for queries too.
    - num_codebooks, num_candidates, beam_size, local_search: see `RQMoEModel.encode`.

    `encode(..., truncate_dim=...)` cuts what comes out: dimensions of reconstructions, but bytes of codes. For fewer
    bytes that decode give `num_codebooks`.

    The quantizer computes in the dtype it was loaded with, also if the encoder is bfloat16 or float16: codes must not
    depend on it. In training mode gradients reach the encoder straight through the quantization, and
    `features["quantization_loss"]` is what [`RQMoELoss`] trains on.

    Example:
    ```python
    from sentence_transformers import SentenceTransformer
    from rqmoe_hf.st import RQMoEQuantizer

    model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    model.append(RQMoEQuantizer.from_pretrained("minilm-384-32-bytes"))
    restored = model.encode(["a text", "another"])  # float32 (2, 384), reconstructed from the codes
    codes = model.encode(["a text", "another"], quantize="codes")  # uint8 (2, 32), packed
    query = model.encode_query("a question")  # float32 (384,), exact: queries are not compressed
    ```
    """

    config_file_name = "quantizer_config.json"  # config.json is that of the RQMoEModel, whose checkpoint the folder is
    config_keys = ["asymmetric", "normalize", "num_codebooks"]
    forward_kwargs = {"task", "quantize", "num_codebooks", "num_candidates", "beam_size", "local_search"}

    def __init__(
        self,
        model: RQMoEModel,
        asymmetric: bool = True,
        normalize: bool | None = None,
        num_codebooks: int | None = None,
    ):
        super().__init__()
        if not isinstance(model, RQMoEModel):
            raise ValueError(
                f"RQMoEQuantizer expects an RQMoEModel, got {type(model).__name__}: load a folder or a Hub id with "
                "RQMoEQuantizer.from_pretrained(...)."
            )
        self.model: Any = model
        self.asymmetric = asymmetric
        self.normalize = model.is_unit_norm if normalize is None else normalize
        if num_codebooks is not None and not 1 <= num_codebooks <= model.config.num_codebooks:
            raise ValueError(
                f"num_codebooks must lie between 1 and {model.config.num_codebooks}, got {num_codebooks}."
            )
        self.num_codebooks = num_codebooks

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, revision: str | None = None, **kwargs):
        """Loads a quantizer by its bundled name, its folder or its Hub id; `kwargs` are those of the class."""
        return cls(load_quantizer(str(name), revision=revision), **kwargs)

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Any],
        task: str | None = None,
        quantize: Literal["reconstruction", "codes", "none"] | None = None,
        num_codebooks: int | None = None,
        num_candidates: int | None = None,
        beam_size: int | None = None,
        local_search: int | None = None,
    ) -> dict[str, Any]:
        """Replaces `features["sentence_embedding"]`, `(n, hidden_size)`, by what `quantize` names."""
        if quantize is not None and quantize not in OUTPUTS:
            raise ValueError(f"quantize must be one of {', '.join(OUTPUTS)}, got {quantize!r}.")
        if quantize == "none" or (quantize is None and self.asymmetric and task == "query"):
            return features
        embeddings = features["sentence_embedding"]
        if embeddings.shape[-1] != self.model.config.hidden_size:
            raise ValueError(
                f"The encoder gives {embeddings.shape[-1]} dimensions, but this quantizer was trained on "
                f"{self.model.config.hidden_size} (of {self.model.config.base_model or 'an unnamed encoder'}): append "
                "the quantizer of this encoder, or train one with `rqmoe train --texts ... --encoder ...`."
            )
        vectors = embeddings.to(self.model.codebooks.device, torch.float32)
        num_codebooks = self.num_codebooks if num_codebooks is None else num_codebooks
        if self.training and torch.is_grad_enabled():
            return self._train(features, vectors, num_codebooks)
        found = self.model.encode(
            vectors,
            num_candidates=num_candidates,
            beam_size=beam_size,
            local_search=local_search,
            num_codebooks=num_codebooks,
        )
        if quantize == "codes":
            packed = pack_codes(found.codes.cpu().numpy(), self.model.config.code_sizes)
            features["sentence_embedding"] = torch.from_numpy(packed).to(embeddings.device)
        else:
            features["sentence_embedding"] = self._finish(found.reconstruction).to(embeddings.device)
        return features

    def _train(
        self, features: dict[str, Any], vectors: torch.Tensor, num_codebooks: int | None
    ) -> dict[str, Any]:
        """The straight-through estimate: the value is the reconstruction, the gradient also that of the vectors."""
        output = self.model(vectors, num_codebooks=num_codebooks)
        features["quantization_loss"] = output.loss
        features["sentence_embedding"] = self._finish(output.reconstruction + vectors - vectors.detach())
        return features

    def _finish(self, reconstruction: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(reconstruction, dim=-1) if self.normalize else reconstruction

    def get_embedding_dimension(self) -> int:
        """Dimension of the reconstructions."""
        return self.model.config.hidden_size

    def _apply(self, fn, recurse=True):
        """Follows the encoder to its device, but not to its dtype."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        """Saves the checkpoint of the quantizer and `quantizer_config.json`; notes that this package is required."""
        self.model.save_pretrained(output_path)
        self.save_config(output_path)
        whole = Path(output_path).parent / "config_sentence_transformers.json"  # written before the modules
        if whole.is_file():
            config = json.loads(whole.read_text("utf-8"))
            requirement = {"specifier": ">=0.1", "reason": "The last module compresses the embeddings."}
            config["requirements"] = (config.get("requirements") or {}) | {"rqmoe-hf": requirement}
            whole.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs,
    ) -> "RQMoEQuantizer":
        """Loads the module from a saved sentence-transformers model; called by `SentenceTransformer(...)`."""
        hub: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = cls.load_config(model_name_or_path, cache_folder=cache_folder, **hub)
        hub["revision"] = revision or "main"
        device_map = (kwargs.get("model_kwargs") or {}).get("device_map")
        if device_map is not None:  # sentence-transformers then leaves placing the modules to them
            hub["device_map"] = device_map
        model = RQMoEModel.from_pretrained(model_name_or_path, cache_dir=cache_folder, **hub)
        return cls(model.eval(), **config)


def _check_owner(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """Runs when a module joins a model: refuses a wrong dimension or order, warns of a wrong encoder."""
    if not isinstance(owner, SentenceTransformer) or module is None:
        return
    last = list(owner.children())[-1] if len(owner) else None
    if isinstance(last, RQMoEQuantizer) and name not in owner._modules:
        raise ValueError(
            f"An RQMoEQuantizer must be the last module: {type(module).__name__} after it would be given packed "
            "codes. Put it before the quantizer; reconstructions of unit-norm embeddings are normalised already."
        )
    if not isinstance(module, RQMoEQuantizer):
        return
    size, config = owner.get_embedding_dimension() if len(owner) else None, module.model.config
    if size is not None and size != config.hidden_size and not isinstance(last, RQMoEQuantizer):
        raise ValueError(
            f"The encoder gives {size} dimensions, but this quantizer was trained on {config.hidden_size} (of "
            f"{config.base_model or 'an unnamed encoder'}): append the quantizer of this encoder, load the encoder "
            "without truncate_dim, or train a quantizer with `rqmoe train --texts ... --encoder ...`."
        )
    card = getattr(owner, "model_card_data", None)
    encoder = None if card is None else card.base_model
    if encoder and config.base_model and Path(encoder).name.lower() != Path(config.base_model).name.lower():
        logger.warning(
            "This quantizer was trained on embeddings of %s, but the encoder is %s: measure with `rqmoe evaluate` "
            "what that costs, or train a quantizer for this encoder.",
            config.base_model,
            encoder,
        )
    if card is not None:
        _describe(owner, card)


def _describe(owner: SentenceTransformer, card: Any) -> None:
    """Lets the model be saved with a card that says what the quantizer changes.

    A card that describes the quantizer already, of a model that was saved with it, stays.
    """
    card.template_path = CARD_TEMPLATE
    card.add_tags(RQMoEModel.model_tags)
    if "RQMoEQuantizer" not in (getattr(owner, "_model_card_text", None) or ""):
        owner._model_card_text = ""  # type: ignore[assignment]  # else that of the encoder alone is saved again


register_module_module_registration_hook(_check_owner)


class RQMoELoss(nn.Module):
    """Trains the [`RQMoEQuantizer`] at the end of a model with `SentenceTransformerTrainer`.

    Args:
        model: A SentenceTransformer whose last module is an RQMoEQuantizer.
        loss: A loss of sentence-transformers with `compute_loss_from_embeddings`, computed on the reconstructions:
            quantization-aware training of the encoder. Without it only the quantizer is trained, on texts of any
            number of columns, labels unused, and the encoder's weights are frozen.
        quantization_weight: Weight of the quantizer's own loss beside `loss`.

    Example:
    ```python
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments
    from rqmoe_hf.st import RQMoELoss, RQMoEQuantizer

    model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    model.append(RQMoEQuantizer.from_pretrained("minilm-384-32-bytes"))
    texts = Dataset.from_dict({"text": ["a text", "another text", "and a third one"]})
    arguments = SentenceTransformerTrainingArguments(output_dir="tuned", max_steps=1, report_to="none")
    SentenceTransformerTrainer(model, arguments, train_dataset=texts, loss=RQMoELoss(model)).train()
    ```
    """

    def __init__(self, model: SentenceTransformer, loss: nn.Module | None = None, quantization_weight: float = 1.0):
        super().__init__()
        if not isinstance(model[-1], RQMoEQuantizer):
            raise ValueError(f"The model must end with an RQMoEQuantizer, not with {type(model[-1]).__name__}.")
        if loss is not None and not hasattr(loss, "compute_loss_from_embeddings"):
            raise ValueError(
                f"{type(loss).__name__} cannot be computed from embeddings: use one that can, such as "
                "MultipleNegativesRankingLoss or CoSENTLoss."
            )
        self.model: Any = model
        self.loss: Any = loss
        self.quantization_weight = quantization_weight
        if loss is None:
            for module in list(model.children())[:-1]:
                module.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, sentence_features: list[dict[str, torch.Tensor]], labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses by name; the trainer adds them up."""
        if self.loss is None:  # the trainer has switched all to training: dropout would blur the frozen embeddings
            for module in list(self.model.children())[:-1]:
                module.eval()
        features = [self.model(column) for column in sentence_features]
        if "quantization_loss" not in features[0]:  # an evaluation
            last = self.model[-1]
            exact = [self.model(column, quantize="none")["sentence_embedding"] for column in sentence_features]
            quantization = [
                last.model(vectors.to(torch.float32), num_codebooks=last.num_codebooks).loss for vectors in exact
            ]
        else:
            quantization = [column["quantization_loss"] for column in features]
        losses = {"quantization": self.quantization_weight * torch.stack(quantization).mean()}
        if self.loss is not None:
            embeddings = [column["sentence_embedding"] for column in features]
            losses["task"] = self.loss.compute_loss_from_embeddings(embeddings, labels)
        return losses
