"""Codes as a data set on the Hub: parquet shards that say which quantizer made them."""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..bundled import bundled_name
from ..codes import bytes_per_vector
from ..data.jobs import CODES_METADATA, check_quantizer, codes_info
from ..data.shards import fixed_size_column
from ..data.sources import load_table
from ..modeling_rqmoe import RQMoEModel
from ..saving import maker_record
from .cards import TEMPLATES, is_generated, sealed
from .push import make_repository

SHARD_ROWS = 1_000_000


def push_codes_to_hub(
    codes: np.ndarray | str | os.PathLike,
    repo_id: str,
    quantizer: RQMoEModel,
    *,
    ids: list | np.ndarray | None = None,
    num_codebooks: int | None = None,
    config_name: str | None = None,
    quantizer_id: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Sends codes to a data set repository, in one commit.

    Args:
        codes: Packed codes, uint8 `(n, bytes)`, or the folder of `rqmoe compress`.
        repo_id: Where to, such as "org/my-texts-codes"; created if it does not exist.
        quantizer: The quantizer that made the codes. Its id and revision are recorded, so push it first.
        ids: What the codes belong to, n integers or strings. A folder brings its own.
        num_codebooks: Codes per vector if they are a prefix; a folder knows.
        config_name: Name of the configuration, default one per rate such as "12x1024". One of the same name is
            replaced, others stay.
        quantizer_id: Hub id of the quantizer, if it was loaded from a folder.
        private: Make a new repository private.
        token: Hub token.
        revision: Branch; created if it does not exist.
        commit_message: Default "Upload codes".

    Raises:
        ValueError: If the codes are not this quantizer's, or nothing says how others can load it.

    Example:
    ```python
    import numpy as np
    from rqmoe_hf import load_quantizer
    from rqmoe_hf.hub import load_codes, push_codes_to_hub

    quantizer = load_quantizer("minilm-384-32-bytes")
    embeddings = np.random.default_rng(0).normal(size=(100, 384)).astype("float32")
    push_codes_to_hub(quantizer.compress(embeddings), "org/my-texts", quantizer, ids=np.arange(100))
    codes = load_codes("org/my-texts", quantizer)[:]["codes"]  # uint8 (100, 32)
    ```
    """
    table, info = _table(codes, ids, quantizer, num_codebooks, quantizer_id)
    name = config_name or f"{info['num_codebooks']}x{np.max(info['codebook_size'])}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"config_name must be letters, digits, '_', '-' and '.', got {name!r}.")
    api = HfApi(token=token)
    repo_id = make_repository(api, repo_id, "dataset", private, revision)
    with TemporaryDirectory() as folder:
        _write_shards(Path(folder) / name, table, info)
        records = {key: record for key, record in _records(api, repo_id, revision).items() if key != name}
        records[name] = _described(info, len(table))
        card = _card(api, repo_id, revision, records, "id" in table.column_names)
        (Path(folder) / "README.md").write_text(str(card), "utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload codes",
            delete_patterns=f"{name}/*",
        )


def load_codes(
    source: str | os.PathLike,
    quantizer: RQMoEModel,
    config_name: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Dataset:
    """Loads codes from the Hub or from the folder of `rqmoe compress`.

    Args:
        source: Data set id, or folder.
        quantizer: The quantizer they shall be decoded with.
        config_name: Configuration, such as "12x1024"; needed if there are several.
        revision: Branch, tag or commit.
        token: Hub token.

    Returns:
        A data set with the column `codes`, uint8 arrays, and `id` if there is one.

    Raises:
        ValueError: If another quantizer made the codes.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), repo_type="dataset", revision=revision, token=token,
                                        allow_patterns=f"{config_name or '*'}/*.parquet"))  # fmt: skip
        found = sorted({file.parent.name for file in folder.glob("*/*.parquet")})
        if config_name not in found and (config_name is not None or len(found) != 1):
            names = ", ".join(_shards(HfApi(token=token), str(source), revision)) or "none"
            raise ValueError(f"Give one of the configurations of {source}, which are {names}; got {config_name!r}.")
        folder = folder / (config_name or found[0])
    info = codes_info(folder)
    check_quantizer(info, quantizer, folder)
    dataset: Any = load_table(folder)
    return dataset.with_format("numpy", columns=["codes"], dtype=np.uint8, output_all_columns=True)


