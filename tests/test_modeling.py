"""The transformers side: saving, loading, dtypes, losses, refusals."""

import json
from functools import partial

import naive
import numpy as np
import pytest
import torch
from conftest import MEMBERS, randomize
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from rqmoe_hf import RQMoEConfig, RQMoEModel, load_quantizer, pack_codes
from rqmoe_hf.data import compress_shards, decompress_shards
from rqmoe_hf.saving import round_weights, save_whole


def test_saving_and_loading_is_exact(model, vectors, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, RQMoEModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RQMoEConfig)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert torch.equal(loaded.encode(vectors).codes, model.encode(vectors).codes)
    assert torch.equal(loaded.encode(vectors).reconstruction, model.encode(vectors).reconstruction)


def test_half_size_files_load_as_the_rounded_float32_model(paper_model, vectors, tmp_path):
    save_whole(paper_model, tmp_path / "whole")
    round_weights(paper_model)
    save_whole(paper_model, tmp_path / "half", half_size=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = RQMoEModel.from_pretrained(tmp_path / "half")
    for name, tensor in paper_model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.encode(vectors).codes, paper_model.encode(vectors).codes)


def test_bfloat16_keeps_codewords_and_statistics_in_float32(paper_model, vectors, tmp_path):
    paper_model.save_pretrained(tmp_path)
    loaded = RQMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.experts.up_proj.dtype == torch.bfloat16
    assert {loaded.mean.dtype, loaded.scale.dtype, loaded.codebooks.dtype} == {torch.float32}
    expected = (vectors - paper_model.encode(vectors).reconstruction).square().mean()
    output = loaded.encode(vectors)
    assert output.reconstruction.dtype == torch.float32
    assert (vectors - output.reconstruction).square().mean() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_with_experts_of_16_bits_trains_too(model, vectors, tmp_path, dtype):
    """The loss and its gradient are those of float32, up to rounding."""
    model.save_pretrained(tmp_path)
    loaded, expected = RQMoEModel.from_pretrained(tmp_path, dtype=dtype), model(vectors)
    found = loaded.eval()(vectors)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    expected.loss.backward()
    found.loss.backward()
    first, second = (one.codebooks.grad.flatten() for one in (loaded, model))
    assert torch.cosine_similarity(first, second, dim=0) > 0.97


def test_a_model_in_float64_gives_the_codes_of_float32(model, vectors):
    expected = model.encode(vectors)
    loss = model(vectors).loss.item()
    found = model.double().encode(vectors)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction)
    assert model(vectors).loss.item() == pytest.approx(loss, rel=1e-5)


def test_codes_of_rounded_experts_belong_to_the_same_quantizer(paper_model, clustered, tmp_path):
    paper_model.save_pretrained(tmp_path / "model")
    exact, rounded = (load_quantizer(str(tmp_path / "model"), dtype) for dtype in ("float32", "bfloat16"))
    assert not torch.equal(exact.experts.up_proj, rounded.experts.up_proj.float())
    np.save(tmp_path / "vectors.npy", clustered[:100])
    compress_shards(tmp_path / "vectors.npy", tmp_path / "codes", rounded)
    decompress_shards(tmp_path / "codes", tmp_path / "restored", exact)
    rounded.codebooks.data += 1.0  # another quantizer now
    with pytest.raises(ValueError, match="codes were made by"):
        decompress_shards(tmp_path / "codes", tmp_path / "other", rounded)


def test_a_prefix_can_be_trained(model, vectors):
    output = model(vectors, num_codebooks=2)
    found = model.encode(vectors, num_codebooks=2)
    assert torch.equal(output.codes, found.codes) and output.step_errors.shape == (2,)
    torch.testing.assert_close(output.reconstruction, found.reconstruction)


def test_copies_within_one_process_are_refused(paper_model):
    """nn.DataParallel's copies have no parameters: what the engine builds its tables from."""
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        paper_model._replicate_for_data_parallel()


