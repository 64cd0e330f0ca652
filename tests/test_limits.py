"""Files of strangers: what asks for too much, or lies, is refused with a ValueError before anything is allocated."""

import hashlib
import json
import shutil
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MEMBERS, SIZE, randomize
from huggingface_hub.errors import StrictDataclassError
from index_workers import MODEL
from memory import little_memory
from safetensors.numpy import load_file, save_file
from transformers import AutoModel

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import codes_info
from rqmoe_hf.data.jobs import CODES_METADATA, check_quantizer
from rqmoe_hf.data.shards import fixed_size_column
from rqmoe_hf.hub import load_codes
from rqmoe_hf.index import RQMoEIndex, verify
from rqmoe_hf.index.documents import State
from rqmoe_hf.index.storage import DATABASE, MANIFEST
from rqmoe_hf.limits_rqmoe import count_features, count_weights
from rqmoe_hf.local_search_rqmoe import build_pair_tables
from rqmoe_hf.saving import maker_record

# --- config.json -------------------------------------------------------------------------------------------------

HOSTILE = {
    "codebook_size": (2**40, "between 2 and 65536, got 1099511627776"),
    "num_codebooks": (10**9, "at most 4,096, got 1,000,000,000"),
    "hidden_size": (10**12, "at most 65,536"),
    "intermediate_size": (10**9, "at most 1,048,576"),
    "instruction_size": (10**30, "instruction_size must be at most 65,536"),
    "num_experts": (10**6, "at most 4,096"),
    "num_expert_layers": (2**63, "at most 4,096"),
    "beam_size": (10**9, "at most 4,096"),
    "num_candidates": (-5, "at least 1, got -5"),
    "local_search": (10**9, "at most 10,000"),
    "num_labels": (10**9, "from 0 to 1,000"),
    "dtype": ("os", "one of float64, float32, float16, bfloat16, got os"),
    "id2label": ("x", "make no quantizer"),
    "codebook_sizes": ([0, 256], "codebook_sizes"),
    "search_blocks": ([2**70, -(2**70), 8], "search_blocks must be numbers of codebooks"),
    "dropout": (float("nan"), "dropout"),
}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        *[({name: value}, message) for name, (value, message) in HOSTILE.items()],
        ({"hidden_size": 3.5}, "expected int, got float"),
        ({"hidden_size": None}, "expected int"),
        ({"hidden_size": 65_536, "num_codebooks": 4_096}, r"asks for 35,[\d,]+ weights; at most 4,294,967,296"),
        ({"codebook_size": 65_536, "num_experts": 512, "hidden_size": 1}, "numbers in tables"),
        ({"num_codebooks": 64, "codebook_size": 4_096, "local_search": 1}, r"32,768 codewords\).*got \[262144\]"),
        ({"num_codebooks": 129, "num_experts": 0, "local_search": 1}, r"got \[33024\]"),
        (
            {
                "num_codebooks": 512,
                "codebook_size": 4_096,
                "hidden_size": 1,
                "num_experts": 0,
                "search_blocks": [8] * 64,
                "local_search": 1,
            },
            "4,294,967,296 of all blocks are allowed",
        ),
        ({"search_blocks": [8.5]}, "search_blocks"),
    ],
)
def test_hostile_sizes(tmp_path, entries, message):
    with little_memory(), pytest.raises(ValueError, match=message):
        RQMoEConfig(**entries)
    config = RQMoEConfig().to_dict() | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"mean": np.zeros(384, np.float32)}, tmp_path / "model.safetensors")
    for loader in (RQMoEModel, AutoModel, RQMoEConfig):
        with little_memory(), pytest.raises(ValueError, match=message):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"attribute_map": {"hidden_size": "beam_size"}},
        {"to_dict": 1},
        {"quantization_config": {"quant_method": "awq"}},
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel"},
        {"transformers_weights": "../other.safetensors"},
        {"per_layer_config": {"0": {}}},
    ],
)
def test_a_config_cannot_reach_beyond_itself(tmp_path, paper_model, entry):
    paper_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(ValueError, match=f"must not set '{next(iter(entry))}'"):
        RQMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"dropout": "x"}', '{"id2label": [1]}'])
def test_what_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match="config.json|make no quantizer"):
        RQMoEConfig.from_pretrained(tmp_path)


def test_refusals_are_both_kinds_of_error():
    with pytest.raises(StrictDataclassError):
        RQMoEConfig(hidden_size=10**12)


