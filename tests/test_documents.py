"""What users read runs as written: README, model cards, docstrings. Notebooks are in test_notebooks.py."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("model_cards/*/README.md"))]
PAGES = sorted(file for folder in (".", "docs", "benchmarks") for file in (ROOT / folder).glob("*.md"))
SNIPPET = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


@pytest.fixture(scope="session")
def mpnet(hub, encoder, tmp_path_factory):
    """Gives the Hub an encoder of 768 dimensions under mpnet's name: MiniLM and a matrix. mpnet has 400 MB."""
    folder = tmp_path_factory.mktemp("mpnet")
    SentenceTransformer(modules=[*SentenceTransformer(encoder, device="cpu").children(), Dense(384, 768)]).save(
        str(folder)
    )
    hub.put_folder("sentence-transformers/all-mpnet-base-v2", folder)


@pytest.mark.usefixtures("mpnet")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_snippets_run_word_for_word(document, client):
    snippets = SNIPPET.findall(document.read_text("utf-8"))
    assert snippets
    separate = (
        "\nassert 'restored' not in dir() or restored.shape in ((2, 384), (2, 768))"
        "\nfor name in [n for n in dir() if n[0] != '_']: del globals()[name]\n"
    )
    client(separate.join([*snippets, ""]))


def test_the_examples_of_docstrings_run_word_for_word(client):
    examples = []
    for file in sorted((ROOT / "rqmoe_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                examples += SNIPPET.findall((ast.get_docstring(node) or "") + "\n")
    assert len(examples) >= 4
    client("\n".join(examples))


def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text("utf-8"))
    for path, anchor in links:
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_first_snippet_is_short():
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert snippet[1].count("\n") <= 8


def test_tables_are_those_of_the_results_files():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
