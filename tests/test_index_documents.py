"""Texts, metadata and filters of an index, against plain Python over dictionaries."""

import contextlib
import sqlite3

import numpy as np
import pytest
from conftest import MEMBERS, SIZE, randomize

from rqmoe_hf import RQMoEModel
from rqmoe_hf.index import Document, RQMoEIndex
from rqmoe_hf.index.documents import Database
from rqmoe_hf.index.filters import compile_filter

MISSING = object()
FIELDS = ("number", "word", "flag", "nested.field", r"with\.dot", "list", "absent", "$id")
VALUES = (0, 1, 2, -3, 2.5, 1e300, True, False, "", "a", "b", "10", "Ünïcode 雪", "'; DROP TABLE vectors", '"', "%")


@pytest.fixture(scope="module")
def additive() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["additive"]))


def look_up(metadata, field):
    for part in [field] if field == "$id" else field.replace(r"\.", "\0").split("."):
        part = part.replace("\0", ".")
        if not isinstance(metadata, dict) or part not in metadata:
            return MISSING
        metadata = metadata[part]
    return metadata


def same(found, value):
    if value is None:
        return found is None or found is MISSING
    alike = isinstance(found, str) == isinstance(value, str) and isinstance(found, (str, int, float))
    return alike and found == value


def holds(filter, metadata) -> bool:
    """What a filter means, written down once more."""
    results = []
    for name, wanted in filter.items():
        if name == "$and":
            results.append(all(holds(part, metadata) for part in wanted))
        elif name == "$or":
            results.append(any(holds(part, metadata) for part in wanted))
        elif name == "$not":
            results.append(not holds(wanted, metadata))
        else:
            found = look_up(metadata, name)
            conditions = wanted if isinstance(wanted, dict) else {"$eq": wanted}
            results.extend(condition(found, operator, value) for operator, value in conditions.items())
    return all(results)


def condition(found, operator, value) -> bool:
    if operator in ("$eq", "$ne"):
        return same(found, value) == (operator == "$eq")
    if operator in ("$in", "$nin"):
        return any(same(found, one) for one in value) == (operator == "$in")
    if operator == "$exists":
        return (found is not MISSING) == value
    if operator == "$empty":
        return (found is MISSING or found is None or found == "" or found == []) == value
    if operator == "$contains":
        return isinstance(found, list) and any(same(one, value) for one in found)
    if operator == "$text":
        return isinstance(found, str) and value in found
    if operator == "$itext":
        return isinstance(found, str) and value.casefold() in found.casefold()
    if isinstance(found, str) != isinstance(value, str) or not isinstance(found, (str, int, float)):
        return False
    return {"$gt": found > value, "$gte": found >= value, "$lt": found < value, "$lte": found <= value}[operator]


def random_metadata(rng) -> dict:
    def pick():
        return VALUES[rng.integers(len(VALUES))]

    made = {"number": int(rng.integers(-5, 5)) / 2, "word": "ab"[: rng.integers(3)], "flag": bool(rng.integers(2))}
    made |= {"nested": {"field": pick()}, "with.dot": pick(), "other": None}
    made |= {"list": [pick() for _ in range(rng.integers(3))]}
    made = {name: value for name, value in made.items() if rng.random() < 0.8}
    if rng.random() < 0.3:
        made[("number", "word")[rng.integers(2)]] = (None, pick(), {"field": 1}, [1, "a"])[rng.integers(4)]
    return made


def random_filter(rng, depth=0) -> dict:
    def pick():
        return VALUES[rng.integers(len(VALUES))] if rng.random() < 0.9 else None

    def one():
        kind = rng.integers(9)
        if kind == 0:
            return pick()
        if kind == 1:
            return {("$eq", "$ne")[rng.integers(2)]: pick()}
        if kind == 2:
            return {("$in", "$nin")[rng.integers(2)]: [pick() for _ in range(rng.integers(4))]}
        if kind == 3:
            return {"$exists": bool(rng.integers(2))}
        if kind == 4:
            return {"$contains": pick()}
        if kind == 5:
            return {"$empty": bool(rng.integers(2))}
        if kind == 6:
            part = ("", "a", "B", "ÜNÏ", "nï", "雪", "%", "[]")[rng.integers(8)]
            return {("$text", "$itext")[rng.integers(2)]: part}
        operators = ("$gt", "$gte", "$lt", "$lte")
        return {operators[rng.integers(4)]: VALUES[rng.integers(len(VALUES))] for _ in range(rng.integers(1, 3))}

    if depth < 3 and rng.random() < 0.4:
        name = ("$and", "$or", "$not")[rng.integers(3)]
        if name == "$not":
            return {"$not": random_filter(rng, depth + 1)}
        return {name: [random_filter(rng, depth + 1) for _ in range(rng.integers(4))]}
    return {FIELDS[rng.integers(len(FIELDS))]: one() for _ in range(rng.integers(1, 3))}


