"""The folders of model_cards/ are complete Hub repositories: whole, consistent and small enough to travel."""

import json

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from transformers import AutoModel

from rqmoe_hf import RQMoEConfig, RQMoEModel, bundled_quantizers
from rqmoe_hf.hub import RQMoECardData
from rqmoe_hf.hub.cards import is_generated, render_card
from rqmoe_hf.record import load_record
from rqmoe_hf.saving import weights_checksum

FOLDERS = sorted(path for path in (ROOT / "model_cards").iterdir() if path.is_dir())

PREFIX = "to 9, or to fewer with a prefix of the codes: "
EVERYTHING = 525_232  # training vectors of minilm-384


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_it_is_bundled_loads_and_its_evaluation_is_of_these_weights(folder):
    assert bundled_quantizers()[folder.name] == folder
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, RQMoEModel) and model.is_initialized
    record = load_record(folder)
    assert record.weights == weights_checksum(model)
    assert [row["num_codebooks"] for row in record.reports] == list(range(1, model.config.num_codebooks + 1))
    assert record.comparison and record.preserved and record.texts


def test_it_has_everything_and_no_path_of_a_machine(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "evaluation.json", "training.json", "recipe.yaml",
            "training_log.json", ".eval_results/stsbenchmark-sts.yaml"} <= files  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size < 20 * 2**20
    for path in files - {"model.safetensors"}:
        text = (folder / path).read_text("utf-8")
        assert "/home/" not in text and "/tmp/" not in text and "/root/" not in text, path
    notes = json.loads((folder / "training.json").read_text("utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    assert (notes["vectors"], notes["epochs"]) == (recipe.get("limit", EVERYTHING), recipe.get("epochs"))


def test_its_card_says_what_the_hub_reads(folder):
    content = (folder / "README.md").read_text("utf-8")
    assert is_generated(content)
    card = ModelCard(content)
    data, config = card.data, RQMoEModel.from_pretrained(folder).config
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        config.base_model,
        "rqmoe_hf",
        "feature-extraction",
    )
    record = load_record(folder)
    results = {(result.task_name, result.metric_type): result.metric_value for result in data.eval_results}
    whole = f"Embedding compression to {config.bytes_per_vector} bytes"
    assert results[whole, "mse"] == pytest.approx(record.whole["mse"], rel=1e-3)
    for row in record.preserved:
        key = (f"{row['task']}, {row['bytes_per_vector']} bytes", row["metric"].lower())
        assert results[key] == pytest.approx(row["value"], rel=1e-3)
    for section in ("## Use it", "## Results", "## Training", "## Limits", "## Citation"):
        assert section in content
    assert f"| {config.num_codebooks} | {config.bytes_per_vector} | {record.whole['mse']:#.3g} |" in content


def test_card_data_can_be_given_and_extended():
    data = RQMoECardData(base_model="org/encoder", license="mit", datasets=["org/texts"])
    assert data.to_dict() == {
        "base_model": "org/encoder",
        "base_model_relation": "adapter",
        "datasets": ["org/texts"],
        "library_name": "rqmoe_hf",
        "license": "mit",
        "pipeline_tag": "feature-extraction",
        "tags": data.tags,
    }
    assert "rqmoe" in data.tags


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_experts": 1, "gate": "none", "local_search": 4}, PREFIX),
        ({"num_experts": 0}, PREFIX),
        ({"num_experts": 0, "local_search": 4}, "to 9: "),
        ({"num_experts": 0, "local_search": 4, "search_blocks": [9]}, "to 9: "),
        ({"num_experts": 0, "local_search": 4, "search_blocks": [1] * 9}, PREFIX),
        (
            {"num_experts": 0, "local_search": 4, "search_blocks": [1, 3, 5], "codebook_size": 4096},
            "to 14, or to 2 with the first code or 6 with the first 4 codes: ",
        ),
        ({"num_experts": 0, "num_codebooks": 1}, "to 1: "),
    ],
)
def test_a_card_says_to_what_vectors_can_be_cut(settings, said):
    card = render_card(RQMoEModel(RQMoEConfig(**{"hidden_size": 8, "num_codebooks": 9, **settings})), "org/model")
    assert f"(float32) {said}" in card.content
