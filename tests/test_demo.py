"""The demonstration on the real documentation of this Python, with the real encoder."""

import numpy as np
import pytest

from rqmoe_hf import demo
from rqmoe_hf.bundled import bundled_quantizers, load_quantizer


@pytest.fixture
def small_collection(monkeypatch, tmp_path):
    names, texts = demo.collect_documentation()
    wanted = [row for row, name in enumerate(names) if name.split(".")[0] in ("csv", "datetime", "multiprocessing")]
    rows = wanted + [row for row in range(450) if row not in wanted]
    monkeypatch.setattr(demo, "collect_documentation", lambda: ([names[r] for r in rows], [texts[r] for r in rows]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_documentation_is_real_and_repeatable():
    names, texts = demo.collect_documentation()
    assert len(texts) == len(set(texts)) > 5000
    assert {"csv.reader", "datetime.date.today", "json"} <= set(names)
    assert demo.collect_documentation() == (names, texts)


def test_demo_answers_over_the_codes(small_collection, tmp_path):
    result = demo.run_demo([], None, None, False, tmp_path)
    best = [result.names[answer.compressed[0][0]] for answer in result.answers]
    assert best[0].startswith("csv")
    assert best[2].startswith("datetime")
    assert result.float_bytes / result.compressed_bytes == 48
    assert result.report.recall_10_at_10 > 0.6
    again = demo.run_demo(["a question"], None, None, False, tmp_path)
    assert again.seconds["embed"] < 0.2 * result.seconds["embed"]


def test_demo_trains_on_the_spot(small_collection, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "embed_cached", lambda texts, encoder: _clusters(1500))
    result = demo.run_demo(["how do I read a csv file"], None, None, True, tmp_path / "run")
    assert result.report.bytes_per_vector == 8
    assert (tmp_path / "run" / "config.json").exists()


def _clusters(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 384))[rng.integers(50, size=count)] + 0.3 * rng.normal(size=(count, 384))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_bundled_quantizers_load_and_are_small():
    found = bundled_quantizers()
    assert {"minilm-384-8-bytes", "minilm-384-32-bytes", "mpnet-768-16-bytes"} <= set(found)
    for name, folder in found.items():
        model = load_quantizer(name)
        assert model.is_initialized
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 20 * 2**20
        assert (folder / "README.md").exists()
        assert (folder / "recipe.yaml").exists()


def test_an_encoder_without_quantizer_is_told_what_to_do():
    with pytest.raises(ValueError, match="No bundled quantizer fits the 1000 dimensions of x: train one"):
        demo.choose_quantizer(None, "x", 1000)