@pytest.mark.parametrize("ids", [range(-5, 295), ["a", "b", "10", "%", *map(str, range(100, 396))]])
def test_random_filters_mean_what_they_say(additive, clustered, ids):
    rng = np.random.default_rng(0)
    metadata = [random_metadata(rng) if number % 10 else None for number in range(300)]
    index = RQMoEIndex(additive)
    index.add(clustered[:300], metadata=metadata, ids=ids)
    counts = []
    for _ in range(400):
        filter = random_filter(rng)
        expected = [id for id, one in zip(ids, metadata, strict=True) if holds(filter, {"$id": id, **(one or {})})]
        assert [document.id for document in index.documents(filter)] == expected, filter
        assert index.count(filter) == len(expected)
        counts.append(len(expected))
    assert sum(0 < count < 300 for count in counts) > 100  # those tell documents apart


def test_filters_come_before_the_search(additive, clustered, monkeypatch):
    """Hits are the best among what the filter leaves, whether few are decoded at once or many are scanned."""
    restored = additive.decompress(additive.compress(clustered))
    for kind in ("flat", "ivf"):
        index = RQMoEIndex(additive, kind=kind, metric="l2")
        index.add(clustered, metadata=[{"even": number % 2 == 0, "rare": number % 1000} for number in range(6000)])
        queries = clustered[:4] + 0.1
        distances = ((queries[:, None] - restored) ** 2).sum(axis=2)
        for filter, rows in (
            ({"even": True}, np.arange(0, 6000, 2)),
            ({"rare": 7}, np.arange(7, 6000, 1000)),
            ({"rare": {"$gte": 1}}, np.setdiff1d(np.arange(6000), np.arange(0, 6000, 1000))),
        ):
            scores, ids = index.search(queries, 10, filter=filter, shortlist=60)
            best = np.sort(distances[:, rows], axis=1)[:, :10]
            np.testing.assert_allclose(scores, -best, rtol=1e-3, atol=1e-3)
            assert np.isin(ids, rows).all() and ids.shape[1] == min(10, len(rows))
        few, _ = index.search(queries, 3, ids=[5, 9, 9, 4000])
        np.testing.assert_allclose(few, -np.sort(distances[:, [5, 9, 4000]], axis=1), rtol=1e-3, atol=1e-3)
        _, both = index.search(queries, 3, ids=range(10), filter={"even": True})
        assert set(both.flatten()) <= {0, 2, 4, 6, 8} and both.shape == (4, 3)


def test_a_filter_on_a_field_that_no_document_has_finds_nothing(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(clustered[:50], metadata=[{"there": 1}] * 50)
    scores, ids = index.search(clustered[:2], 5, filter={"nowhere": 1})
    assert scores.shape == ids.shape == (2, 0)
    assert index.count({"nowhere": {"$gt": 0}}) == 0
    assert index.count({"nowhere": {"$ne": 1}}) == 50  # the opposite


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ([], "A filter is a dictionary"),
        ({1: 2}, "A filter is a dictionary"),
        ({"a": {}}, "The filter on 'a' is empty"),
        ({"a": {"$regex": "x"}}, r"operator '\$regex' on 'a' is not one of \$eq"),
        ({"a": {"b": 1}}, "operator 'b' on 'a' is not one of"),
        ({"$nor": []}, r"'\$nor' is not understood here"),
        ({"$and": {"a": 1}}, "a list of filters"),
        ({"$or": [1]}, "A filter is a dictionary"),
        ({"$not": [{"a": 1}]}, "is not understood here"),
        ({"a": {"$in": "abc"}}, "expects a list of values"),
        ({"a": {"$in": [[1]]}}, "expects a string, a number"),
        ({"a": {"$in": [float("inf")]}}, "expects finite numbers"),
        ({"a": [1, 2]}, "expects a string, a number"),
        ({"a": {"$gt": None}}, "expects a number or a string"),
        ({"a": float("nan")}, "got NaN"),
        ({"a": 2**70}, "does not fit into 64 bits"),
        ({"a": {"$exists": 1}}, "expects True or False"),
        ({"a": {"$empty": None}}, "expects True or False"),
        ({"a": {"$text": 1}}, r"\$text on 'a' expects a string, got 1"),
        ({"a": {"$itext": None}}, "expects a string, got None"),
        ({"$ids": 1}, r"expected a field's name, \$id, \$and"),
        ({'a"b': 1}, "quotation marks"),
        ({"a\\b": 1}, "backslashes"),
        ({"": 1}, "may not be empty"),
        ({"a..b": 1}, "may not be empty"),
        ({"a\\\\.b": 1}, "backslashes"),
    ],
)
def test_malformed_filters_are_refused(additive, clustered, filter, message):
    index = RQMoEIndex(additive)
    index.add(clustered[:5], metadata=[{"a": 1}] * 5)
    for call in (lambda: index.count(filter), lambda: index.search(clustered[0], filter=filter),
                 lambda: index.remove(filter=filter), lambda: list(index.documents(filter))):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert len(index) == 5


