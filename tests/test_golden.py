"""Files that were written once are read for ever, with the same results."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rqmoe_hf import RQMoEModel
from rqmoe_hf.data import codes_info
from rqmoe_hf.hub import load_codes
from rqmoe_hf.index import Document, RQMoEIndex, verify

GOLDEN = Path(__file__).parent / "golden"
VECTORS = np.load(GOLDEN / "vectors.npy")
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("name", ["additive", "rqmoe", "official", "qinco"])
def test_models(name):
    model, expected = RQMoEModel.from_pretrained(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    found = model.encode(torch.from_numpy(VECTORS))
    assert np.array_equal(found.codes, expected["codes"])
    assert np.array_equal(model.compress(VECTORS), expected["packed"])
    codes = torch.from_numpy(expected["codes"]).long()
    np.testing.assert_allclose(model.decode(codes).reconstruction, expected["reconstruction"], **CLOSE)
    np.testing.assert_allclose(model.decode(codes[:, :2]).reconstruction, expected["prefix"], **CLOSE)
    np.testing.assert_allclose(model.decompress(expected["packed"], 3), expected["reconstruction"], **CLOSE)


def test_codes():
    model = RQMoEModel.from_pretrained(GOLDEN / "rqmoe")
    info = codes_info(GOLDEN / "codes")
    assert (info["num_codebooks"], info["codebook_size"], info["hidden_size"]) == (3, 12, 8)
    rows = load_codes(GOLDEN / "codes", model)[:]
    assert np.array_equal(rows["codes"], np.load(GOLDEN / "rqmoe" / "expected.npz")["packed"])
    assert list(rows["id"]) == [f"id {n}" for n in range(20)]


@pytest.mark.parametrize("snapshot", [True, False])
def test_index(tmp_path, snapshot):
    shutil.copytree(GOLDEN / "index", tmp_path / "index")
    if not snapshot:  # it is made anew
        next((tmp_path / "index").glob("scan-*")).unlink()
    assert verify(tmp_path / "index") == []
    expected = np.load(GOLDEN / "search.npz")
    with RQMoEIndex.load(tmp_path / "index", RQMoEModel.from_pretrained(GOLDEN / "rqmoe")) as index:
        assert len(index) == 140 and 145 not in index
        assert index.get([7]) == [Document(7, "text 7", {"n": 7})]
        assert (index._ranker.scanner is not None) == snapshot
        for rescore in ("floats", "codes", "tables"):
            if rescore == "tables" and not snapshot:
                continue  # tables are fitted to what is there when they are made
            scores, ids = index.search(VECTORS[:4], 5, shortlist=30, nprobe=3, rescore=rescore)
            np.testing.assert_allclose(scores, expected[f"{rescore}_s"], **CLOSE)
            assert np.array_equal(ids, expected[f"{rescore}_i"])
