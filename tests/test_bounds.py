"""What is in memory at a time: tables are read, drawn from and scanned without a copy or a list of all rows."""

import io
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from conftest import MEMBERS, randomize
from datasets import IterableDataset
from safetensors.numpy import load_file

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import as_array, load_embeddings
from rqmoe_hf.data.parquet import BATCH_ROWS, READ_AT_ONCE
from rqmoe_hf.data.sampling import PooledSampler, sample_rows
from rqmoe_hf.data.shards import fixed_size_column
from rqmoe_hf.data.sources import parquet_options, sample_array, split_dataset
from rqmoe_hf.index import RQMoEIndex, fitting, ranking, scanning
from rqmoe_hf.index.documents import Database
from rqmoe_hf.saving import write_tensors
from rqmoe_hf.training import RQMoETrainingArguments, initialization, trainer


@contextmanager
def allocates_at_most(size: int):
    """Fails if Python and numpy hold more than so many new bytes at once; the same on every machine."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= size, f"{peak:,} bytes"


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 0), (40, 10), (41, 10), (100, 3), (1, 1)])
def test_rows_that_are_drawn_are_different_and_all_as_likely(total, count):
    generator, drawn = np.random.default_rng(0), np.zeros(total)
    for _ in range(2_000):
        rows = sample_rows(total, count, generator)
        assert len(rows) == len(np.unique(rows)) == count and (np.diff(rows) > 0).all()
        drawn[rows] += 1
    share = count / total
    assert np.abs(drawn / 2_000 - share).max() <= 5 * (share * (1 - share) / 2_000) ** 0.5


def test_drawing_from_a_billion_rows_keeps_what_is_drawn_only():
    with allocates_at_most(1 << 20):
        rows = sample_rows(1_000_000_000, 10_000, np.random.default_rng(0))
    assert len(np.unique(rows)) == 10_000 and rows.max() > 900_000_000


@pytest.mark.parametrize("total", [1, 7, 8, 100, 1_003])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(total):
    sampler = PooledSampler(total, seed=3, block_rows=8, pool_blocks=5)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(first) == list(range(total)) and len(sampler) == total
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(total))
    if total >= 100:
        assert second != first and list(PooledSampler(total, 4, 8, 5)) != first
        assert np.abs(np.corrcoef(np.arange(total), first)[0, 1]) < 0.3


def test_an_epoch_of_a_billion_rows_can_begin():
    with allocates_at_most(40 << 20):  # a list of all rows would take 36 GB
        rows = iter(PooledSampler(1_000_000_000, seed=0))
        assert len({next(rows) for _ in range(5_000)}) == 5_000


def test_large_training_sets_are_shuffled_without_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MANY_ROWS", 1_000)
    monkeypatch.setattr(trainer, "PooledSampler", lambda *given: PooledSampler(*given, block_rows=16, pool_blocks=4))
    embeddings = np.random.default_rng(0).standard_normal((1_200, MEMBERS["additive"].hidden_size), np.float32)
    args = RQMoETrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=100, report_to="none",
                                  eval_strategy="no", load_best_model_at_end=False)  # fmt: skip
    model = randomize(RQMoEModel(MEMBERS["additive"]))
    made = trainer.RQMoETrainer(model, args, train_dataset=load_embeddings(embeddings))
    loader, epochs = made.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(np.concatenate([batch["embeddings"].numpy() for batch in loader]))
    for rows in epochs:
        np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(embeddings, axis=0))
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != embeddings).any()


def test_what_is_held_out_of_a_large_set_leaves_slices(monkeypatch):
    monkeypatch.setattr("rqmoe_hf.data.sources.MANY_ROWS", 500)
    embeddings = np.arange(3_000, dtype=np.float32).reshape(1_000, 3)
    rest, held = split_dataset(load_embeddings(embeddings), 50, seed=0)
    assert len(held) == 50 and rest._indices is None
    found = np.concatenate([as_array(rest), as_array(held)])
    np.testing.assert_array_equal(found[np.argsort(found[:, 0])], embeddings)


def test_a_stream_is_read_no_further_than_its_sample():
    read = []

    def rows():
        for number in range(1_000_000):
            read.append(number)
            yield {"embeddings": [float(number), 1.0]}

    sample = sample_array(IterableDataset.from_generator(rows).with_format("torch"), 3_000, seed=0)
    np.testing.assert_array_equal(sample, np.stack([np.arange(3_000), np.ones(3_000)], axis=1))
    assert sample.dtype == np.float32 and 3_000 <= len(read) <= 3_001
    few = sample_array(IterableDataset.from_generator(lambda: iter([{"embeddings": [1.0, 2.0]}])), 10, seed=0)
    np.testing.assert_array_equal(few, [[1, 2]])


class Requests(io.FileIO):
    """A file that notes how many bytes are asked for at a time."""

    def __init__(self, path):
        super().__init__(path)
        self.sizes: list[int] = []

    def read(self, size=-1):
        self.sizes.append(size)
        return super().read(size)


def test_what_a_row_group_is_decoded_from_is_read_in_parts(tmp_path):
    values = np.random.default_rng(0).standard_normal((200_000, 32), np.float32)
    pq.write_table(pa.table({"embeddings": fixed_size_column(values)}), tmp_path / "one.parquet")
    assert pq.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1
    asked, rows = {}, {}
    options = parquet_options()
    for name, given in (("ours", options["fragment_scan_options"]), ("pyarrow's", None)):
        opened = Requests(tmp_path / "one.parquet")
        fragment = pa.dataset.ParquetFileFormat(default_fragment_scan_options=given).make_fragment(opened)
        rows[name] = [len(batch) for batch in fragment.to_batches(batch_size=options["batch_size"])]
        asked[name] = max(opened.sizes)
    assert asked["ours"] <= READ_AT_ONCE < asked["pyarrow's"]
    assert max(rows["ours"]) <= BATCH_ROWS and sum(rows["ours"]) == len(values)


def test_statistics_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(initialization, "BLOCK", 7)
    embeddings = np.random.default_rng(0).normal(5, 2, (100, 6)).astype(np.float32)
    mean, variance, deviation = initialization._moments(embeddings)
    np.testing.assert_allclose(mean, embeddings.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(variance, embeddings.var(axis=0, dtype=np.float64).mean())
    np.testing.assert_allclose(deviation, np.abs(np.square(embeddings, dtype=np.float64).sum(1) - 1).mean())
    expected = (embeddings - mean) / variance**0.5
    np.testing.assert_allclose(initialization.standardize(embeddings, mean, variance**0.5), expected, rtol=1e-6)


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2_000, 8), np.uint8)


@pytest.fixture
def model() -> RQMoEModel:
    return randomize(RQMoEModel(RQMoEConfig.additive(hidden_size=8, num_codebooks=8, codebook_size=256)))


class Counted:
    """Batches of codes; tells how many rows were read, and how many of them were not in the scanner yet."""

    def __init__(self, codes: np.ndarray, scanner: scanning.Scanner):
        self.codes, self.scanner, self.passes, self.ahead = codes, scanner, 0, 0

    def __iter__(self):
        self.passes += 1
        for start in range(0, len(self.codes), 50):
            if self.passes == 2:
                self.ahead = max(self.ahead, start - len(self.scanner))
            yield np.arange(start, start + 50), self.codes[start : start + 50]


@pytest.mark.parametrize("lists", [1, 9])
def test_codes_go_into_the_lists_as_they_are_read(model, codes, monkeypatch, lists):
    monkeypatch.setattr(scanning, "GATHERED_ROWS", 200)
    scanner = fitting.fit_scanner(model, codes, 8, "cosine", lists)
    counted = Counted(codes, scanner)
    scanner.add(counted)
    assert counted.passes == 2 and counted.ahead < 200 and len(scanner) == 2_000
    found = [scanner._list(number) for number in range(lists)]
    rows, stored = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.testing.assert_array_equal(stored[np.argsort(rows), :8], codes)
    sums = scanner.sums(codes)
    nearest = (sums @ scanner.tables.centroids.T).argmax(axis=1)
    assert all((nearest[part] == number).all() for number, (part, _) in enumerate(found))
    with pytest.raises(ValueError, match="gone through twice, got an iterator"):
        scanner.add(iter([(np.arange(50), codes[:50])]))


@pytest.mark.parametrize("lists", [1, 30])
def test_a_snapshot_is_written_without_a_copy(model, codes, tmp_path, lists):
    scanner = fitting.fit_scanner(model, codes, 8, "l2", lists)
    many = np.tile(codes, (100, 1))
    scanner.add([(np.arange(len(many)), many)])
    with allocates_at_most(len(many) * scanner.bytes_per_vector // 4):
        scanner.save(tmp_path / "scan", {"version": 1}, with_codewords=False)
    opened, notes = scanning.Scanner.load(tmp_path / "scan", scanner.tables.codewords, [8] * 8, None, "l2")
    asked = np.random.default_rng(1).standard_normal((3, 8), np.float32)
    for one, other in zip(scanner.search(asked, 20, lists), opened.search(asked, 20, lists), strict=True):
        np.testing.assert_array_equal(one, other)
    assert notes == {"version": 1}


def test_tensors_that_are_written_in_parts(tmp_path):
    floats, wide = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3)
    parts = [np.arange(5, dtype=np.uint8), np.arange(2)]
    write_tensors(tmp_path / "file", {"floats": floats, "wide": wide}, "parts", 21, iter(parts), {"a": "b"})
    found = load_file(tmp_path / "file")
    np.testing.assert_array_equal(found["floats"], floats)
    np.testing.assert_array_equal(found["wide"], wide)
    assert found["parts"].tobytes() == b"".join(part.tobytes() for part in parts)
    with pytest.raises(ValueError, match="parts should have 20 bytes, its parts have 21"):
        write_tensors(tmp_path / "file", {}, "parts", 20, parts, {})


def test_rows_at_places_are_those_of_all_rows_in_order(codes, model, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.index.documents.CHUNK", 64)
    with RQMoEIndex(model) as index:
        index.add(codes=codes[:1_000])
        index.remove(range(100, 300))
        database: Database = index._database
        with database.reading() as state:
            rows, places = database.matching(None), ranking.sample_places(state.count, 1_000)
            np.testing.assert_array_equal(database.rows_at(places), rows)
            some = np.array([0, 63, 64, 65, 500, 799])
            np.testing.assert_array_equal(database.rows_at(some), rows[some])
            assert database.rows_at(np.empty(0, np.int64)).tolist() == []
            np.testing.assert_array_equal(np.sort(database.removed(0)[0]), np.setdiff1d(np.arange(1, 1_001), rows))