def test_large_but_real_quantizers_are_allowed():
    RQMoEConfig.additive(hidden_size=4096, num_codebooks=64, codebook_size=4096)
    RQMoEConfig.additive(hidden_size=1024, num_codebooks=32, codebook_size=65_536)
    RQMoEConfig(hidden_size=4096, num_codebooks=32, codebook_size=1024, num_experts=8, intermediate_size=1024)
    RQMoEConfig.additive(num_codebooks=32, codebook_size=2048, search_blocks=[16, 16], local_search=16)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [([256] * 128, None), ([8192] + [256] * 8, None), ([40_000, 256, 256], [1, 2]), ([65_536], None)],
)
def test_local_search_is_allowed_what_its_tables_hold(sizes, blocks):
    settings = {"num_codebooks": len(sizes), "codebook_size": max(sizes), "codebook_sizes": sizes}
    RQMoEConfig.additive(**settings, search_blocks=blocks, local_search=16)


def test_local_search_refuses_what_its_config_refuses():
    with pytest.raises(ValueError, match=r"32,768 codewords\).*got \[33024\]"):
        build_pair_tables([torch.zeros(256, 2)] * 129)


def test_weights_are_counted_without_a_model():
    for name, config in MEMBERS.items():
        model = RQMoEModel(config)
        assert count_weights(config) == sum(tensor.numel() for tensor in model.state_dict().values()), name
        model.scale.fill_(1.0)
        features = model._tables_for(torch.float32).features
        largest = 0 if features is None else features.numel()
        assert count_features(config) <= largest + 3 * 20 * SIZE + count_features(config) // 2 or largest == 0, name
        assert largest <= count_features(config) + 3 * 20 * (SIZE + 8), name


# --- model.safetensors -------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_not_allocated(tmp_path):
    """A few hundred bytes must not make transformers fill gigabytes with random numbers."""
    RQMoEConfig.additive(hidden_size=4_096, num_codebooks=64, codebook_size=4_096).save_pretrained(tmp_path)
    save_file({"mean": np.zeros(4_096, np.float32), "scale": np.ones((), np.float32)}, tmp_path / "model.safetensors")
    for loader in (RQMoEModel, AutoModel):
        with little_memory(), pytest.raises(ValueError, match="do not belong to its config.json: missing keys: codeb"):
            loader.from_pretrained(tmp_path)


def test_weights_of_other_shapes_types_and_containers(tmp_path, paper_model):
    paper_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"codebooks": weights["codebooks"][:, :-1].copy()}, file)
    with pytest.raises(ValueError, match=r"codebooks has the shape \(4, 19, 16\) instead of \(4, 20, 16\)"):
        RQMoEModel.from_pretrained(tmp_path)
    for number in ("nan", "inf", "1e30"):
        save_file(weights | {"codebooks": weights["codebooks"] * np.float32(number)}, file)
        with pytest.raises(ValueError, match=r"hold NaN, infinity or numbers above 1e\+15: codebooks"):
            RQMoEModel.from_pretrained(tmp_path)
    save_file(weights | {"codebooks": weights["codebooks"].astype(np.int8)}, file)
    with pytest.raises(ValueError, match=r"no floats: codebooks \(I8\)"):
        RQMoEModel.from_pretrained(tmp_path)
    save_file(weights | {"mean": np.zeros(17, np.float32), "quantizer.mean": weights["mean"]}, file)  # which is read?
    with pytest.raises(ValueError, match=r"do not belong to its config.json: mismatched keys: \('mean', .*17"):
        RQMoEModel.from_pretrained(tmp_path)
    file.unlink()
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors file"):
        RQMoEModel.from_pretrained(tmp_path)


# --- codes -------------------------------------------------------------------------------------------------------


