"""Quick ways of searching give what slow ones give: scans against loops, kept numbers against the database."""

import gc
import sqlite3
import threading

import faiss
import numpy as np
import pytest
from conftest import MEMBERS, randomize
from threadpoolctl import ThreadpoolController, threadpool_limits

from rqmoe_hf import RQMoEConfig, RQMoEModel, unpack_codes
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.index.fitting import fit_scanner
from rqmoe_hf.index.mapped import MappedLists
from rqmoe_hf.index.ranking import Ranker
from rqmoe_hf.index.scans import (
    empty_index,
    entries_at,
    mapping,
    scan,
    scan_soon,
    scans_bytes,
    single_threaded_products,
    summable,
)

LISTS, EMPTY = 12, 5


@pytest.fixture(scope="module")
def additive() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["additive"]))


@pytest.fixture(scope="module", params=[[10, 3, 7, 4], [8] * 3, [8] * 37], ids=["bits", "bytes", "many bytes"])
def filled(request) -> tuple[faiss.Index, list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """A Faiss index, what its lists hold, row numbers and unpacked codes, and the bits of the codes."""
    random, bits = np.random.default_rng(0), request.param
    index = empty_index(bits, LISTS, False)
    assert scans_bytes(index) == (bits[0] == 8)
    rows, held = random.permutation(5000), []
    for number in range(LISTS):
        size = 0 if number == EMPTY else 20 + 9 * number  # some are no multiple of what Faiss takes at a time
        packed = random.integers(0, 256, (size, sum(bits) // 8), dtype=np.uint8)
        mine, rows = np.ascontiguousarray(rows[:size]), rows[size:]
        if size:
            index.invlists.add_entries(number, size, faiss.swig_ptr(mine), faiss.swig_ptr(packed))
            index.ntotal += size
        held.append((mine, unpack_codes(packed, len(bits), [1 << width for width in bits])))
    return index, held, bits


def loop(held, bits, look_up, lists):
    """Scores by row, of all that some lists hold."""
    tables, scores = np.split(look_up, np.cumsum([1 << width for width in bits])[:-1]), {}
    for number in lists:
        for row, code in zip(*held[number], strict=True):
            scores[int(row)] = sum(float(table[value]) for table, value in zip(tables, code, strict=True))
    return scores


@pytest.mark.parametrize("way", [scan, scan_soon])
@pytest.mark.parametrize("count", [1, 9, 300])  # of the last there are fewer
def test_lists_are_scanned_as_a_loop_would(filled, count, way):
    index, held, bits = filled
    random = np.random.default_rng(1)
    look_ups = random.integers(-50, 50, (6, sum(1 << width for width in bits))).astype(np.float32)  # sums are exact
    lists = np.stack([random.permutation(LISTS)[:3] for _ in range(6)])
    lists[0], lists[1, 1], lists[2] = [EMPTY, 1, 2], -1, -1
    scores, places = np.empty((6, count), np.float32), np.empty((6, count), np.int64)
    way(index, look_ups, np.zeros((6, 3), np.float32), lists, scores, places)
    rows, codes = entries_at(index, places)
    stored = {int(row): code for ids, held_codes in held for row, code in zip(ids, held_codes, strict=True)}
    for place in range(6):
        known = loop(held, bits, look_ups[place], [number for number in lists[place] if number >= 0])
        expected = sorted(known.values(), reverse=True)[:count]
        there = len(expected)
        np.testing.assert_array_equal(scores[place, :there], expected)
        assert [known[row] for row in rows[place, :there].tolist()] == expected
        assert len(set(rows[place, :there].tolist())) == there and (rows[place, there:] == -1).all()
        read = unpack_codes(codes[place, :there], len(bits), [1 << width for width in bits])
        assert read.tolist() == [stored[row].tolist() for row in rows[place, :there].tolist()]


def test_mapped_lists_hold_what_was_written(tmp_path):
    """Read by Faiss, all at once, and copied; between other bytes of the file."""
    random, sizes, width = np.random.default_rng(0), np.array([0, 3, 0, 1, 250, 0]), 7
    codes = [random.integers(0, 256, (size, width), np.uint8) for size in sizes]
    rows = [random.integers(0, 1 << 62, size) for size in sizes]
    written = b"".join(part.tobytes() for pair in zip(codes, rows, strict=True) for part in pair)
    (tmp_path / "lists").write_bytes(b"before" + written + b"behind")
    mapped = MappedLists(tmp_path / "lists", 6, 6 + len(written), sizes, width)
    held = {(number << 32) + place: (codes[number][place], rows[number][place])
            for number, size in enumerate(sizes) for place in range(size)}  # fmt: skip
    places = random.permutation([*held, -1, -1]).reshape(2, -1)
    found_rows, found_codes = mapped.entries_at(places)
    for place, row, code in zip(places.flat, found_rows.flat, found_codes.reshape(-1, width), strict=True):
        expected_code, expected_row = held.get(place, (np.zeros(width), -1))
        assert row == expected_row and (code == expected_code).all()
    for lists in (mapped.lists, mapped.copied()):
        for number, size in enumerate(sizes.tolist()):
            assert lists.list_size(number) == size
            if size:
                read = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)
                np.testing.assert_array_equal(read, codes[number])
                np.testing.assert_array_equal(faiss.rev_swig_ptr(lists.get_ids(number), size), rows[number])


def test_mapped_lists_that_are_empty_or_do_not_fit(tmp_path):
    (tmp_path / "lists").write_bytes(b"x" * 100)
    nothing = MappedLists(tmp_path / "lists", 9, 9, np.zeros(3, np.int64), 4)
    rows, codes = nothing.entries_at(np.full((2, 5), -1))
    assert (rows == -1).all() and codes.shape == (2, 5, 4) and nothing.copied().compute_ntotal() == 0
    for sizes in ([3], [-1, 6], [(1 << 62) + 5, 0], [1 << 63 - 4] * 8):
        with pytest.raises(ValueError, match="other sizes"):
            MappedLists(tmp_path / "lists", 0, 60, np.array(sizes, np.int64), 4)
    assert len(MappedLists(tmp_path / "lists", 0, 60, np.array([5]), 4).entries_at(np.arange(5))[0]) == 5


def test_products_take_one_thread_while_anybody_scans():
    """And get all of them back when the last has left, in whatever order they leave."""
    numpys = ThreadpoolController().select(threading_layer="pthreads")  # as numpy's
    threads = lambda: {library["num_threads"] for library in numpys.info()}  # noqa: E731
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with mapping(2):
            entered.set()
            left.wait(60)

    with threadpool_limits(2, user_api="blas"):
        assert threads() == {2}
        with single_threaded_products():
            thread = threading.Thread(target=other)
            thread.start()
            assert entered.wait(60) and threads() == {1}
        left.set()
        thread.join()
        assert threads() == {2}
        with mapping(3):
            assert threads() == {1}
        assert threads() == {2}


@pytest.mark.parametrize("codes", [1, 17, 64])
def test_sums_of_rounded_tables_are_exact(codes):
    """Whatever the order of the sum; and the rounding is as fine as float32 allows."""
    random = np.random.default_rng(codes)
    tables = (random.normal(size=(3, codes, 256)) * np.exp(random.normal(size=(3, 1, 1)) * 9)).astype(np.float32)
    tables[2] = 0
    rounded = summable(tables.reshape(3, -1).copy()).reshape(tables.shape)
    largest = np.abs(tables).max(axis=2).sum(axis=1)[:, None, None]
    assert (np.abs(rounded - tables) <= largest * 1.001 * 2.0**-24).all() and not rounded[2].any()
    for _ in range(200):
        chosen = rounded[:, np.arange(codes), random.integers(0, 256, codes)]
        order = random.permutation(codes)
        added = np.zeros(3, np.float32)
        for code in order:
            added += chosen[:, code]
        np.testing.assert_array_equal(added, chosen.astype(np.float64).sum(axis=1))


def test_equal_codes_have_equal_scores_wherever_they_are(clustered):
    """In lists of any length, so that the last one is also summed by itself."""
    config = RQMoEConfig.additive(hidden_size=16, num_codebooks=21, codebook_size=256)
    quantizer = randomize(RQMoEModel(config))
    code, queries = quantizer.compress(clustered[:1]), clustered[1:9]
    scores = []
    for count in range(1, 40):
        with RQMoEIndex(quantizer, metric="inner_product", kind="flat") as index:
            index.add(codes=np.repeat(code, count, axis=0))
            scanner = index._ranker.refresh(index._database.state())
            assert scans_bytes(scanner._index)
            scores.append(scanner.search(queries, count, 1)[0])
    for some in scores:
        assert (some == scores[0]).all()


def test_thousands_of_scans_leave_faiss_as_it_was(filled):
    """A scanner that Python frees, instead of Faiss, makes SWIG forget what objects are after a few of them."""
    index, _, bits = filled
    look_ups, lists = np.zeros((1, sum(1 << width for width in bits)), np.float32), np.array([[3]])
    scores, places = np.empty((1, 4), np.float32), np.empty((1, 4), np.int64)
    for _ in range(2000):
        scan_soon(index, look_ups, np.zeros((1, 1), np.float32), lists, scores, places)
    gc.collect()
    held = index.pq.centroids if scans_bytes(index) else index.rq.codebooks
    assert held.size() == look_ups.size and faiss.IndexFlatL2(3).ntotal == 0


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_look_up_tables_are_products_and_what_norms_add(additive, clustered, metric):
    codes = additive.compress(clustered[:500])
    scanner = fit_scanner(additive, codes, additive.config.num_codebooks, metric, 3)
    queries = clustered[:7] / np.linalg.norm(clustered[:7], axis=1, keepdims=True)
    norms, chosen = scanner.tables.norms, np.zeros((7, 2), np.int64)
    found, lists_add = scanner._look_ups(queries, 0.1, chosen, False)
    assert lists_add.shape == (7, 2) and not lists_add.any()
    for query, look_up in zip(queries, found, strict=True):
        products = [float(codeword @ query) for table in scanner.tables.codewords for codeword in table]
        np.testing.assert_allclose(look_up[: len(products)], products, rtol=1e-5, atol=1e-5)
        if metric == "inner_product":
            assert len(look_up) == len(products)
            continue
        threshold = scanner.thresholds(query[None], 0.1)[0]
        added = [-norm * norm / 2 if metric == "l2" else -threshold * norm for norm in norms.tolist()]
        np.testing.assert_allclose(look_up[-len(norms) :], added, rtol=1e-5, atol=1e-6)
        assert not look_up[len(products) : -len(norms)].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_one_thread_is_this_one(threads):
    with mapping(threads) as each:
        found = list(each(lambda left, right: (left + right, threading.current_thread()), range(9), range(9)))
    assert [total for total, _ in found] == list(range(0, 18, 2))
    assert (threads == 1) == (found[0][1] is threading.current_thread())


@pytest.mark.parametrize("settings", [{"shortlist": 40}, {"shortlist": 40, "filter": {"n": {"$gte": 700}}},
                                      {"shortlist": 3000}])  # fmt: skip
def test_many_queries_are_ranked_a_few_at_a_time(additive, clustered, monkeypatch, settings):
    with RQMoEIndex(additive, kind="ivf", num_lists=LISTS) as index:
        index.add(clustered[:3000], metadata=[{"n": number} for number in range(3000)])
        expected = index.search(clustered[3000:3050], 7, nprobe=LISTS, **settings)
        sizes, ranked = [], Ranker._ranked
        monkeypatch.setattr("rqmoe_hf.index.ranking.CANDIDATES", 300)
        monkeypatch.setattr(Ranker, "_ranked", lambda self, queries, *rest: (
            sizes.append(len(queries)), ranked(self, queries, *rest))[1])  # fmt: skip
        found = index.search(clustered[3000:3050], 7, nprobe=LISTS, **settings)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(sizes) == max(1, 300 // settings["shortlist"]) and sum(sizes) == 50


def test_numbers_that_were_checked_once_are_read_again(additive, clustered, tmp_path):
    with RQMoEIndex(additive, tmp_path / "index") as index:
        index.add(clustered[:10])
    with RQMoEIndex.load(tmp_path / "index", additive) as reader:
        assert len(reader) == 10
        with RQMoEIndex.load(tmp_path / "index", additive) as writer:
            writer.add(clustered[10:13])
            assert len(reader) == len(writer) == 13
        (database,) = (tmp_path / "index").glob("*.sqlite")
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE state SET value = 12 WHERE name = 'count'")
        with pytest.raises(ValueError, match="checksum of its state"):
            len(reader)
        connection.close()


def test_changes_check_pages_and_searches_do_not(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(clustered[:10])
    run = index._database._connection.execute
    with pytest.raises(RuntimeError, match="on purpose"), index._database.writing():
        assert run("PRAGMA cell_size_check").fetchone() == (1,)
        raise RuntimeError("on purpose")
    with index._database.reading():
        assert run("PRAGMA cell_size_check").fetchone() == (0,)
