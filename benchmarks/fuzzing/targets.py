"""Every format that the package reads: small valid files, their mutations, and the public function that opens them."""

import hashlib
import io
import json
import random
import sqlite3
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # whose fixtures know the layouts of other projects

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.convert import convert_faiss, convert_official, convert_qinco
from rqmoe_hf.data import codes_info
from rqmoe_hf.data.jobs import CODES_METADATA, compress_shards
from rqmoe_hf.hub import load_codes
from rqmoe_hf.index import RQMoEIndex, verify
from rqmoe_hf.index.documents import State
from rqmoe_hf.index.storage import DATABASE, MANIFEST

from .mutations import EXTREMES, dump_json, mutate_bytes, mutate_json, mutate_safetensors

SIZE, STEPS, CODEWORDS = 6, 3, 10
COMMON = {"hidden_size": SIZE, "num_codebooks": STEPS, "codebook_size": CODEWORDS, "intermediate_size": 4}
CONFIGS = {
    "additive": RQMoEConfig.additive(**COMMON, local_search=1),
    "uneven": RQMoEConfig.additive(**COMMON, codebook_sizes=[10, 7, 4]),
    "blocks": RQMoEConfig.additive(**COMMON, search_blocks=[1, 2], local_search=1),
    "paper": RQMoEConfig(**COMMON, instruction_size=5),
    "official": RQMoEConfig.official(**COMMON),
    "qinco": RQMoEConfig.qinco(**COMMON, num_expert_layers=2),
}