@pytest.mark.parametrize("rounds", [0, 3])
def test_devices_without_float64_get_codes_without_it(model, vectors, monkeypatch, rounds):
    """MPS refuses float64, for which the processor stands here. These vectors have no near ties."""
    expected = model.encode(vectors, local_search=rounds).codes
    monkeypatch.setattr("rqmoe_hf.blocks_rqmoe.WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr("rqmoe_hf.local_search_rqmoe.can_sweep", lambda *_: False)  # compiled for processors alone
    monkeypatch.setattr(torch.Tensor, "double", lambda _: pytest.fail("float64"))
    model._tables.clear()
    assert torch.equal(model.encode(vectors, local_search=rounds).codes, expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(paper_model, vectors, tmp_path, device_map):
    paper_model.save_pretrained(tmp_path)
    loaded = RQMoEModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded.encode(vectors).codes.cpu(), paper_model.encode(vectors).codes)


def test_outputs_can_be_tuples(paper_model, vectors):
    codes, reconstruction = paper_model.encode(vectors, return_dict=False)
    assert codes.dtype == torch.long
    assert codes.shape == (300, 4)
    assert torch.equal(paper_model.decode(codes, return_dict=False)[0], paper_model.decode(codes).reconstruction)
    torch.testing.assert_close(paper_model.decode(codes).reconstruction, reconstruction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["normalized_residual", "per_step", "last_step"])
def test_losses_are_those_of_the_equations(vectors, loss):
    config = RQMoEConfig(**{**MEMBERS["paper"].to_dict(), "training_loss": loss})
    model = randomize(RQMoEModel(config))
    output = model(vectors)
    target = ((vectors - model.mean) / model.scale).double()
    errors = (target[:, None] - naive.partial_sums(model, output.codes)).square().sum(-1)
    if loss == "normalized_residual":
        before = torch.cat([target.square().sum(-1, keepdim=True), errors[:, :-1]], dim=1)
        expected = sum(torch.log(1 + errors[:, m] / (before[:, m] + 1e-6)).mean() for m in range(4))
    elif loss == "per_step":
        expected = errors.mean(0).sum() / 16
    else:
        expected = errors[:, -1].mean() / 16
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(output.step_errors, errors.mean(0) * model.scale.double() ** 2, rtol=1e-4)
    assert model(vectors, return_loss=False).loss is None


def test_gradients_are_those_of_finite_differences(model, vectors):
    """Every parameter gets the gradient of the loss at fixed codes."""
    model.double()
    model.train()
    codes = torch.randint(0, 20, (50, 4), generator=torch.Generator().manual_seed(0))
    target = vectors[:50].double()

    def loss() -> torch.Tensor:
        partial = model.contributions(codes).cumsum(dim=1)
        return model._loss(target, (target[:, None] - partial).square().sum(-1))

    loss().backward()
    for name, weight in model.named_parameters():
        flat, gradient = weight.data.view(-1), weight.grad.view(-1)
        position = int(gradient.abs().argmax())
        assert gradient[position] != 0, name
        model.config.training_loss = "per_step"  # the normalised loss detaches its denominators
        weight.grad = None
        loss().backward()
        analytic, step = weight.grad.view(-1)[position].item(), 1e-6
        flat[position] += step
        upper = loss().item()
        flat[position] -= 2 * step
        lower = loss().item()
        flat[position] += step
        assert analytic == pytest.approx((upper - lower) / (2 * step), rel=1e-4), name


def test_a_new_model_starts_as_its_codebooks(vectors):
    for name, config in MEMBERS.items():
        model = RQMoEModel(config)
        model.scale.fill_(1.0)
        codes = torch.randint(0, 20, (30, 4))
        plain = model.codebooks[torch.arange(4), codes].sum(dim=1)
        torch.testing.assert_close(model.decode(codes).reconstruction, plain.detach(), atol=1e-5, rtol=1e-5, msg=name)


def test_a_model_without_data_refuses(vectors, tmp_path):
    model = RQMoEModel(MEMBERS["paper"])
    for call in (model.encode, model):
        with pytest.raises(ValueError, match="never initialised.*rqmoe train"):
            call(vectors)
    with pytest.raises(ValueError, match="never initialised"):
        model.decode(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.randn(3, 15), r"shape \(n, 16\), n >= 1, got \(3, 15\)"),
        (torch.randn(16), r"Reshape a single vector"),
        (torch.empty(0, 16), r"got \(0, 16\)"),
        (torch.ones(3, 16, dtype=torch.int8), "floating point embeddings, got .*int8"),
        (torch.full((3, 16), float("nan")), "row 0 of those given holds NaN"),
        (torch.tensor([[0.0] * 16, [float("inf")] * 16]), "row 1 of those given"),
    ],
)
def test_encode_refuses_bad_embeddings(paper_model, embeddings, message):
    for call in (paper_model.encode, paper_model, lambda x: paper_model.compress(x.numpy())):
        with pytest.raises(ValueError, match=message):
            call(embeddings)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((2, 4), 20), "between 0 and 19.*got 20 to 20"),
        (torch.full((2, 4), -1), "between 0 and 19"),
        (torch.zeros(2, 5, dtype=torch.long), r"\(n, 4\).*got \(2, 5\)"),
        (torch.zeros(2, 4), "integer codes, got float32"),
        (torch.zeros(0, 4, dtype=torch.long), r"got \(0, 4\)"),
    ],
)
def test_decode_refuses_bad_codes(paper_model, codes, message):
    with pytest.raises(ValueError, match=message):
        paper_model.decode(codes)


