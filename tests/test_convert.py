"""Converters: foreign files in their documented layouts, and files that must be refused."""

import sys
import types
import zipfile

import faiss
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rqmoe_hf import RQMoEModel
from rqmoe_hf.convert import convert_faiss, convert_official, convert_qinco
from rqmoe_hf.convert.unpickle import load_pickle

SIZE, CODEWORDS, STEPS, EXPERTS, LAYERS, WIDTH = 12, 16, 3, 2, 2, 8


def official_state() -> dict[str, torch.Tensor]:
    """A state dict in the layout of the official code (sequence positions 0 and 3 are the two linear layers)."""
    torch.manual_seed(0)
    state = {"codebook0.weight": torch.randn(CODEWORDS, SIZE), "instruction0.weight": torch.randn(CODEWORDS, SIZE)}
    for m in range(1, STEPS):
        state[f"step{m}.codebook.weight"] = torch.randn(CODEWORDS, SIZE)
        state[f"step{m}.instruction.weight"] = torch.randn(CODEWORDS, SIZE)
        state[f"step{m}.MLPconcat.weight"] = torch.randn(SIZE, 2 * SIZE) * 0.3
        state[f"step{m}.MLPconcat.bias"] = torch.randn(SIZE) * 0.3
        state[f"step{m}.gate.0.weight"] = torch.randn(WIDTH, SIZE) * 0.5
        state[f"step{m}.gate.3.weight"] = torch.randn(EXPERTS, WIDTH) * 0.5
        for n in range(EXPERTS):
            for layer in range(LAYERS):
                state[f"step{m}.expert{n}.{layer}.0.weight"] = torch.randn(WIDTH, SIZE) * 0.3
                state[f"step{m}.expert{n}.{layer}.3.weight"] = torch.randn(SIZE, WIDTH) * 0.3
    return state