def write_codes(file, record, codes=None):
    codes = np.zeros((5, 3), np.uint8) if codes is None else codes
    note = record if isinstance(record, bytes) else json.dumps(record).encode()
    pq.write_table(pa.table({"codes": fixed_size_column(codes)}).replace_schema_metadata({CODES_METADATA: note}), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": 10**9}, "between 1 and 4,096"),
        ({"num_codebooks": -1}, "between 1 and 4,096"),
        ({"num_codebooks": True}, "num_codebooks is True"),
        ({"codebook_size": 2**40}, "between 2 and 65,536"),
        ({"codebook_size": [16, "x"]}, "between 2 and 65,536"),
        ({"codebook_size": [16]}, "names 1 codebook sizes for 4 codes"),
        ({"hidden_size": "16"}, "hidden_size is 16"),
        ({"weights": None}, "weights is None"),
        ({"codebook_size": 2}, "should hold 1 bytes each"),
    ],
)
def test_hostile_notes_of_codes(tmp_path, paper_model, change, message):
    record = maker_record(paper_model, 4)
    write_codes(tmp_path / "part-00000.parquet", record)
    assert len(load_codes(tmp_path, paper_model)) == 5
    write_codes(tmp_path / "part-00000.parquet", record | change)
    for opens in (codes_info, lambda folder: load_codes(folder, paper_model)):
        with little_memory(), pytest.raises(ValueError, match=message):
            opens(tmp_path)