def test_deep_and_wide_filters(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(clustered[:5], metadata=[{"a": number} for number in range(5)])
    assert index.count({"a": {"$in": list(range(1, 300_000))}}) == 4
    assert index.count({"$or": [{"a": number} for number in range(2, 300)]}) == 3
    deep = {"a": 1}
    for _ in range(40):
        deep = {"$not": deep}
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        index.count(deep)
    with pytest.raises(ValueError, match="too large or too deep"):
        index.count({"$or": [{"a": number} for number in range(5_000)]})
    assert index.count({"a": 1}) == 1


def test_values_are_bound_never_pasted():
    condition, values = compile_filter({"x' OR 1=1 --": "'; DROP TABLE vectors; --"})
    assert "DROP" not in condition and "1=1" not in condition
    assert "'; DROP TABLE vectors; --" in values


def test_texts_and_metadata_come_back_as_they_were(additive, clustered):
    texts = ["", "plain", "Zeile\nzwei", "雪 🎿 \0 null", "'quoted' \"text\""]
    metadata = [{"key \"with' marks": [1, {"deep": None}]}, {}, None, {"number": np.int64(3), "float": 0.1},
                {"big": 2**80, "é": "ü"}]  # fmt: skip
    index = RQMoEIndex(additive)
    index.add(clustered[:5], texts=texts, metadata=metadata, ids=list("abcde"))
    found = index.get(["c", "a", "e", "b", "d"])
    expected = [Document(id, text, one or {}) for id, text, one in zip("abcde", texts, metadata, strict=True)]
    assert found == [expected[place] for place in (2, 0, 4, 1, 3)]
    assert list(index.documents()) == expected
    assert index.get(["x", "a"], missing_ok=True) == expected[:1]


def test_ids_are_compared_whole(additive, clustered):
    """SQLite's JSON, by which many values travel, ends strings at the character U+0000."""
    ids = ["a", "a\0b", "a\0", "b"]
    index = RQMoEIndex(additive)
    index.add(clustered[:4], ids=ids)
    for id in ids:
        for wanted in (id, {"$in": [id]}, {"$in": {id, "x"}}):
            assert [document.id for document in index.documents({"$id": wanted})] == [id]
    assert [document.id for document in index.documents({"$id": {"$nin": ids[:2]}})] == ids[2:]


def test_update_keeps_what_is_not_given(additive, clustered):
    index = RQMoEIndex(additive, keep_floats=True)
    index.add(clustered[:3], texts=list("abc"), metadata=[{"n": 0}, {"n": 1}, {"n": 2}])
    before = index.reconstruct([0, 1, 2])
    index.update([1], metadata=[{"m": 5}])
    assert index.get([1]) == [Document(1, "b", {"m": 5})]
    np.testing.assert_array_equal(index.reconstruct([0, 1, 2]), before)
    scores, ids = index.search(clustered[1], 1)
    assert ids[0] == 1 and scores[0] == pytest.approx(1, abs=1e-5)  # its floats are kept, too
    index.update([2, 0], clustered[10:12])
    np.testing.assert_allclose(index.reconstruct([2, 0]), additive.decompress(additive.compress(clustered[10:12])))
    assert index.get([0, 2]) == [Document(0, "a", {"n": 0}), Document(2, "c", {"n": 2})]
    index.update([0], clustered[:1], texts=["new"])
    assert index.get([0]) == [Document(0, "new", {"n": 0})] and len(index) == 3
    assert index.update([1, 99, 0], metadata=[{"n": 5}, {"n": 6}, {"n": 7}], missing_ok=True) == 2
    assert [document.metadata for document in index.get([0, 1, 2])] == [{"n": 7}, {"n": 5}, {"n": 2}]


def test_the_kind_of_ids(additive, clustered):
    index = RQMoEIndex(additive)
    assert index.id_type is None
    index.add(clustered[:2])
    assert index.id_type is int
    index.remove([0, 1])
    assert index.id_type is None
    index.add(clustered[:1], ids=["a"])
    assert index.id_type is str


def test_duplicates(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(clustered[:2], ids=["a", "b"], texts=["1", "2"])
    assert index.add(clustered[:3], ids=["b", "c", "c"], texts=["3", "4", "5"], duplicates="skip").tolist() == ["c"]
    assert [document.text for document in index.get(["a", "b", "c"])] == ["1", "2", "4"]
    written = index.add(clustered[:3], ids=["b", "d", "d"], texts=["6", "7", "8"], duplicates="replace")
    assert written.tolist() == ["b", "d"]
    assert [document.text for document in index.get(list("abcd"))] == ["1", "6", "4", "8"]
    assert len(index) == 4


def test_removing(additive, clustered):
    index = RQMoEIndex(additive)
    index.add(clustered[:10], metadata=[{"n": number} for number in range(10)])
    assert index.remove([1, 1, 2]) == 2
    assert index.remove([2, 3], missing_ok=True) == 1
    assert index.remove(filter={"n": {"$gte": 8}}) == 2
    assert index.remove(filter={"n": 99}) == 0
    assert [document.id for document in index.documents()] == [0, 4, 5, 6, 7] and len(index) == 5
    assert index.add(clustered[:1]).tolist() == [10]  # ids are not used again
    assert set(index.search(clustered[0], 10)[1].tolist()) == {0, 4, 5, 6, 7, 10}


class Letters:
    """An encoder without a network: counts letters; queries and documents differ."""

    def encode_document(self, texts):
        return np.array([[text.count(chr(97 + place)) for place in range(SIZE)] for text in texts], np.float32)

    def encode_query(self, texts):
        return self.encode_document(texts) * 2


def test_texts_are_embedded(additive):
    index = RQMoEIndex(additive, encoder=Letters(), metric="l2", keep_floats=True)
    index.add(texts=["aab", "ccc", "dddd"], metadata=[{"n": 1}, {"n": 2}, {"n": 3}])
    scores, ids = index.search("ab", 2)
    assert ids.tolist() == [0, 1] and scores[0] == pytest.approx(-1)
    assert index.search(["ab", "dd"], 1)[1].tolist() == [[0], [2]]
    index.update([1], texts=["ab"])
    assert index.get([1]) == [Document(1, "ab", {"n": 2})]
    assert sorted(index.search("ab", 2)[1].tolist()) == [0, 1]
    np.testing.assert_allclose(index.search("ab", 3)[0], [-1, -2, -24], atol=1e-3)


def test_threads_may_share_an_index(additive, clustered):
    from concurrent.futures import ThreadPoolExecutor

    index = RQMoEIndex(additive)
    index.add(clustered[:500], ids=range(500))

    def work(number):
        index.add(clustered[number : number + 1], ids=[1000 + number])
        _, ids = index.search(clustered[number], 3)
        return 1000 + number in index and len(ids) == 3

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))
    assert len(index) == 540


def test_a_damaged_name_of_a_table_is_a_clear_error(tmp_path):
    """SQLite puts the name into its message, which is no UTF-8 then."""
    file = tmp_path / "some.sqlite"
    Database(file, create=True).close()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        damage = "UPDATE sqlite_schema SET sql = 'CREATE TABLE', name = CAST(x'ff' AS TEXT) WHERE name = 'state'"
        connection.execute(damage)
        connection.commit()
    with pytest.raises(ValueError, match="damaged or no database"):
        Database(file)
