"""Pushing a quantizer: weights, config, evaluation and card in one commit."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import custom_object_save

from ..modeling_rqmoe import RQMoEModel
from ..record import RECORD_FILE, TRAINING_FILE, EvaluationRecord
from ..saving import save_whole, weights_checksum
from .cards import (
    RQMoECardData,
    eval_results_files,
    hub_id,
    is_generated,
    render_card,
)

logger = logging.getLogger(__name__)
COMPANIONS = (TRAINING_FILE, "training_log.json", "recipe.yaml")  # travel with a checkpoint if they lie beside it
REPLACED = ("model-*.safetensors", "model.safetensors.index.json", ".eval_results/*")  # of earlier weights
AUTO_MAP = {"AutoConfig": "configuration_rqmoe.RQMoEConfig", "AutoModel": "modeling_rqmoe.RQMoEModel"}


def push_quantizer(
    model: RQMoEModel,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    replace_card: bool = False,
    include_code: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Sends a quantizer to the Hub, in one commit.

    The evaluation, the training notes and the recipe that lie beside the checkpoint the model was loaded from, in a
    folder or on the Hub, go with it; those of an earlier push, which may be of other weights, are replaced or deleted.
    Weights that are bfloat16 values are stored in half the bytes.

    Args:
        model: The quantizer.
        repo_id: Where to, such as "org/name"; created if it does not exist.
        card: The card. Default: one that a person has edited, on the Hub or beside the checkpoint, is kept;
            otherwise it is generated.
        replace_card: Generate the card also in place of an edited one.
        include_code: Add the code, so that `AutoModel.from_pretrained(repo_id, trust_remote_code=True)` works where
            this package is not installed.
        commit_message: Default "Upload quantizer".
        commit_description: Its longer text.
        private: Make a new repository private.
        token: Hub token, default the stored one.
        revision: Branch; created if it does not exist.
        create_pr: Open a pull request instead of committing.
        max_shard_size: Unused: quantizers are small, and are one file.
        tags: Added to those of a generated card.
        license: The card's licence, such as "cc-by-nc-4.0"; give it with every push. Default: that of an edited card;
            of a generated one "apache-2.0" if notes on its training say that it began anew, or from a bundled
            quantizer, and else none.

    Raises:
        ValueError: If the model was never initialised.
        OSError: If the Hub cannot be reached.

    Example:
    ```python
    from rqmoe_hf import RQMoEModel, load_quantizer

    load_quantizer("minilm-384-32-bytes").push_to_hub("org/minilm-384-32-bytes")
    quantizer = RQMoEModel.from_pretrained("org/minilm-384-32-bytes")
    ```
    """
    model._require_initialized("be pushed")
    api = HfApi(token=token)
    repo_id = make_repository(api, repo_id, "model", private, revision)
    if card is None and not replace_card:
        card = _remote_card(api, repo_id, revision)
    with TemporaryDirectory() as folder:
        write_repository(model, folder, repo_id, card, replace_card, include_code, tags, license, token)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload quantizer",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[*REPLACED, RECORD_FILE, *COMPANIONS],
        )


def make_repository(api: HfApi, repo_id: str, repo_type: str, private: bool | None, revision: str | None) -> str:
    """Creates a repository and a branch of it where there is none yet; the repository's whole id."""
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    return repo_id


def write_repository(
    model: RQMoEModel,
    folder: str | Path,
    model_id: str,
    card: ModelCard | None = None,
    replace_card: bool = False,
    include_code: bool = False,
    tags: list[str] | None = None,
    license: str | None = None,
    token: bool | str | None = None,
) -> None:
    """Writes what [`push_quantizer`] sends into a folder; see there."""
    folder, source = Path(folder), Path(model.name_or_path or "-")
    texts = _beside(model, token)
    record = EvaluationRecord.from_json(texts.pop(RECORD_FILE)) if RECORD_FILE in texts else None
    if record is not None and record.weights != weights_checksum(model):
        logger.warning(
            "The %s beside %s was measured with other weights; it and the notes on their training are left out. Save "
            "the model to a folder, measure it with `rqmoe evaluate --save` and push that.",
            RECORD_FILE,
            model.name_or_path,
        )
        record, texts = None, {}
    if model.config.base_model and hub_id(model.config.base_model) is None:
        logger.warning("config.base_model is %s: name the encoder by its Hub id.", model.config.base_model)
    training = json.loads(texts[TRAINING_FILE]) if TRAINING_FILE in texts else None
    if record is not None:
        texts |= {RECORD_FILE: record.to_json(), **eval_results_files(record)}
    if card is None and not replace_card and (source / "README.md").is_file():
        found = (source / "README.md").read_text("utf-8")
        card = None if is_generated(found) else ModelCard(found)
    if card is None:
        data = RQMoECardData.from_model(model, record, Path(model_id).name, training, license=license)
        data.tags = [*(data.tags or []), *(tag for tag in tags or [] if tag not in (data.tags or []))]
        card = render_card(model, model_id, record, training, data, include_code)
    elif license is not None:
        card = ModelCard(str(card))
        card.data["license"] = license
    texts["README.md"] = str(card)
    save_whole(model, folder, texts, half_size=_fits_bfloat16(model))
    if include_code:
        _add_code(model, folder)


def _beside(model: RQMoEModel, token: bool | str | None) -> dict[str, str]:
    """The evaluation and the companions of the checkpoint that a model was loaded from, name to text.

    That the Hub cannot be reached is raised: a push would go without what lies there.
    """
    source, names, texts = model.name_or_path or "-", (RECORD_FILE, *COMPANIONS), {}
    if Path(source).is_dir():
        return {name: Path(source, name).read_text("utf-8") for name in names if Path(source, name).is_file()}
    if model.commit_hash is None:  # it did not come from the Hub: the folder is gone
        return {}
    try:
        for name in names:
            with suppress(RemoteEntryNotFoundError):
                file = hf_hub_download(source, name, revision=model.commit_hash, token=token)
                texts[name] = Path(file).read_text("utf-8")
    except (RepositoryNotFoundError, RevisionNotFoundError):
        logger.warning(
            "%s at revision %s, where the quantizer comes from, cannot be read: it goes without evaluation and notes "
            "on its training. Give a token that may read it, or push from a folder that has them.",
            source,
            model.commit_hash,
        )
    return texts


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """The card on the Hub if a person has edited it."""
    try:
        content = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text("utf-8")
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    if is_generated(content):
        return None
    logger.warning("%s has a card of its own, which is kept; replace_card=True generates a new one.", repo_id)
    return ModelCard(content)


def _fits_bfloat16(model: RQMoEModel) -> bool:
    """Whether half the bytes hold the same weights."""
    return all(bool((weight == weight.to(torch.bfloat16)).all()) for weight in model.parameters())


def _add_code(model: RQMoEModel, folder: Path) -> None:
    """Copies the files that define the model, and tells AutoModel about them.

    Not through `register_for_auto_class`, which would make every later save in this process do the same.
    """
    custom_object_save(model, folder)
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n", "utf-8")