def make_model(name: str) -> RQMoEModel:
    """A model of a member, with random weights."""
    torch.manual_seed(0)
    model = RQMoEModel(CONFIGS[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.5)
    model.scale.fill_(1.0)
    return model.eval()


class Target(ABC):
    """One format: `make` writes valid files once, `change` the files of one input, `open` reads them.

    Args:
        folder: Where the valid files are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def seeds(self, pattern: str = "*") -> list[bytes]:
        """Contents of the valid files."""
        return [file.read_bytes() for file in sorted(self.folder.glob(pattern)) if file.is_file()]

    def prepare(self) -> None:
        """Reads what `make` has written; before the first input."""
        self.valid = self.seeds()

    @abstractmethod
    def make(self) -> None:
        """Writes valid files."""

    @abstractmethod
    def change(self, rng: random.Random, place: Path) -> None:
        """Writes the files of one input."""

    @abstractmethod
    def open(self, rng: random.Random, place: Path) -> None:
        """Reads them as a user would."""


def use(model: RQMoEModel) -> None:
    """Encodes and decodes a vector or two."""
    if model.config.hidden_size <= 4_096:
        codes = model.compress(np.ones((2, model.config.hidden_size), np.float32))
        model.decompress(codes, model.config.num_codebooks)


class Config(Target):
    """config.json, by itself."""

    def make(self) -> None:
        for name, config in CONFIGS.items():
            (self.folder / f"{name}.json").write_text(config.to_json_string(use_diff=False))
            config.save_pretrained(self.folder / "saved")
            (self.folder / f"{name}-saved.json").write_bytes((self.folder / "saved" / "config.json").read_bytes())

    def change(self, rng: random.Random, place: Path) -> None:
        valid = rng.choice(self.valid)
        changed = mutate_bytes(valid, rng, self.valid) if rng.random() < 0.2 else None
        (place / "config.json").write_bytes(changed or dump_json(mutate_json(json.loads(valid), rng), rng))

    def open(self, rng: random.Random, place: Path) -> None:
        RQMoEConfig.from_pretrained(place)


class Checkpoint(Target):
    """config.json beside model.safetensors, either of them changed."""

    def make(self) -> None:
        for name in CONFIGS:
            make_model(name).save_pretrained(self.folder / name)

    def prepare(self) -> None:
        self.valid = [(folder / "config.json", folder / "model.safetensors") for folder in self.folder.iterdir()]
        self.valid = [(config.read_bytes(), weights.read_bytes()) for config, weights in self.valid]

    def change(self, rng: random.Random, place: Path) -> None:
        config, weights = rng.choice(self.valid)
        which = rng.random()
        if which < 0.75:
            weights = mutate_safetensors(weights, rng, [other for _, other in self.valid])
        if which > 0.7:
            config = dump_json(mutate_json(json.loads(config), rng), rng)
        (place / "config.json").write_bytes(config)
        (place / "model.safetensors").write_bytes(weights)

    def open(self, rng: random.Random, place: Path) -> None:
        use(RQMoEModel.from_pretrained(place))


class Codes(Target):
    """Parquet files of codes, up to what says which quantizer made them, and their rows."""

    loads = False

    def make(self) -> None:
        model = make_model("paper")
        compress_shards(_vectors_file(self.folder), self.folder / "codes", model)

    def prepare(self) -> None:
        self.model = make_model("paper")
        file = next((self.folder / "codes").glob("*.parquet"))
        self.valid, self.table = [file.read_bytes()], pq.read_table(file)

    def change(self, rng: random.Random, place: Path) -> None:
        file = place / "part-00000.parquet"
        if rng.random() < 0.6:
            return void(file.write_bytes(mutate_bytes(self.valid[0], rng, self.valid)))
        table, record = self.table, json.loads(self.table.schema.metadata[CODES_METADATA])
        if rng.random() < 0.3:
            kinds = [pa.list_(pa.uint8()), pa.list_(pa.uint8(), 1), pa.string(), pa.int64(), pa.list_(pa.float32(), 2)]
            table = pa.table({rng.choice(("codes", "id", "x")): pa.nulls(5, rng.choice(kinds))})
        note = dump_json(mutate_json(record, rng), rng)
        pq.write_table(table.replace_schema_metadata({CODES_METADATA: note}), file)

    def open(self, rng: random.Random, place: Path) -> None:
        if self.loads:
            self.model.decompress(load_codes(place, self.model)[:]["codes"])
        else:
            codes_info(place)


class LoadedCodes(Codes):
    """The same, with all their rows; a data set takes a while to be made of them."""

    loads = True


class Index(Target):
    """The folder of an index: manifest, database and snapshot, with their checksums put right or left wrong."""

    def make(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(130, SIZE)).astype(np.float32)
        for name, kind, metric in (("additive", "ivf", "l2"), ("paper", "flat", "cosine")):
            with RQMoEIndex(make_model(name), self.folder / name, kind=kind, metric=metric, num_lists=2,
                            keep_floats=kind == "flat") as index:  # fmt: skip
                index.add(vectors, texts=[f"text {n}" for n in range(130)], metadata=[{"n": n} for n in range(130)])
                index.remove(range(10))
                index.save()

    def prepare(self) -> None:
        self.models = {name: make_model(name) for name in ("additive", "paper")}
        self.valid = {name: {file.name: file.read_bytes() for file in (self.folder / name).iterdir()
                             if file.name != "writer.lock"} for name in self.models}  # fmt: skip

    def change(self, rng: random.Random, place: Path) -> None:
        for file in place.iterdir():
            file.unlink()
        self.name = rng.choice(list(self.valid))
        files = dict(self.valid[self.name])
        changed = rng.choice(list(files))
        manifest = json.loads(files.pop(MANIFEST))
        del manifest["checksum"]
        if changed == MANIFEST:
            manifest = mutate_json(manifest, rng)
        elif changed == DATABASE and rng.random() < 0.5:
            files[changed] = _mutate_rows(files[changed], rng)
        elif changed == DATABASE:
            files[changed] = mutate_bytes(files[changed], rng, [files[changed]])
        else:
            files[changed] = mutate_safetensors(files[changed], rng, [files[changed]])
        for name, content in files.items():
            (place / name).write_bytes(content)
            if changed == name and rng.random() < 0.9:
                manifest["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        manifest = manifest | {"checksum": checksum} if isinstance(manifest, dict) else manifest
        (place / MANIFEST).write_bytes((json.dumps(manifest, indent=1) + "\n").encode("utf-8", "surrogatepass"))

    def open(self, rng: random.Random, place: Path) -> None:
        if rng.random() < 0.2:
            verify(place)
        with RQMoEIndex.load(place, self.models[self.name], check=rng.random() < 0.5) as index:
            query = np.ones((1, SIZE), np.float32)
            index.search(query, 5, shortlist=20)
            index.search(query, 3, filter={"n": {"$gt": 50}}, rescore="tables", shortlist=5)
            list(index.documents())


def _mutate_rows(database: bytes, rng: random.Random) -> bytes:
    """Values in the tables replaced, with the checksum of the state put right."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(database[:18] + b"\x01\x01" + database[20:])  # a log beside it cannot be in memory
    columns = {"vectors": ("row", "id", "code", "checksum"), "documents": ("text", "metadata"), "floats": ("vector",),
               "removed": ("number", "row"), "state": ("value",)}  # fmt: skip
    values = [value for value in EXTREMES if isinstance(value, (int, float, type(None))) and abs(value or 0) < 2**63]
    values += [b"", b"\x00", b"\xff" * 2, b"\xff" * 13, "text", "[" * 50_000, '{"n": [1]}', "x" * 3, b"\xff" * 500]
    for _ in range(rng.choice((1, 1, 3))):
        table = rng.choice(list(columns))
        column, where = rng.choice(columns[table]), rng.choice(("", "WHERE rowid % 7 = 1", "WHERE rowid = 20"))
        where = rng.choice(("", "WHERE name = 'count'", "WHERE name = 'next_row'")) if table == "state" else where
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? {where}", (rng.choice(values),))
        except sqlite3.Error:
            continue
    state = dict(connection.execute("SELECT name, value FROM state WHERE name != 'checksum'"))
    with suppress(sqlite3.Error):
        connection.execute("UPDATE state SET value = ? WHERE name = 'checksum'", (State(**state).checksum,))
    connection.commit()
    changed = connection.serialize()
    return changed[:18] + database[18:20] + changed[20:]


class Pickles(Target):
    """Files of other projects, of either container of torch.save."""

    def make(self) -> None:
        import test_convert

        state = test_convert.official_state()
        contents = {"official": {"state_dict": state, "epoch": 3, "loss": 0.5}, "dictionary": _qinco_dictionary()}
        for name, content in contents.items():
            for zipped in (True, False):
                torch.save(content, self.folder / f"{name}-{zipped}.pt", _use_new_zipfile_serialization=zipped)

    def change(self, rng: random.Random, place: Path) -> None:
        valid = rng.choice(self.valid)
        if valid[:2] == b"PK" and rng.random() < 0.8:
            with zipfile.ZipFile(io.BytesIO(valid)) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
            name = rng.choice([name for name in parts if name.endswith("data.pkl") or rng.random() < 0.2])
            parts[name] = mutate_bytes(parts[name], rng, [parts[name]])
            with zipfile.ZipFile(place / "model.pt", "w") as archive:
                for name, part in parts.items():
                    archive.writestr(name, part)
        else:
            (place / "model.pt").write_bytes(mutate_bytes(valid, rng, self.valid))

    def open(self, rng: random.Random, place: Path) -> None:
        if rng.random() < 0.5:
            use(convert_official(place / "model.pt", 1.0))
        else:
            use(convert_qinco(place / "model.pt"))


def _qinco_dictionary() -> dict:
    """QINCo's newer layout."""
    state = {"data_mean": torch.zeros(SIZE), "data_std": torch.tensor(2.0)}
    for step in range(STEPS):
        state[f"steps.{step}.codebook.weight"] = torch.randn(CODEWORDS, SIZE)
        if step:
            state[f"steps.{step}.concat.mlp.weight"] = torch.randn(SIZE, 2 * SIZE)
            state[f"steps.{step}.concat.mlp.bias"] = torch.randn(SIZE)
            state[f"steps.{step}.residual_blocks.0.up_proj.weight"] = torch.randn(4, SIZE)
            state[f"steps.{step}.residual_blocks.0.down_proj.weight"] = torch.randn(SIZE, 4)
    return {"model": state, "parameters": {"qinco1_mode": True, "ivf_in_use": False}}


class Faiss(Target):
    """Faiss files of every kind that can be converted."""

    def make(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)
        product = faiss.ProductQuantizer(8, 2, 4)
        product.train(vectors)
        faiss.write_ProductQuantizer(product, str(self.folder / "product"))
        for name in ("PQ2x4", "OPQ2,PQ2x4", "RQ2x4", "LSQ2x4", "ITQ8,PQ2x4", "PCAR8,RQ2x4", "IVF2,PQ2x4", "Flat"):
            index = faiss.index_factory(8, name)
            index.train(vectors)
            faiss.write_index(index, str(self.folder / name))

    def change(self, rng: random.Random, place: Path) -> None:
        (place / "index").write_bytes(mutate_bytes(rng.choice(self.valid), rng, self.valid))

    def open(self, rng: random.Random, place: Path) -> None:
        use(convert_faiss(place / "index"))


def _vectors_file(folder: Path) -> Path:
    """A parquet file of embeddings with ids."""
    vectors = np.random.default_rng(0).normal(size=(20, SIZE)).astype(np.float32)
    file = folder / "vectors.parquet"
    pq.write_table(pa.table({"id": list(range(20)), "embeddings": list(vectors)}), file)
    return file


def void(_: object) -> None:
    """Nothing, whatever it is given."""


# The format, and its share of the inputs: what opens quickly is tried more often.
TARGETS: dict[str, tuple[Callable[[Path], Target], float]] = {
    "config.json": (Config, 0.2),
    "model.safetensors": (Checkpoint, 0.12),
    "codes parquet": (Codes, 0.24),
    "codes parquet, rows": (LoadedCodes, 0.01),
    "index folder": (Index, 0.08),
    "official and QINCo files": (Pickles, 0.15),
    "Faiss files": (Faiss, 0.2),
}
