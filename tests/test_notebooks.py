"""The notebooks run, and are stored with their outputs.

A file of its own: a file's tests run in one process, and these take as long as all of test_documents.py.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(notebook, tmp_path, hub, monkeypatch):
    for name, value in hub.environment(tmp_path / "home").items():  # the kernel is a process of its own
        monkeypatch.setenv(name, value)
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stored_with_their_outputs(notebook):
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "display_data" in {output.output_type for output in outputs}  # the plots
    assert "error" not in {output.output_type for output in outputs}
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not re.search(r"(?<![\w.])/(root|tmp|home|work|usr|Users)/|127\.0\.0\.1|python3\.\d+/", "\n".join(texts))
    assert f"(notebooks/{notebook.name})" in (ROOT / "README.md").read_text("utf-8")
