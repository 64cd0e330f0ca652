"""The sentence-transformers module on a real encoder."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize

from rqmoe_hf import RQMoEConfig, RQMoEModel, bundled_quantizers
from rqmoe_hf.st import RQMoELoss, RQMoEQuantizer
from rqmoe_hf.training import initialize

TEXTS = [
    "how do I read a csv file",
    "A cat sat on the mat.",
    "Return the sum of a start value and an iterable of numbers.",
    "Berlin is the capital of Germany.",
    "x",
    "The quick brown fox jumps over the lazy dog, and then over another one, until it is tired of jumping over dogs.",
]


@pytest.fixture(scope="module")
def plain(encoder) -> SentenceTransformer:
    return SentenceTransformer(encoder, device="cpu")


@pytest.fixture(scope="module")
def quantizer() -> RQMoEModel:
    return RQMoEModel.from_pretrained(bundled_quantizers()["minilm-384-8-bytes"]).eval()


@pytest.fixture(scope="module")
def combined(encoder) -> SentenceTransformer:
    model = SentenceTransformer(encoder, device="cpu")
    model.append(RQMoEQuantizer.from_pretrained("minilm-384-8-bytes"))
    return model


def test_tables_are_built_once(combined, monkeypatch):
    """Not by every call: sentence-transformers puts all modules in evaluation mode in each."""
    combined.encode(TEXTS[:1])

    def build(*_):
        raise AssertionError("built again")

    monkeypatch.setattr("rqmoe_hf.modeling_rqmoe.build_tables", build)
    monkeypatch.setattr("rqmoe_hf.local_search_rqmoe.build_pair_tables", build)
    combined.encode(TEXTS[:1])
    combined.encode(TEXTS, quantize="codes")


def test_encode_gives_reconstructions_and_codes(plain, quantizer, combined):
    exact = plain.encode(TEXTS)
    codes = combined.encode(TEXTS, quantize="codes")
    assert codes.dtype == np.uint8 and codes.shape == (len(TEXTS), 8)
    np.testing.assert_array_equal(codes, quantizer.compress(exact))
    restored = combined.encode(TEXTS)
    assert restored.dtype == np.float32
    decoded = quantizer.decompress(codes)
    np.testing.assert_allclose(restored, decoded / np.linalg.norm(decoded, axis=1, keepdims=True), atol=1e-5)
    raw = SentenceTransformer(modules=[*plain.children(), RQMoEQuantizer(quantizer, normalize=False)])
    np.testing.assert_allclose(raw.encode(TEXTS), decoded, atol=1e-5)
    assert (np.square(decoded - exact).sum(axis=1) < 0.6).all()
    np.testing.assert_array_equal(combined.encode(TEXTS, quantize="none"), exact)


def test_queries_stay_exact_unless_asked(plain, combined, quantizer):
    exact = plain.encode(TEXTS)
    np.testing.assert_array_equal(combined.encode_query(TEXTS), exact)
    np.testing.assert_array_equal(combined.encode_document(TEXTS), combined.encode(TEXTS))
    np.testing.assert_array_equal(combined.encode_query(TEXTS, quantize="codes"), quantizer.compress(exact))
    symmetric = SentenceTransformer(modules=[*plain.children(), RQMoEQuantizer(quantizer, asymmetric=False)])
    np.testing.assert_array_equal(symmetric.encode_query(TEXTS), symmetric.encode(TEXTS))


def test_search_settings_pass_through(plain, combined, quantizer, tmp_path):
    exact = plain.encode(TEXTS)
    settings = {"num_codebooks": 4, "num_candidates": 3, "beam_size": 2, "local_search": 2}
    codes = combined.encode(TEXTS, quantize="codes", **settings)
    np.testing.assert_array_equal(codes, quantizer.compress(exact, **settings))
    assert codes.shape[1] == 6
    shorter = SentenceTransformer(modules=[*plain.children(), RQMoEQuantizer(quantizer, num_codebooks=4)])
    np.testing.assert_array_equal(shorter.encode(TEXTS, quantize="codes"), quantizer.compress(exact, num_codebooks=4))
    last, features = shorter[-1], {"sentence_embedding": torch.from_numpy(exact)}
    trained_on, expected = (last.train(mode)({**features})["sentence_embedding"] for mode in (True, False))
    torch.testing.assert_close(trained_on, expected)  # the prefix that it will give
    shorter.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert again.encode(TEXTS, quantize="codes").shape[1] == 6
    with pytest.raises(ValueError, match="num_codebooks must lie between 1 and 6, got 7"):
        RQMoEQuantizer(quantizer, num_codebooks=7)


def test_ways_to_call(combined):
    codes = combined.encode(TEXTS, quantize="codes")
    tensor = combined.encode(TEXTS, quantize="codes", convert_to_tensor=True)
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), codes)
    np.testing.assert_array_equal(combined.encode(TEXTS[0], quantize="codes"), codes[0])
    np.testing.assert_array_equal(combined.encode(TEXTS, quantize="codes", device=["cpu", "cpu"]), codes)
    assert len(combined.encode([])) == 0


def test_a_text_gets_the_same_code_alone_and_among_others(combined, passages):
    texts = TEXTS + passages
    codes = combined.encode(texts, quantize="codes", batch_size=64)
    np.testing.assert_array_equal(combined.encode(texts, quantize="codes", batch_size=7), codes)
    for row in range(0, len(texts), 30):
        np.testing.assert_array_equal(combined.encode(texts[row], quantize="codes"), codes[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_quantizer_stays_float32_beside_a_half_precision_encoder(encoder, dtype, tmp_path):
    model = SentenceTransformer(encoder, device="cpu", model_kwargs={"dtype": dtype})
    model.append(RQMoEQuantizer.from_pretrained("minilm-384-8-bytes"))
    model.to(dtype)
    codes = model.encode(TEXTS, quantize="codes")
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True, model_kwargs={"dtype": dtype})
    for loaded in (model, again):
        assert next(loaded[0].parameters()).dtype == dtype
        assert {tensor.dtype for tensor in loaded[-1].state_dict().values()} == {torch.float32}
        assert loaded.encode(TEXTS).dtype == np.float32
    np.testing.assert_array_equal(again.encode(TEXTS, quantize="codes"), codes)


def test_a_saved_model_gives_the_same_codes_in_another_process(combined, tmp_path):
    combined.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    program = (
        "import json, numpy as np; from sentence_transformers import SentenceTransformer; "
        f"model = SentenceTransformer({str(tmp_path / 'model')!r}, device='cpu', trust_remote_code=True); "
        f"texts = json.load(open({str(tmp_path / 'texts.json')!r})); "
        f"np.save({str(tmp_path / 'codes.npy')!r}, model.encode(texts, quantize='codes'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), combined.encode(TEXTS, quantize="codes"))
    folder = next((tmp_path / "model").glob("*_RQMoEQuantizer"))
    assert RQMoEModel.from_pretrained(folder).config.num_codebooks == 6  # a plain checkpoint too


def test_bad_input_says_what_to_do(encoder, plain, combined):
    with pytest.raises(ValueError, match="quantize must be one of"):
        combined.encode(TEXTS, quantize="int8")
    with pytest.raises(ValueError, match="expects an RQMoEModel, got str"):
        RQMoEQuantizer("minilm-384-8-bytes")
    with pytest.raises(ValueError, match="must end with an RQMoEQuantizer"):
        RQMoELoss(plain)
    narrow = RQMoEQuantizer(RQMoEModel(RQMoEConfig(hidden_size=64, base_model="org/small")))
    model = SentenceTransformer(encoder, device="cpu")
    modules = len(model)
    with pytest.raises(ValueError, match=r"gives 384 dimensions, but .* 64 \(of org/small\)"):
        model.append(narrow)
    assert len(model) == modules
    with pytest.raises(ValueError, match=r"gives 384 dimensions, but .* 64 \(of org/small\)"):
        narrow({"sentence_embedding": torch.zeros(2, 384)})


def test_the_quantizer_comes_last(encoder, plain, quantizer):
    with pytest.raises(ValueError, match="must be the last module: Normalize after it would be given packed codes"):
        SentenceTransformer(modules=[*plain.children(), RQMoEQuantizer(quantizer), Normalize()])
    model = SentenceTransformer(encoder, device="cpu")
    model.append(RQMoEQuantizer(quantizer))
    with pytest.raises(ValueError, match="must be the last module"):
        model.append(Normalize())
    model[-1] = RQMoEQuantizer(quantizer, num_codebooks=4)  # replacing it is fine
    assert model.encode(TEXTS, quantize="codes").shape[1] == 6


def test_loading_with_a_device_map(combined, tmp_path):
    combined.save_pretrained(str(tmp_path))
    placed = SentenceTransformer(str(tmp_path), trust_remote_code=True, model_kwargs={"device_map": "cpu"})
    assert {tensor.device.type for tensor in placed[-1].state_dict().values()} == {"cpu"}
    np.testing.assert_array_equal(placed.encode(TEXTS, quantize="codes"), combined.encode(TEXTS, quantize="codes"))


def test_another_encoder_than_the_recorded_one_is_warned_of(encoder, quantizer, caplog):
    model = SentenceTransformer(encoder, device="cpu")
    model.model_card_data.base_model = "org/another-encoder"
    model.append(RQMoEQuantizer(quantizer))
    assert "all-MiniLM-L6-v2, but the encoder is org/another-encoder" in caplog.text


def test_the_saved_model_names_its_requirement_and_describes_itself(encoder, tmp_path):
    model = SentenceTransformer(encoder, device="cpu")
    model.save_pretrained(str(tmp_path / "plain"))
    model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    model.append(RQMoEQuantizer.from_pretrained("minilm-384-8-bytes"))
    model.save_pretrained(str(tmp_path / "combined"))
    config = json.loads((tmp_path / "combined" / "config_sentence_transformers.json").read_text("utf-8"))
    assert config["requirements"]["rqmoe-hf"]["specifier"] == ">=0.1"
    assert "RQMoEQuantizer" not in (tmp_path / "plain" / "README.md").read_text("utf-8")
    assert "RQMoEQuantizer" in (tmp_path / "combined" / "README.md").read_text("utf-8")


def trained(encoder: str, texts: list[str], folder, aware: bool) -> tuple[SentenceTransformer, RQMoEQuantizer]:
    model = SentenceTransformer(encoder, device="cpu")
    config = RQMoEConfig(num_codebooks=3, codebook_size=16, intermediate_size=16, instruction_size=8)
    module = RQMoEQuantizer(initialize(RQMoEModel(config), model.encode(texts[:64])))
    model.append(module)
    loss = RQMoELoss(model, MultipleNegativesRankingLoss(model) if aware else None)
    columns = {"anchor": texts, "positive": texts[::-1]} if aware else {"text": texts}
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=5 if aware else 30, per_device_train_batch_size=8 if aware else 16,
        learning_rate=1e-4 if aware else 3e-2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    return model.eval(), module


def test_training_moves_the_quantizer_and_not_a_frozen_encoder(encoder, plain, tmp_path, passages):
    passages = passages[:96]
    before = plain.encode(passages)
    start = initialize(
        RQMoEModel(RQMoEConfig(num_codebooks=3, codebook_size=16, intermediate_size=16, instruction_size=8)),
        before[:64],
    ).eval()
    model, _ = trained(encoder, passages, tmp_path, aware=False)
    np.testing.assert_array_equal(model.encode(passages, quantize="none"), before)

    def error(quantizer: RQMoEModel) -> float:
        return float(np.square(quantizer.decompress(quantizer.compress(before)) - before).sum(axis=1).mean())

    assert error(model[-1].model) < 0.97 * error(start)


def test_quantization_aware_training_reaches_the_encoder(encoder, plain, tmp_path, passages):
    passages = passages[:64]
    model, _ = trained(encoder, passages, tmp_path, aware=True)
    moved = np.abs(model.encode(passages, quantize="none") - plain.encode(passages)).max()
    assert np.isfinite(moved) and moved > 1e-4
