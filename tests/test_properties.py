"""What holds for any codes, any small quantizer and any history of an index, against plain numpy and dictionaries."""

import numpy as np
import torch
from conftest import randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index_workers import MODEL, vector_of

from rqmoe_hf import RQMoEConfig, RQMoEModel, bytes_per_vector, pack_codes, truncate_codes, unpack_codes
from rqmoe_hf.index import RQMoEIndex

COMMON = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
SIZES = st.lists(st.integers(2, 65_536) | st.integers(2, 33), min_size=1, max_size=9)


def packed_as_one_number(codes: list[int], sizes: list[int]) -> bytes:
    """The layout in one sentence: the codes are the digits of a number, the first one the lowest."""
    number, place = 0, 0
    for code, size in zip(codes, sizes, strict=True):
        number += code << place
        place += (size - 1).bit_length()
    return number.to_bytes(-(-place // 8), "little")


@st.composite
def codes_and_sizes(draw):
    sizes = draw(SIZES)
    rows = draw(st.lists(st.tuples(*[st.integers(0, size - 1) for size in sizes]), min_size=1, max_size=5))
    return np.array(rows, np.int64), sizes


@settings(max_examples=150, **COMMON)
@given(codes_and_sizes())
def test_packed_codes_are_digits_of_a_number(drawn):
    codes, sizes = drawn
    packed = pack_codes(codes, sizes)
    assert [row.tobytes() for row in packed] == [packed_as_one_number(row, sizes) for row in codes.tolist()]
    assert packed.shape[1] == bytes_per_vector(len(sizes), sizes)
    assert np.array_equal(unpack_codes(packed, len(sizes), sizes), codes)


@settings(max_examples=100, **COMMON)
@given(codes_and_sizes(), st.data())
def test_truncated_codes_are_those_of_the_first_steps(drawn, data):
    codes, sizes = drawn
    kept = data.draw(st.integers(1, len(sizes)))
    expected = [packed_as_one_number(row[:kept], sizes[:kept]) for row in codes.tolist()]
    assert [row.tobytes() for row in truncate_codes(pack_codes(codes, sizes), len(sizes), kept, sizes)] == expected


@st.composite
def quantizers(draw):
    steps, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    make = draw(st.sampled_from((RQMoEConfig, RQMoEConfig.additive, RQMoEConfig.official, RQMoEConfig.qinco)))
    common = {"hidden_size": size, "num_codebooks": steps, "intermediate_size": draw(st.integers(1, 6))}
    if make == RQMoEConfig.additive and draw(st.booleans()):
        sizes = draw(st.lists(st.integers(2, 20), min_size=steps, max_size=steps))
        config = make(**common, codebook_size=max(sizes), codebook_sizes=sizes)
    else:
        config = make(**common, codebook_size=draw(st.integers(2, 20)), num_expert_layers=draw(st.integers(1, 3)))
    model = randomize(RQMoEModel(config), draw(st.integers(0, 99)))
    vectors = torch.randn(draw(st.integers(1, 12)), size, generator=torch.Generator().manual_seed(steps)) * 2
    return model, vectors


@settings(max_examples=60, **COMMON)
@given(quantizers(), st.integers(1, 4), st.integers(1, 4))
def test_round_trips_of_any_quantizer(drawn, candidates, beam):
    model, vectors = drawn
    config, search = model.config, {"num_candidates": candidates, "beam_size": beam}
    found = model.encode(vectors, **search)
    sizes = config.codebook_sizes or [config.codebook_size] * config.num_codebooks
    assert found.codes.shape == (len(vectors), config.num_codebooks)
    assert (found.codes >= 0).all() and (found.codes < torch.tensor(sizes)).all()
    torch.testing.assert_close(model.decode(found.codes).reconstruction, found.reconstruction, atol=1e-4, rtol=1e-4)
    packed = model.compress(vectors.numpy(), **search)
    assert [row.tobytes() for row in packed] == [packed_as_one_number(row, sizes) for row in found.codes.tolist()]
    restored = model.decompress(packed, config.num_codebooks)
    assert restored.shape == vectors.shape and restored.dtype == np.float32
    np.testing.assert_allclose(restored, found.reconstruction, atol=1e-4, rtol=1e-4)
    assert model.compress(restored).shape == packed.shape
    # The same vector gets the same code alone as among others.
    alone = torch.cat([model.encode(vectors[row : row + 1], **search).codes for row in range(len(vectors))])
    assert torch.equal(alone, found.codes)


@settings(max_examples=40, **COMMON)
@given(quantizers(), st.data())
def test_a_prefix_decodes_to_what_its_steps_contribute(drawn, data):
    model, vectors = drawn
    codes = model.encode(vectors).codes
    kept = data.draw(st.integers(1, model.config.num_codebooks))
    with torch.no_grad():
        sums = model.contributions(codes)[:, :kept].sum(dim=1) * model.scale + model.mean
    torch.testing.assert_close(model.decode(codes[:, :kept]).reconstruction, sums, atol=1e-4, rtol=1e-4)
    greedy = model.encode(vectors, beam_size=1, num_codebooks=kept).codes  # without a beam nothing looks ahead
    assert torch.equal(greedy, model.encode(vectors, beam_size=1).codes[:, :kept])


class IndexHistory(RuleBasedStateMachine):
    """An index beside a dictionary of the same content, of which all vectors are compared with a query."""

    @initialize(metric=st.sampled_from(("l2", "inner_product", "cosine")))
    def begin(self, metric):
        self.index, self.metric = RQMoEIndex(MODEL, metric=metric), metric
        self.expected: dict[int, tuple[np.ndarray, str, dict]] = {}

    @rule(ids=st.lists(st.integers(0, 40), min_size=1, max_size=30, unique=True), version=st.integers(0, 3))
    def add_or_replace(self, ids, version):
        vectors = np.stack([vector_of(100 * version + id) for id in ids])
        texts, metadata = [f"{id} {version}" for id in ids], [{"version": version}] * len(ids)
        self.index.add(vectors, ids=ids, texts=texts, metadata=metadata, duplicates="replace")
        codes = MODEL.compress(vectors)
        self.expected |= {id: (codes[place], texts[place], metadata[place]) for place, id in enumerate(ids)}

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, unique=True))
        assert self.index.remove(ids) == len(ids)
        for id in ids:
            del self.expected[id]

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), text=st.text(max_size=5).filter(str.isprintable))
    def update(self, data, text):
        id = data.draw(st.sampled_from(sorted(self.expected)))
        self.index.update([id], texts=[text], metadata=[{"version": 9}], embeddings=vector_of(id)[None])
        self.expected[id] = (MODEL.compress(vector_of(id)[None])[0], text, {"version": 9})

    @precondition(lambda self: self.expected)
    @rule(seed=st.integers(0, 5), top_k=st.integers(1, 5), version=st.none() | st.integers(0, 3))
    def search(self, seed, top_k, version):
        query, allowed = vector_of(seed + 10_000), {} if version is None else {"version": version}
        kept = {id: code for id, (code, _, metadata) in self.expected.items() if allowed.items() <= metadata.items()}
        scores, ids = self.index.search(query, top_k, filter=allowed or None)
        assert len(ids) == min(top_k, len(kept)) == len(set(ids.tolist())) and set(ids.tolist()) <= set(kept)
        if kept:
            truth = dict(zip(kept, self.scores(query, np.stack(list(kept.values()))), strict=True))
            np.testing.assert_allclose(scores, [truth[id] for id in ids.tolist()], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(scores, sorted(truth.values(), reverse=True)[:top_k], rtol=1e-4, atol=1e-4)

    def scores(self, query, codes):
        vectors = MODEL.decompress(codes).astype(np.float64)
        if self.metric == "l2":
            return -((vectors - query) ** 2).sum(axis=1)
        if self.metric == "cosine":
            vectors, query = vectors / np.linalg.norm(vectors, axis=1)[:, None], query / np.linalg.norm(query)
        return vectors @ query

    @invariant()
    def the_same_content(self):
        if hasattr(self, "index"):
            found = {document.id: (document.text, document.metadata) for document in self.index.documents()}
            assert found == {id: (text, metadata) for id, (_, text, metadata) in self.expected.items()}
            assert len(self.index) == len(self.expected)

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()


TestIndexHistory = IndexHistory.TestCase
TestIndexHistory.settings = settings(max_examples=20, stateful_step_count=12, **COMMON)
