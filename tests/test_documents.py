"""What users read runs as written: README, model cards, notebooks."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("model_cards/*/README.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_snippets_run(document, encoder):
    snippets = re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        # The one change: the Hub id of the encoder becomes the folder of the same encoder.
        code = snippet.replace("sentence-transformers/all-MiniLM-L6-v2", encoder)
        scope: dict = {}
        exec(compile(code, str(document), "exec"), scope)
        assert scope["restored"].shape == (2, 384)


def test_the_first_snippet_is_short():
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert snippet[1].count("\n") <= 8


def test_tables_are_those_of_the_results_files():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(notebook, tmp_path):
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
