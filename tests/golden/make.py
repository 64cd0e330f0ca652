"""Wrote the golden files: small files of every format, and what they must give. Run again only for a new format.

python tests/golden/make.py
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import compress_shards
from rqmoe_hf.index import RQMoEIndex

GOLDEN = Path(__file__).parent
COMMON = {"hidden_size": 8, "num_codebooks": 3, "codebook_size": 12, "intermediate_size": 4}
MEMBERS = {
    "additive": RQMoEConfig.additive(**COMMON, codebook_sizes=[12, 12, 5], local_search=2),
    "rqmoe": RQMoEConfig(**COMMON, instruction_size=5, num_expert_layers=2),
    "official": RQMoEConfig.official(**COMMON),
    "qinco": RQMoEConfig.qinco(**COMMON, num_expert_layers=2),
}


def make_models(vectors: np.ndarray) -> None:
    """Config, weights, and the codes and reconstructions of some vectors, for every member."""
    for number, (name, config) in enumerate(MEMBERS.items()):
        generator = torch.Generator().manual_seed(number)
        model = RQMoEModel(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
            model.mean.copy_(torch.randn(8, generator=generator) * 0.1)
            model.scale.fill_(0.8)
        model.save_pretrained(GOLDEN / name)
        found = model.encode(torch.from_numpy(vectors))
        np.savez(
            GOLDEN / name / "expected.npz",
            codes=found.codes.numpy().astype(np.uint8),
            reconstruction=found.reconstruction.numpy(),
            prefix=model.decode(found.codes[:, :2]).reconstruction.numpy(),
            packed=model.compress(vectors),
        )


def make_collections(vectors: np.ndarray) -> None:
    """A parquet file of codes, and the folder of an index with what a search finds."""
    model = RQMoEModel.from_pretrained(GOLDEN / "rqmoe")
    model.name_or_path = "golden/rqmoe"  # as the files shall say
    table = pa.table({"id": [f"id {n}" for n in range(len(vectors))], "embeddings": list(vectors)})
    pq.write_table(table, GOLDEN / "vectors.parquet")
    compress_shards(GOLDEN / "vectors.parquet", GOLDEN / "codes", model)
    (GOLDEN / "vectors.parquet").unlink()
    many = np.random.default_rng(1).normal(size=(150, 8)).astype(np.float32)
    with RQMoEIndex(model, GOLDEN / "index", kind="ivf", metric="l2", num_lists=3, keep_floats=True) as index:
        index.add(many, texts=[f"text {n}" for n in range(150)], metadata=[{"n": n} for n in range(150)])
        index.remove(range(140, 150))
        index.save()
        found = {
            rescore: index.search(vectors[:4], 5, shortlist=30, nprobe=3, rescore=rescore)
            for rescore in ("floats", "codes", "tables")
        }
    arrays = {f"{name}_{part}": array for name, pair in found.items() for part, array in zip(("s", "i"), pair)}  # noqa: B905
    np.savez(GOLDEN / "search.npz", **arrays)
    (GOLDEN / "index" / "writer.lock").unlink(missing_ok=True)


def main() -> None:
    """Replaces all of them."""
    for name in (*MEMBERS, "codes", "index"):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    np.save(GOLDEN / "vectors.npy", vectors)
    make_models(vectors)
    make_collections(vectors)


if __name__ == "__main__":
    main()