def test_damaged_parquet_files_are_named(tmp_path, paper_model):
    file = tmp_path / "part-00000.parquet"
    for note in (b"", b"[" * 100_000, b"[]", b"\xff"):
        write_codes(file, note)
        with pytest.raises(ValueError, match="part-00000.parquet"):
            codes_info(file)
    write_codes(file, maker_record(paper_model, 4), np.random.default_rng(0).integers(0, 256, (5000, 3), np.uint8))
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes(len(whole) // 2 - 100) + whole[len(whole) // 2 :])
    with pytest.raises(ValueError, match="part-00000.parquet cannot be read"):
        load_codes(tmp_path, paper_model)
    write_codes(file, maker_record(paper_model, 4))
    write_codes(tmp_path / "part-00001.parquet", maker_record(paper_model, 4) | {"weights": "0" * 16})
    with pytest.raises(ValueError, match="part-00001.parquet holds codes of another quantizer"):
        codes_info(tmp_path)


def test_a_note_must_fit_the_quantizer_that_it_names(paper_model):
    with pytest.raises(ValueError, match="other sizes than its 4 codebooks of 20"):
        check_quantizer(maker_record(paper_model, 4) | {"hidden_size": 8}, paper_model, "here")


# --- index folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def index_folder(tmp_path, clustered):
    folder = tmp_path / "index"
    with RQMoEIndex(MODEL, folder, kind="ivf", metric="l2", num_lists=3, keep_floats=True) as index:
        index.add(clustered[:300], metadata=[{"n": n} for n in range(300)])
        index.save()
    return folder


def sealed(folder, **changes) -> None:
    """Writes a manifest with all of its checksums right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksum"]
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        record |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {name: value for name, value in (manifest | changes).items() if value is not ...}
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum}, indent=1) + "\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_lists": 10**12},
        {"num_lists": "3"},
        {"metric": "x"},
        {"kind": []},
        {"keep_floats": 1},
        {"encoder": 3},
        {"encoder": ...},
        {"num_lists": ...},
        {"files": {DATABASE: {"version": 3}}},
        {"files": {"scan-1.safetensors": {"version": -1}}},
        {"files": {DATABASE: {"version": -1}, "../other.safetensors": {"version": -1}}},
        {"files": {DATABASE: {"version": -1}, "/dev/zero": {"version": -1}}},
        {"quantizer": {}},
        {"quantizer": maker_record(MODEL, 4) | {"num_codebooks": 10**9}},
        {"format": ...},
    ],
)
def test_hostile_manifests(index_folder, changes):
    sealed(index_folder)
    RQMoEIndex.load(index_folder, MODEL).close()
    sealed(index_folder, **changes)
    with little_memory(), pytest.raises(ValueError, match=r"manifest.json|between 1 and 4,096"):
        RQMoEIndex.load(index_folder, MODEL)
    assert verify(index_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"norms": np.zeros(100_000, np.float32)},  # Faiss's look-up tables would be written far beyond their end
        {"norms": None},
        {"sizes": np.array([2**62, 2**62, 2**63 - 1 - 299], np.int64)},
        {"sizes": np.array([100, 100, 100, 0], np.int64)},
        {"centroids": np.zeros((3, SIZE + 1), np.float32)},
        {"centroids": np.zeros((3, SIZE), np.float64)},
        {"probes": np.zeros((0, SIZE), np.float32)},
        {"lists": np.zeros(7, np.uint8)},
    ],
)
def test_hostile_snapshots(index_folder, change):
    file = next(index_folder.glob("scan-*"))
    arrays = {name: array for name, array in (load_file(file) | change).items() if array is not None}
    save_file(arrays, file, {"version": "1", "row": "300", "removal": "0", "fitted": "300"})
    sealed(index_folder)
    with little_memory(), pytest.raises(ValueError, match=r"scan-\d+.safetensors is no snapshot of this index"):
        RQMoEIndex.load(index_folder, MODEL)


@pytest.mark.parametrize("notes", [{}, {"version": "x"}, {"version": "1", "other": "2"}])
def test_notes_of_snapshots(index_folder, notes):
    file = next(index_folder.glob("scan-*"))
    save_file(load_file(file), file, notes)
    sealed(index_folder)
    with pytest.raises(ValueError, match=r"scan-\d+.safetensors is no snapshot of this index"):
        RQMoEIndex.load(index_folder, MODEL)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE vectors SET code = x'00'", r"its codes have 1 bytes, not 3"),
        ("UPDATE vectors SET code = 7", "or are no bytes"),
        ("UPDATE vectors SET code = x'0000000000' WHERE row = 7", "different lengths"),
        ("UPDATE floats SET vector = x'0000'", "is not one of 16 float16 values"),
        ("UPDATE documents SET metadata = '['", "collection.sqlite is damaged: metadata in it are no JSON"),
    ],
)
def test_hostile_rows(index_folder, statement, message):
    next(index_folder.glob("scan-*")).unlink()
    connection = sqlite3.connect(index_folder / DATABASE)
    connection.execute(statement)
    connection.commit()
    connection.close()
    assert any("checksums of" in damage for damage in verify(index_folder))
    with RQMoEIndex.load(index_folder, MODEL, check=False) as index, pytest.raises(ValueError, match=message):
        index.search(np.ones((1, SIZE), np.float32), 5, shortlist=20)
        list(index.documents())


@pytest.mark.parametrize(
    "state",
    [{"count": "x"}, {"count": -1}, {"count": 10**9}, {"next_row": 2.5}, {"sources": "["}, {"sources": '{"a": "b"}'}],
)
def test_hostile_states(index_folder, state):
    connection = sqlite3.connect(index_folder / DATABASE)
    values = dict(connection.execute("SELECT name, value FROM state WHERE name != 'checksum'")) | state
    for name, value in (values | {"checksum": State(**values).checksum}).items():
        connection.execute("UPDATE state SET value = ? WHERE name = ?", (value, name))
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match=f"{DATABASE} is damaged: its state is"):
        RQMoEIndex.load(index_folder, MODEL, check=False)


def test_codes_of_another_length_never_reach_faiss(tmp_path, clustered):
    """It would read on behind them; this scan needs nothing else of the codes."""
    with RQMoEIndex(MODEL, tmp_path / "index", metric="inner_product", kind="flat") as index:
        index.add(clustered[:300])
    connection = sqlite3.connect(tmp_path / "index" / DATABASE)
    connection.execute("UPDATE vectors SET code = x'00'")
    connection.commit()
    connection.close()
    with (
        RQMoEIndex.load(tmp_path / "index", MODEL, check=False) as index,
        pytest.raises(ValueError, match="its codes have 1 bytes, not 3"),
    ):
        index.search(np.ones((1, SIZE), np.float32), 5, shortlist=20)


def test_a_row_number_out_of_all_proportion(index_folder):
    """A filter must not make a table of as many entries as the highest row number."""
    connection = sqlite3.connect(index_folder / DATABASE)
    for table in ("vectors", "documents", "floats"):
        connection.execute(f"UPDATE {table} SET row = {2**62} WHERE row = 300")
    connection.commit()
    connection.close()
    next(index_folder.glob("scan-*")).unlink()
    with RQMoEIndex.load(index_folder, MODEL, check=False) as index, little_memory():
        found = index.search(np.ones((1, SIZE), np.float32), 5, filter={"n": {"$gte": 290}}, rescore="tables")[1]
        assert set(found.flatten()) <= set(range(290, 300))


def test_nothing_is_left_behind_by_a_refusal(tmp_path, paper_model):
    paper_model.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "rqmoe", "hidden_size": 10**12}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="hidden_size"):
        RQMoEModel.from_pretrained(tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before
    assert isinstance(randomize(RQMoEModel.from_pretrained(tmp_path / "whole")), RQMoEModel)
