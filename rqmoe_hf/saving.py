"""Writing a checkpoint so that it is whole or not there."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from .modeling_rqmoe import RQMoEModel


def save_whole(model: RQMoEModel, folder: str | os.PathLike, files: dict[str, str] | None = None) -> None:
    """Saves a model, and text files beside it, through a temporary folder; config.json appears last.

    Args:
        model: The model.
        folder: Where to; existing files of the same names are replaced.
        files: Further files, name to text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        model.save_pretrained(scratch)
        for name, text in (files or {}).items():
            (Path(scratch) / name).write_text(text, "utf-8")
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
