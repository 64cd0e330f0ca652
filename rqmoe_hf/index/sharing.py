"""Collections on the Hub: a data set repository that holds the folder, and says which quantizer made the codes."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..hub.cards import is_generated, sealed
from ..hub.codes import origin
from .storage import DATABASE, LOCK, MANIFEST, IndexFolder

if TYPE_CHECKING:
    from .index import RQMoEIndex

TEMPLATE = Path(__file__).parent / "card.md"
SNAPSHOTS = "scan-*.safetensors"


def push_index(
    index: "RQMoEIndex",
    repo_id: str,
    quantizer_id: str | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    commit_message: str | None,
) -> CommitInfo:
    """Sends a collection to the Hub in one commit; the arguments are those of `RQMoEIndex.push_to_hub`."""
    made_by = index.settings["quantizer"] | origin(index.quantizer, quantizer_id)
    settings = index.settings | {"quantizer": made_by}
    if settings["encoder"] is not None and Path(settings["encoder"]).exists():  # a folder here says nothing elsewhere
        settings["encoder"] = None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        index._copied(IndexFolder(folder), settings).close()
        card = _card(api, repo_id, revision, settings, len(index), index._intake.code_bytes)
        (folder / "README.md").write_text(str(card), "utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload index",
            ignore_patterns=LOCK,
            delete_patterns=SNAPSHOTS,
        )


def download_index(
    repo_id: str, revision: str | None, token: bool | str | None, folder: str | os.PathLike | None
) -> Path:
    """Downloads a collection; its place in the cache, or the folder that gets a copy.

    Raises:
        ValueError: If the repository holds none, or the folder holds one already.
    """
    patterns = [MANIFEST, DATABASE, SNAPSHOTS]
    cached = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token,
                                    allow_patterns=patterns))  # fmt: skip
    if not (cached / MANIFEST).is_file():
        raise ValueError(f"{repo_id} on the Hub holds no index: it has no {MANIFEST}.")
    if folder is None:
        return cached
    target = IndexFolder(folder)
    target.begin()
    try:
        for file in sorted(cached.iterdir(), key=lambda file: file.name == MANIFEST):
            if any(file.match(pattern) for pattern in patterns):
                shutil.copyfile(file, target.path / file.name)
    finally:
        target.release()
    return target.path


def _card(
    api: HfApi, repo_id: str, revision: str | None, settings: dict[str, Any], count: int, code_bytes: int
) -> DatasetCard:
    """The card; one that a person has edited is kept."""
    try:
        found = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)
        kept = DatasetCard(Path(found).read_text("utf-8"))
        if not is_generated(str(kept)):
            return kept
    except EntryNotFoundError:
        pass
    card = DatasetCard.from_template(
        DatasetCardData(tags=["rqmoe", "embedding-compression"]),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        settings=settings,
        count=count,
        code_bytes=code_bytes,
    )
    return DatasetCard(sealed(card.content))