def official_encode(state: dict, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The official algorithm as published: all candidates through concat, gate and experts; no residual."""
    distances = torch.cdist(vectors, state["codebook0.weight"])
    codes = [distances.argmin(1)]
    reconstruction = state["codebook0.weight"][codes[0]]
    instruction = state["instruction0.weight"][codes[0]]
    for m in range(1, STEPS):
        codewords = state[f"step{m}.codebook.weight"].expand(len(vectors), -1, -1)
        z = torch.cat([codewords, instruction[:, None].expand_as(codewords)], dim=-1)
        z = F.linear(z, state[f"step{m}.MLPconcat.weight"], state[f"step{m}.MLPconcat.bias"])
        gate = F.linear(F.relu(F.linear(z, state[f"step{m}.gate.0.weight"])), state[f"step{m}.gate.3.weight"])
        outputs = []
        for n in range(EXPERTS):
            h = z
            for layer in range(LAYERS):
                up, down = (state[f"step{m}.expert{n}.{layer}.{part}.weight"] for part in (0, 3))
                h = h + F.linear(F.relu(F.linear(h, up)), down)
            outputs.append(h)
        deformed = (torch.stack(outputs, -1) * gate.softmax(-1)[..., None, :]).sum(-1)
        code = ((vectors - reconstruction)[:, None] - deformed).square().sum(-1).argmin(1)
        rows = torch.arange(len(vectors))
        reconstruction = reconstruction + deformed[rows, code]
        instruction = instruction + state[f"step{m}.instruction.weight"][code]
        codes.append(code)
    return torch.stack(codes, 1), reconstruction


class Scheduler:
    """Like the scheduler that the official checkpoint.pt pickles."""

    def __init__(self):
        self.best, self.history = 1.5, [3, 2]


def fake_module(monkeypatch, name: str, **classes) -> None:
    module = types.ModuleType(name)
    for label, cls in classes.items():
        cls.__module__, cls.__qualname__ = name, label
        setattr(module, label, cls)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", ["model.pt", "checkpoint.pt", "data parallel"])
def test_official_checkpoint(tmp_path, monkeypatch, kind):
    state, vectors = official_state(), torch.randn(200, SIZE)
    content = {"state_dict": state, "epoch": 3, "loss": 0.5, "best_loss": 0.4}
    if kind == "checkpoint.pt":
        fake_module(monkeypatch, "utils", Scheduler=Scheduler)
        content["scheduler"] = Scheduler()
    if kind == "data parallel":
        content["state_dict"] = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(content, tmp_path / "model.pt")
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    model = convert_official(tmp_path / "model.pt", scale=2.5)
    codes, reconstruction = official_encode(state, vectors)
    found = model.encode(vectors * 2.5, beam_size=1, exact=True)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.reconstruction, reconstruction * 2.5, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model.decode(codes).reconstruction, reconstruction * 2.5, atol=1e-4, rtol=1e-5)
    model.save_pretrained(tmp_path / "converted")
    again = RQMoEModel.from_pretrained(tmp_path / "converted")
    assert torch.equal(again.decode(codes).reconstruction, model.decode(codes).reconstruction)


class QINCoStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = nn.Embedding(CODEWORDS, SIZE)
        self.MLPconcat = nn.Linear(2 * SIZE, SIZE)
        for layer in range(LAYERS):
            block = nn.Sequential(nn.Linear(SIZE, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, SIZE, bias=False))
            self.add_module(f"residual_block{layer}", block)

    def decode(self, reconstruction: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        codeword = self.codebook(code)
        z = codeword + self.MLPconcat(torch.cat([codeword, reconstruction], -1))
        for layer in range(LAYERS):
            z = z + getattr(self, f"residual_block{layer}")(z)
        return z


class QINCo(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.K, self.L, self.M, self.h = SIZE, CODEWORDS, LAYERS, STEPS, WIDTH
        self.db_scale = np.float32(3.0)
        self.codebook0 = nn.Embedding(CODEWORDS, SIZE)
        for m in range(1, STEPS):
            self.add_module(f"step{m}", QINCoStep())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        reconstruction = self.codebook0(codes[:, 0])
        for m in range(1, STEPS):
            reconstruction = reconstruction + getattr(self, f"step{m}").decode(reconstruction, codes[:, m])
        return reconstruction * float(self.db_scale)


@pytest.fixture
def qinco(monkeypatch):
    fake_module(monkeypatch, "model_qinco", QINCo=QINCo, QINCoStep=QINCoStep)
    torch.manual_seed(0)
    return QINCo()


@pytest.mark.parametrize("zipped", [True, False])
def test_qinco_pickled_module(tmp_path, monkeypatch, qinco, zipped):
    codes = torch.randint(0, CODEWORDS, (200, STEPS))
    with torch.no_grad():
        expected = qinco.decode(codes)
    torch.save(qinco, tmp_path / "qinco.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "model_qinco")  # the converter must not need the project
    model = convert_qinco(tmp_path / "qinco.pt")
    torch.testing.assert_close(model.decode(codes).reconstruction, expected, atol=1e-5, rtol=1e-5)
    greedy = model.encode(expected, beam_size=1, exact=True).reconstruction
    assert (greedy - expected).square().sum(1).mean() < expected.square().sum(1).mean()


def test_qinco_dictionary(tmp_path, qinco):
    state = {"data_mean": torch.randn(SIZE), "data_std": torch.tensor(3.0)}
    state["steps.0.codebook.weight"] = qinco.codebook0.weight
    for m in range(1, STEPS):
        step = getattr(qinco, f"step{m}")
        state[f"steps.{m}.codebook.weight"] = step.codebook.weight
        state[f"steps.{m}.xtarget_mean"] = torch.zeros(SIZE)
        state[f"steps.{m}.concat.mlp.weight"] = step.MLPconcat.weight
        state[f"steps.{m}.concat.mlp.bias"] = step.MLPconcat.bias
        for layer in range(LAYERS):
            block = getattr(step, f"residual_block{layer}")
            state[f"steps.{m}.residual_blocks.{layer}.up_proj.weight"] = block[0].weight
            state[f"steps.{m}.residual_blocks.{layer}.down_proj.weight"] = block[2].weight
    parameters = {"K": CODEWORDS, "M": STEPS, "qinco1_mode": True, "ivf_in_use": False}
    torch.save({"epoch": 1, "model": state, "parameters": parameters, "data_dim": SIZE}, tmp_path / "qinco.pt")
    model = convert_qinco(tmp_path / "qinco.pt")
    codes = torch.randint(0, CODEWORDS, (200, STEPS))
    with torch.no_grad():
        expected = qinco.decode(codes) + state["data_mean"]
    torch.testing.assert_close(model.decode(codes).reconstruction, expected, atol=1e-5, rtol=1e-5)
    parameters["qinco1_mode"] = False
    torch.save({"model": state, "parameters": parameters}, tmp_path / "qinco2.pt")
    with pytest.raises(ValueError, match="QINCo2"):
        convert_qinco(tmp_path / "qinco2.pt")


def test_variants_of_qinco_are_refused(tmp_path, monkeypatch):
    class IVFQINCo(QINCo):
        pass

    fake_module(monkeypatch, "model_qinco", IVFQINCo=IVFQINCo, QINCoStep=QINCoStep)
    torch.save(IVFQINCo(), tmp_path / "ivf.pt")
    with pytest.raises(ValueError, match="holds IVFQINCo; only QINCo itself"):
        convert_qinco(tmp_path / "ivf.pt")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("converter", [convert_qinco, lambda path: convert_official(path, 1.0)])
def test_a_hostile_pickle_is_not_executed(tmp_path, zipped, converter):
    file, target = tmp_path / "model.pt", tmp_path / "executed"
    torch.save({"state_dict": official_state(), "x": Hostile(target)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"io\.open.*Nothing in it was executed"):
        converter(file)
    assert not target.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"ctorch.nn.modules.linear\ntorch.os.system\n(S'touch executed'\ntR.",
    ],
)
def test_raw_payloads_are_not_executed(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    try:
        loaded = load_pickle(tmp_path / "model.pt")
        assert type(loaded).__bases__[0].__name__ == "Inert"  # an inert object with that name is harmless
    except ValueError as error:
        assert "Nothing in it was executed" in str(error)
    assert not (tmp_path / "executed").exists()


def test_a_torchscript_archive_is_refused(tmp_path):
    """torch.load would hand it to torch.jit.load, which runs code of the file."""
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="TorchScript"):
        load_pickle(tmp_path / "script.pt")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = tmp_path / "model.pt"
    torch.save({"state_dict": official_state()}, whole)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        convert_official(cut, 1.0)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="damaged"):
        convert_qinco(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="no file"):
        convert_qinco(tmp_path / "none.pt")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="step1.expert0"):
        convert_official(tmp_path / "other.pt", 1.0)
    with pytest.raises(ValueError, match="neither a QINCo module"):
        convert_qinco(whole)
    state = official_state()
    del state["step2.expert1.1.3.weight"]
    torch.save({"state_dict": state}, tmp_path / "partial.pt")
    with pytest.raises(ValueError, match=r"no tensor 'step2.expert1.1.3.weight'"):
        convert_official(tmp_path / "partial.pt", 1.0)
    torch.save({"state_dict": official_state() | {"step1.extra": torch.zeros(1)}}, tmp_path / "extra.pt")
    with pytest.raises(ValueError, match=r"unknown variant: step1.extra"):
        convert_official(tmp_path / "extra.pt", 1.0)
    with pytest.raises(ValueError, match="scale must be a positive number"):
        convert_official(whole, -1.0)


def test_faiss_files(tmp_path, clustered):
    index = faiss.IndexResidualQuantizer(16, 3, 4)
    index.train(clustered)
    faiss.write_index(index, str(tmp_path / "rq.index"))
    converted = convert_faiss(tmp_path / "rq.index")
    assert np.array_equal(converted.compress(clustered[:100], beam_size=1), _greedy(index, clustered[:100]))
    product = faiss.ProductQuantizer(16, 4, 4)
    product.train(clustered)
    faiss.write_ProductQuantizer(product, str(tmp_path / "pq"))
    assert np.array_equal(
        convert_faiss(tmp_path / "pq").compress(clustered[:100]), product.compute_codes(clustered[:100])
    )
    for number, kind in enumerate(["OPQ4,PQ4x4np", "OPQ4,PQ4x4", "RR,RQ4x4", "RR,LSQ4x4"]):
        index = faiss.index_factory(16, kind)
        index.train(clustered)
        faiss.write_index(index, str(tmp_path / "chain"))
        expected = index.sa_decode(index.sa_encode(clustered[:100]))
        converted = convert_faiss(tmp_path / "chain").decompress(index.sa_encode(clustered[:100])[:, :2])
        np.testing.assert_allclose(converted, expected, atol=1e-4, err_msg=f"{number} {kind}")
    (tmp_path / "bad").write_bytes((tmp_path / "rq.index").read_bytes()[:300])
    with pytest.raises(ValueError, match="no Faiss index"):
        convert_faiss(tmp_path / "bad")
    with pytest.raises(ValueError, match="Cannot convert IndexFlat"):
        convert_faiss(faiss.IndexFlatL2(16))
    with pytest.raises(ValueError, match="not trained"):
        convert_faiss(faiss.IndexPQ(16, 4, 4))
    with pytest.raises(ValueError, match="no rotation"):
        pca = faiss.index_factory(16, "PCA8,PQ4x4")
        pca.train(clustered)
        convert_faiss(pca)


def _greedy(index: faiss.IndexResidualQuantizer, vectors: np.ndarray) -> np.ndarray:
    index.rq.max_beam_size = 1
    return index.sa_encode(vectors)


def test_pickle_of_numpy_scalars(tmp_path):
    torch.save({"scale": np.float64(1.5), "epoch": np.int64(3)}, tmp_path / "numbers.pt")
    assert load_pickle(tmp_path / "numbers.pt") == {"scale": 1.5, "epoch": 3}
