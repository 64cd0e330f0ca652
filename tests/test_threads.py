"""Threads that share a quantizer or an index get what one thread gets."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import MEMBERS, SIZE, randomize

from rqmoe_hf import RQMoEModel
from rqmoe_hf.index import RQMoEIndex

THREADS = 8


@pytest.fixture(autouse=True)
def frequent_switches():
    """Lets threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(function, arguments: list) -> list:
    """What threads return that all begin at the same moment."""
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def all_answers(model: RQMoEModel, vectors: torch.Tensor, kept: int) -> list[np.ndarray]:
    found = model.encode(vectors, local_search=1)
    packed = model.compress(vectors.numpy(), num_codebooks=kept)
    return [
        found.codes.numpy(),
        found.reconstruction.numpy(),
        packed,
        model.decompress(packed, kept),
        model.decode(found.codes[:, :kept]).reconstruction.numpy(),
    ]


def test_a_model_that_threads_use_for_the_first_time(model, vectors):
    """No tables are there yet; all threads need them at once, for codes of several lengths."""
    parts = [(vectors[20 * number : 20 * number + 20], 1 + number % 4) for number in range(THREADS)]
    expected = [all_answers(model, *part) for part in parts]
    for _ in range(5):
        fresh = copy.deepcopy(model)
        fresh._tables.clear()
        for one, other in zip(together(lambda part: all_answers(fresh, *part), parts), expected, strict=True):  # noqa: B023
            for found, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(found, right)


def test_tables_are_made_once_however_many_threads_need_them(paper_model, vectors, monkeypatch):
    from rqmoe_hf import modeling_rqmoe

    made, build = [], modeling_rqmoe.build_tables
    monkeypatch.setattr(modeling_rqmoe, "build_tables", lambda *given: made.append(1) or build(*given))
    together(lambda number: paper_model.encode(vectors[number : number + 2]), list(range(THREADS)))
    assert len(made) == 1


def test_threads_may_forget_the_tables_of_others(paper_model, vectors):
    """`eval` clears them, which must not take them from a thread that is about to use them."""
    expected = paper_model.encode(vectors[:20]).codes

    def use(number):
        for _ in range(30):
            if number % 2:
                paper_model.eval()
            elif not torch.equal(paper_model.encode(vectors[:20]).codes, expected):
                return False
        return True

    assert all(together(use, list(range(THREADS))))


def test_models_can_still_be_copied_and_pickled(paper_model, vectors):
    expected = paper_model.encode(vectors).codes
    assert torch.equal(copy.deepcopy(paper_model).encode(vectors).codes, expected)
    assert torch.equal(pickle.loads(pickle.dumps(paper_model)).encode(vectors).codes, expected)


@pytest.mark.parametrize("name", ["additive", "paper"])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_that_threads_search_for_the_first_time(clustered, name, kind):
    """The scanner is made by whoever searches first."""
    model = randomize(RQMoEModel(MEMBERS[name]))
    queries = [clustered[3_000 + 5 * number : 3_005 + 5 * number] for number in range(THREADS)]

    def make():
        index = RQMoEIndex(model, kind=kind, num_lists=8 if kind == "ivf" else None)
        index.add(clustered[:1_000], metadata=[{"n": n} for n in range(1_000)])
        return index

    def ask(index, query):
        plain = index.search(query, 5, shortlist=50, nprobe=4)
        return *plain, *index.search(query, 5, shortlist=50, filter={"n": {"$gte": 100}}, rescore="tables")

    with make() as index:
        expected = [ask(index, query) for query in queries]
    with make() as index:
        for one, other in zip(together(lambda query: ask(index, query), queries), expected, strict=True):
            for found, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(found, right)


def test_searches_beside_changes_see_whole_states(clustered):
    """One thread adds and removes ten vectors at a time, of which the others see all or none."""
    model, stop = randomize(RQMoEModel(MEMBERS["additive"])), threading.Event()
    with RQMoEIndex(model) as index:
        index.add(clustered[:300])

        def work(number):
            if not number:
                for start in range(300, 700, 10):
                    index.add(clustered[start : start + 10], ids=range(start, start + 10))
                    if start % 20:
                        index.remove(range(start, start + 10))
                stop.set()
                return True
            whole = True
            while not stop.is_set():
                ids = index.search(clustered[number], 1_000, rescore="tables")[1]
                whole &= len(ids) % 10 == 0 and len(set(ids.tolist())) == len(ids)
            return whole

        assert all(together(work, list(range(4))))
        assert len(index) == 500


def test_encoders_are_asked_by_one_thread_at_a_time(clustered):
    """Tokenizers refuse to be used by two at once."""

    class Encoder:
        def __init__(self):
            self.inside, self.most = 0, 0

        def encode_query(self, texts):
            self.inside += 1
            self.most = max(self.most, self.inside)
            threading.Event().wait(0.002)
            self.inside -= 1
            return np.ones((len(texts), SIZE), np.float32)

        encode_document = encode_query

    encoder = Encoder()
    with RQMoEIndex(randomize(RQMoEModel(MEMBERS["additive"])), encoder=encoder) as index:
        index.add(clustered[:20])
        together(lambda number: index.search("a text", 3), list(range(THREADS)))
    assert encoder.most == 1