def _table(
    codes, ids, quantizer: RQMoEModel, num_codebooks: int | None, quantizer_id: str | None
) -> tuple[pa.Table, dict[str, Any]]:
    """The codes and ids as one Arrow table, and what is recorded of their quantizer."""
    if isinstance(codes, (str, os.PathLike)):
        found = codes_info(codes)
        check_quantizer(found, quantizer, codes)
        steps = found["num_codebooks"]
        table = load_table(codes).with_format("arrow")[:]  # type: ignore[index]
        table = table.select([name for name in ("id", "codes") if name in table.column_names])
    else:
        steps = quantizer._packed_steps(codes, num_codebooks)
        columns = {} if ids is None else {"id": pa.array(ids)}
        if ids is not None and len(columns["id"]) != len(codes):
            raise ValueError(f"There are {len(columns['id'])} ids for {len(codes)} codes: give one each.")
        table = pa.table(columns | {"codes": fixed_size_column(codes)})
    return table, maker_record(quantizer, steps) | origin(quantizer, quantizer_id)


def _write_shards(folder: Path, table: pa.Table, info: dict[str, Any]) -> None:
    """Parquet files that say in their metadata which quantizer the codes belong to."""
    folder.mkdir()
    parts = -(-len(table) // SHARD_ROWS)
    for part in range(parts):
        rows = table.slice(part * SHARD_ROWS, SHARD_ROWS)
        rows = rows.replace_schema_metadata({CODES_METADATA: json.dumps(info).encode()})
        pq.write_table(rows, folder / f"train-{part:05d}-of-{parts:05d}.parquet", compression="zstd")


def _described(info: dict[str, Any], rows: int) -> dict[str, Any]:
    width = bytes_per_vector(info["num_codebooks"], info["codebook_size"])
    return info | {"rows": rows, "bytes_per_vector": width}


def origin(quantizer: RQMoEModel, quantizer_id: str | None) -> dict[str, str | None]:
    """Id and revision by which others can load the quantizer."""
    source = quantizer.name_or_path
    name = quantizer_id or bundled_name(source) or (source if source and not Path(source).is_dir() else None)
    if name is None:
        raise ValueError(
            f"Nobody else could decode these codes: the quantizer comes from {source or 'this process'}. Push it with "
            "push_to_hub and give its id as quantizer_id."
        )
    # The commit is one of the repository that the quantizer was loaded from; in another there is none of that name.
    return {"model": name, "revision": quantizer.commit_hash if name == source else None}


def _shards(api: HfApi, repo_id: str, revision: str | None) -> dict[str, list[str]]:
    """The parquet files of each configuration."""
    shards: dict[str, list[str]] = {}
    for file in api.list_repo_files(repo_id, repo_type="dataset", revision=revision):
        if file.endswith(".parquet"):
            shards.setdefault(file.split("/")[0], []).append(file)
    return shards


def _records(api: HfApi, repo_id: str, revision: str | None) -> dict[str, dict[str, Any]]:
    """What stands in the data set so far, by configuration; only the footers of the files are read."""
    files = HfFileSystem(endpoint=api.endpoint, token=api.token)
    files.invalidate_cache()  # one instance serves the whole process, and lists what stood there before earlier pushes
    files.invalidate_cache()  # one instance serves the whole process, and lists what stood there before earlier pushes
    root = f"datasets/{repo_id}@{quote(revision or 'main', safe='')}"
    records = {}
    for name, shards in _shards(api, repo_id, revision).items():
        rows = 0
        for shard in shards:
            with files.open(f"{root}/{shard}") as file:
                footer = pq.read_metadata(file)
            rows += footer.num_rows
        info = json.loads((footer.metadata or {}).get(CODES_METADATA, b"{}"))
        if info:
            records[name] = _described(info, rows)
    return records


def _card(api: HfApi, repo_id: str, revision: str | None, records: dict[str, dict], ids: bool) -> DatasetCard:
    """The data set's card: configurations in its metadata; an edited text is kept, as are configurations of others."""
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in records]
    data = DatasetCardData(tags=["rqmoe", "embedding-compression"], configs=configs)
    try:
        found = Path(api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision))
        kept = DatasetCard(found.read_text("utf-8"))
        if not is_generated(str(kept)):
            own = [entry for entry in kept.data.get("configs") or [] if entry.get("config_name") not in records]
            kept.data["configs"] = configs + own
            return kept
    except EntryNotFoundError:
        pass
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATES / "codes.md"),
        repo_id=repo_id,
        config_names=list(records),
        records=list(records.items()),
        ids=ids,
        hidden_size=records[next(reversed(records))].get("hidden_size"),
    )
    return DatasetCard(sealed(card.content))