def test_compress_names_the_row_of_all_that_were_given(paper_model, vectors):
    array = vectors.numpy().copy()
    array[[207, 290], 3] = np.nan
    with pytest.raises(ValueError, match="row 207 of those given"):
        paper_model.compress(array, batch_size=50)


def test_encode_and_decode_take_arrays(paper_model, vectors):
    expected = paper_model.encode(vectors)
    assert torch.equal(paper_model.encode(vectors.numpy()).codes, expected.codes)
    for kind in (np.uint8, np.uint16, np.int64):
        codes = expected.codes.numpy().astype(kind)
        assert torch.equal(paper_model.decode(codes).reconstruction, paper_model.decode(expected.codes).reconstruction)
    with pytest.raises(ValueError, match="integer codes, got float32"):
        paper_model.decode(np.zeros((2, 4), np.float32))


def test_decompress_refuses_what_are_no_packed_codes(paper_model):
    for codes in (
        np.zeros((2, 9), np.uint8),
        np.zeros((2, 3), np.int64),
        np.zeros(3, np.uint8),
        np.zeros((0, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"packed codes, uint8 \(n, 3\)"):
            paper_model.decompress(codes)
    with pytest.raises(ValueError, match="between 0 and 19"):
        paper_model.decompress(np.full((2, 3), 255, np.uint8))


def test_compress_is_packed_encode(paper_model, vectors):
    array = vectors.numpy()
    packed = paper_model.compress(array, batch_size=37)
    codes = paper_model.encode(vectors).codes
    assert np.array_equal(packed, pack_codes(codes.numpy(), 20))
    prefix = paper_model.compress(array, num_codebooks=2)
    expected = paper_model.encode(vectors, num_codebooks=2)
    assert np.array_equal(prefix, pack_codes(expected.codes.numpy(), 20))
    np.testing.assert_allclose(paper_model.decompress(prefix, num_codebooks=2), expected.reconstruction, atol=1e-5)
    with pytest.raises(ValueError, match="2 bytes may hold 2 to 3 codes: give num_codebooks"):
        paper_model.decompress(prefix)


@pytest.mark.parametrize(
    "wrong",
    [
        {"codebook_size": 1},
        {"codebook_size": 65537},
        {"num_codebooks": 0},
        {"num_codebooks": "8"},
        {"gate": "none", "num_experts": 2},
        {"gate": "softmax"},
        {"conditioning": "reconstruction", "instruction_size": 3},
        {"dropout": 1.0},
        {"num_experts": -1},
    ],
)
def test_config_refuses_what_makes_no_model(wrong):
    with pytest.raises(StrictDataclassError):
        RQMoEConfig(**wrong)


def test_search_arguments_are_checked(paper_model, vectors):
    for wrong in ({"num_codebooks": 5}, {"num_codebooks": 0}, {"beam_size": 0}, {"num_candidates": 0}):
        with pytest.raises(ValueError, match="|".join(wrong)):
            paper_model.encode(vectors, **wrong)


def test_config_json_is_plain(tmp_path):
    MEMBERS["official"].save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "rqmoe"
    assert "bytes_per_vector" not in content


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_broken_checkpoint_is_refused(paper_model, tmp_path, damage):
    paper_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        from safetensors.torch import save_file

        save_file({"encoder.layer.0.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="damaged|do not belong"):
        RQMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_a_device_lacks_is_no_damage(paper_model, tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error("PyTorch is not linked with support for mps devices")

    paper_model.save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", load)
    with pytest.raises(error, match="^PyTorch is not linked"):
        RQMoEModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_some_weights_is_refused(paper_model, tmp_path):
    paper_model.save_pretrained(tmp_path, state_dict={"codebooks": paper_model.codebooks, "scale": paper_model.scale})
    with pytest.raises(ValueError, match="missing keys: .*experts"):
        AutoModel.from_pretrained(tmp_path)


def test_training_keeps_nothing_of_the_search(model, vectors, monkeypatch):
    """What is kept for the gradient is of the codes found, however many others were looked at."""
    kept = []
    for search in ({"num_candidates": 1, "beam_size": 1}, {"num_candidates": 8, "beam_size": 8, "local_search": 2}):
        for name, value in search.items():
            monkeypatch.setattr(model.config, name, value)
        saved: list[int] = []
        keep = partial(lambda numbers, tensor: numbers.append(tensor.numel()), saved)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
            model.train()(vectors)
        kept.append(sum(saved))
    assert kept[0] == kept[1] > 0
