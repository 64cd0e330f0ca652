"""Files of other projects that ask for too much, or lie, are refused before anything is allocated."""

import io
import pickle
import struct
import tarfile
import zipfile

import faiss
import numpy as np
import pytest
import torch
from conftest import SIZE
from memory import little_memory
from test_convert import official_state

from rqmoe_hf.convert import convert_faiss, convert_official, convert_qinco
from rqmoe_hf.convert.unpickle import load_pickle


def faiss_header(kind: bytes, dimension: int) -> bytes:
    return kind + struct.pack("<iqqq?i", dimension, 0, 1 << 20, 1 << 20, True, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<QQQQ", 8, 2, 4, 2**40) + bytes(100), r"claims 1,099,511,627,776 numbers"),
        (struct.pack("<QQQQ", 2**40, 2, 4, 0), "2 codebooks of 1,099,511,627,776 dimensions"),
        (struct.pack("<QQQQ", 8, 2, 60, 0), "2 codebooks of 60 bits"),
        (struct.pack("<QQQQ", 8, 3, 4, 0), "3 codebooks of 4 bits in 8 dimensions"),
        (struct.pack("<QQQQ", 32_768, 4_096, 8, 0), "would become 34,359,738,368 numbers; at most 1,073,741,824"),
        (faiss_header(b"IxRq", 8) + struct.pack("<QQQQQ?Q", 8, 2, 2, 40, 40, True, 0), "codebooks of 40 bits"),
        (faiss_header(b"IxRq", 8) + struct.pack("<QQQ", 8, 2, 2**60), "2 codebooks, and the sizes of 115"),
        (faiss_header(b"IxLS", 8) + struct.pack("<QQQQQ?Q", 8, 2, 2, 8, 8, True, 4_096) + bytes(9), "claims 4,096"),
        (
            faiss_header(b"IxRq", 1) + struct.pack("<QQQQQ?Q", 1, 2, 2, 16, 16, True, 131_072) + bytes(4 * 131_072),
            r"a table of 131,072\^2 numbers",
        ),
        (faiss_header(b"IxPT", 8) + struct.pack("<i", 10**6) + b"LTra", "got 1000000 transforms"),
        (faiss_header(b"IxPT", 8) + struct.pack("<i", 1) + b"LTra\0" + struct.pack("<Q", 2**50), "rotation claims"),
        (faiss_header(b"IwFl", 8), "damaged"),
        (b"IxPq", "cut off"),
        (b"", "cut off"),
    ],
)
def test_hostile_faiss_files(tmp_path, content, message):
    (tmp_path / "index").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=f"index is no Faiss index.*{message}"):
        convert_faiss(tmp_path / "index")


def test_a_faiss_file_that_claims_vectors_it_lacks(tmp_path, clustered):
    index = faiss.IndexPQ(SIZE, 2, 4)
    index.train(clustered[:700])
    faiss.write_index(index, str(tmp_path / "index"))
    content = bytearray((tmp_path / "index").read_bytes())
    place = 4 + 4 + 24 + 1 + 4 + 4 * 8 + 4 * (SIZE << 4)  # the length of the codes, behind the codebooks
    assert content[place : place + 8] == bytes(8)
    content[place : place + 8] = (3 << 30).to_bytes(8, "little")
    (tmp_path / "index").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match="index is no Faiss index"):
        convert_faiss(tmp_path / "index")


def test_codebooks_must_be_finite(tmp_path):
    state = official_state()
    state["step1.codebook.weight"][3, 2] = float("nan")
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt cannot be converted: The tensors hold NaN or infinity: codebooks"):
        convert_official(tmp_path / "model.pt", 1.0)


def archive_of(file, payload: bytes, **parts: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ({"data.pkl": payload, "version": b"3\n", "byteorder": b"little"} | parts).items():
            archive.writestr(f"archive/{name}", content)


def tensor_payload(offset: int, size: tuple, stride: tuple, count: int) -> bytes:
    """A pickle of one tensor, as torch.save writes it, with any numbers in it."""

    class Writer(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if thing is STORAGE else None

        def reducer_override(self, thing):
            if thing is TENSOR:
                return torch._utils._rebuild_tensor_v2, (STORAGE, offset, size, stride, False, {})
            return NotImplemented

    STORAGE, TENSOR = object(), object()
    written = io.BytesIO()
    Writer(written, protocol=2).dump({"state_dict": {"a": TENSOR}})
    return written.getvalue()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, (2**20, 2**20), (0, 0), 4), "does not fit into its 4 numbers"),
        ((0, (2,), (2**40,), 4), "strides"),
        ((2**31, (1,), (1,), 4), "does not fit"),
        ((0, (-1,), (1,), 4), r"has the shape \(-1,\)"),
        ((0, (4,), (1,), 2**45), "a storage has 35184372088832 numbers"),
    ],
)
def test_tensors_that_claim_more_than_their_storage(tmp_path, numbers, message):
    file = tmp_path / "model.pt"
    archive_of(file, tensor_payload(0, (4,), (1,), 4), **{"data/0": np.arange(4, dtype="<f4").tobytes()})
    assert load_pickle(file)["state_dict"]["a"].tolist() == [0, 1, 2, 3]
    archive_of(file, tensor_payload(*numbers), **{"data/0": np.arange(4, dtype="<f4").tobytes()})
    with little_memory(), pytest.raises(ValueError, match=f"model.pt was refused or is damaged: .*{message}"):
        load_pickle(file)


def test_pickles_that_make_the_unpickler_allocate(tmp_path):
    archive_of(tmp_path / "model.pt", b"\x80\x02}r\xff\xff\xff\x3f.")  # keep this as value number 2^30
    with little_memory(), pytest.raises(ValueError, match="value number 1073741823 after 3 operations"):
        load_pickle(tmp_path / "model.pt")


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 << 20))
    with little_memory(40 << 20), pytest.raises(ValueError, match="its parts are compressed"):
        load_pickle(tmp_path / "model.pt")


def test_a_tar_archive_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "model.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(ValueError, match="tar archive"):
        load_pickle(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "converter"),
    [
        ({"state_dict": {1: torch.zeros(2)}}, lambda file: convert_official(file, 1.0)),
        ({"state_dict": official_state() | {"codebook0.weight": torch.zeros(())}}, lambda f: convert_official(f, 1.0)),
        ({"state_dict": official_state() | {"codebook0.weight": torch.zeros(3)}}, lambda f: convert_official(f, 1.0)),
        ({"model": {}, "parameters": []}, convert_qinco),
        ({"model": [1], "parameters": {"qinco1_mode": True}}, convert_qinco),
        ({"model": {"data_mean": torch.zeros(2), "data_std": torch.zeros(2)}, "parameters": {"qinco1_mode": 1}},
         convert_qinco),
    ],
)  # fmt: skip
def test_states_of_other_shapes_and_types(tmp_path, content, converter):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt (is damaged|has no tensor|cannot be converted)"):
        converter(tmp_path / "model.pt")
