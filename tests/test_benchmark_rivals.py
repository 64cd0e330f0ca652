"""The rival methods of the benchmarks: rates, reconstructions, and their formulas against plain ones."""

import dataclasses
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import environment
import quality
import tasks
from rivals import OURS, REFERENCES, RIVALS, Quantizer, Searcher, build
from rivals.additive_tables import best_tables, decode_tables, least_squares_tables
from rivals.faiss_codecs import mixed_steps, residual
from rivals.family import EXPERTS, RECIPES, FamilyMember, Ours
from rivals.interface import squared_error
from rivals.limits import LEFT_OUT, MAX_TRAINING_VECTORS, training_vectors
from rivals.linear import lloyd_max_normal, random_rotation
from rivals.scalar_codecs import RotatedScalar
from rivals.tables import cells
from sets import EmbeddingSet

DIMENSION, TRAINING = 64, 600
SLOW = [name for name in RIVALS if " x" in name or "LSQ" in name or name == "PRQ"]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(DIMENSION, DIMENSION)) * np.geomspace(1, 0.05, DIMENSION)
    return (generator.normal(size=(TRAINING + 200, DIMENSION)) @ mixing.T + 0.5).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick_training():
    """Faiss's iterations do not matter here, and its defaults take minutes."""
    patch = pytest.MonkeyPatch()
    plain = {
        name: getattr(faiss, name) for name in ("IndexLocalSearchQuantizer", "IndexResidualQuantizer", "OPQMatrix")
    }

    def local_search(*args):
        index = plain["IndexLocalSearchQuantizer"](*args)
        index.lsq.train_iters = index.lsq.train_ils_iters = index.lsq.encode_ils_iters = 1
        return index

    def residual(*args):
        index = plain["IndexResidualQuantizer"](*args)
        index.rq.train_type, index.rq.cp.niter = faiss.ResidualQuantizer.Train_default, 2
        return index

    def rotation(*args):
        matrix = plain["OPQMatrix"](*args)
        matrix.niter = 2
        return matrix

    patch.setattr(faiss, "IndexLocalSearchQuantizer", local_search)
    patch.setattr(faiss, "IndexResidualQuantizer", residual)
    patch.setattr(faiss, "OPQMatrix", rotation)
    yield
    patch.undo()


def check(quantizer: Quantizer, vectors: np.ndarray, size: int) -> None:
    quantizer.train(vectors[:TRAINING])
    codes = quantizer.encode(vectors)
    restored = quantizer.decode(codes)
    assert isinstance(quantizer, Quantizer)
    assert codes.shape[1] * codes.itemsize <= size
    assert quantizer.code_bits <= 8 * codes.shape[1] * codes.itemsize <= quantizer.code_bits + 7
    assert restored.shape == vectors.shape and restored.dtype == np.float32
    mean = vectors[:TRAINING].mean(axis=0)
    assert squared_error(vectors[:TRAINING], restored[:TRAINING]) < squared_error(vectors[:TRAINING], mean)
    assert quantizer.codebook_bytes >= 0


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("method", [name for name in RIVALS if name not in SLOW])
def test_rivals_keep_to_their_rate_and_beat_the_mean(method, size, vectors):
    if method == "ResidualVQ":
        pytest.importorskip("vector_quantize_pytorch")
    quantizer = build(method, DIMENSION, size)
    if quantizer is None:
        assert (method, size) in {("RaBitQ (PCA)", 8), ("ITQ", 16)}
        return
    check(quantizer, vectors, size)


@pytest.mark.parametrize("method", ["LSQ", "LSQ x9", "PRQ"])
def test_slow_rivals_at_a_low_rate(method, vectors):
    check(build(method, DIMENSION, 4), vectors, 4)


def test_more_iterations_only_find_better_codes(vectors):
    short, long = (build(method, DIMENSION, 4) for method in ("LSQ", "LSQ, 128 iterations"))
    for quantizer in (short, long):
        quantizer.train(vectors[:TRAINING])
    np.testing.assert_array_equal(short.decode(np.eye(4, dtype=np.uint8)), long.decode(np.eye(4, dtype=np.uint8)))
    errors = [squared_error(vectors, one.decode(one.encode(vectors))) for one in (short, long)]
    assert errors[1] < 0.999 * errors[0]


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("dimension", [32, 784])
@pytest.mark.parametrize("method", [name for name in RIVALS if name != "ResidualVQ"])
def test_no_rate_is_exceeded(method, dimension, size):
    if (method, size) in LEFT_OUT:
        return
    quantizer = build(method, dimension, size)
    assert quantizer is None or quantizer.code_bits <= 8 * size


@pytest.mark.parametrize("name", list(REFERENCES))
def test_references_restore_at_their_own_bytes(name, vectors):
    quantizer = build(name, DIMENSION, 0)
    check(quantizer, vectors - vectors.mean(axis=0), {"float32": 256, "int8": 64, "binary, rescored": 8}[name])


def test_int8_restores_within_half_a_step(vectors):
    quantizer = build("int8", DIMENSION, 0)
    quantizer.train(vectors)
    steps = np.ptp(vectors, axis=0) / 255
    assert (np.abs(quantizer.decode(quantizer.encode(vectors)) - vectors) <= 0.501 * steps).all()


def test_unequal_slices_are_padded(vectors):
    quantizer = build("OPQ", 60, 8)  # 60 is no multiple of 8
    check(quantizer, vectors[:, :60], 8)


def test_residual_quantizer_is_that_of_faiss(vectors):
    quantizer = build("RQ, beam 5", DIMENSION, 4)
    quantizer.train(vectors)
    index = faiss.IndexResidualQuantizer(DIMENSION, 4, 8)  # as quick as the other
    index.rq.cp.max_points_per_centroid = 1024
    index.train(vectors)
    np.testing.assert_array_equal(quantizer.encode(vectors), index.sa_encode(vectors))


def test_mixed_steps_use_all_bits(vectors):
    check(residual(DIMENSION, [6, 6, 4], 5), vectors, 2)
    assert mixed_steps(8, 12) == [12] * 5 + [4]
    assert all(sum(mixed_steps(size, 12)) == 8 * size for size in (8, 16, 32, 64))
    assert mixed_steps(8, 8) == [8] * 8


def test_rabitq_decodes_with_the_least_error_and_searches(vectors):
    quantizer = build("RaBitQ (PCA)", DIMENSION, 16)
    quantizer.train(vectors)
    codes = quantizer.encode(vectors)
    shrunk = quantizer.decode(codes)
    plain = quantizer.index.sa_decode(codes)
    centred = vectors - vectors.mean(axis=0)
    direction = plain - vectors.mean(axis=0)
    factor = (centred * direction).sum(axis=1) / np.square(direction).sum(axis=1)
    np.testing.assert_allclose(shrunk - vectors.mean(axis=0), direction * factor[:, None], atol=1e-3)
    assert isinstance(quantizer, Searcher)
    assert (quantizer.search(vectors[:50], codes, 1)[:, 0] == np.arange(50)).mean() > 0.9


def test_lloyd_max_levels_are_the_known_ones():
    np.testing.assert_allclose(lloyd_max_normal(1), [-0.7979, 0.7979], atol=1e-3)
    np.testing.assert_allclose(lloyd_max_normal(2), [-1.510, -0.4528, 0.4528, 1.510], atol=2e-3)


def test_eden_scale_is_the_naive_one(vectors):
    quantizer = RotatedScalar(DIMENSION, DIMENSION, 1, vector_scale=True)
    quantizer.train(vectors)
    restored = quantizer.decode(quantizer.encode(vectors[:5]))
    for vector, found in zip(vectors[:5], restored, strict=True):
        rotated = quantizer.basis @ (vector - quantizer.mean)
        naive = np.abs(rotated).sum() / DIMENSION * np.sign(rotated)  # DRIVE: |Rx|_1 / d along the signs
        np.testing.assert_allclose(found, quantizer.basis.T @ naive + quantizer.mean, rtol=2e-3, atol=2e-3)


def test_random_rotation_is_one():
    rotation = random_rotation(8)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-6)


def test_least_squares_tables_equal_dense_least_squares(vectors):
    codewords, steps = 7, 3
    codes = np.random.default_rng(1).integers(0, codewords, size=(len(vectors), steps))
    design = np.concatenate([np.eye(codewords)[column] for column in codes.T], axis=1)
    expected = design @ np.linalg.lstsq(design, vectors.astype(np.float64), rcond=None)[0]
    tables = least_squares_tables(codes, vectors, codewords, ridge=1e-6)
    np.testing.assert_allclose(decode_tables(tables, codes), expected, atol=1e-4)
    assert tables.shape == (steps, codewords, DIMENSION)
    with pytest.raises(ValueError, match="equations"):
        least_squares_tables(codes, vectors, 1 << 14)


def test_best_tables_do_not_overfit(vectors):
    codes = np.random.default_rng(1).integers(0, 64, size=(len(vectors), 4))  # says nothing of the vectors
    error = np.square(vectors[:TRAINING] - vectors[:TRAINING].mean(axis=0)).sum(axis=1).mean()
    tables = best_tables(codes[:TRAINING], vectors[:TRAINING], 64)
    loose = least_squares_tables(codes[:TRAINING], vectors[:TRAINING], 64)
    errors = [squared_error(vectors[TRAINING:], decode_tables(one, codes[TRAINING:])) for one in (tables, loose)]
    assert errors[0] < errors[1]
    assert errors[0] < 1.5 * error


def test_family_member_trains_within_a_budget(vectors):
    member = FamilyMember(RECIPES["qinco"], DIMENSION, 2, 0.5, codebook_size=16, intermediate_size=8, num_candidates=4)
    check(member, vectors, 2)
    assert member.epochs > 0


def test_our_experts_train_for_their_epochs_and_search_wider_than_in_training(vectors):
    recipe = dataclasses.replace(EXPERTS, epochs=2)
    member = FamilyMember(recipe, DIMENSION, 2, codebook_size=16, intermediate_size=8)
    check(member, vectors, 2)
    assert member.epochs == 2 and member.model.config.beam_size == 16


def test_ours_and_what_its_experts_earn(paper_model, tmp_path, vectors):
    paper_model.save_pretrained(tmp_path / "mine")
    size = paper_model.config.hidden_size
    quantizer, part = Ours(str(tmp_path / "mine")), Ours(f"{tmp_path / 'mine'}:3")
    codes = part.encode(vectors[:, :size])
    assert (quantizer.codes, part.codes, part.code_bits, part.name) == (4, 3, 15, "ours:mine:3")
    assert quantizer.fingerprint == part.fingerprint and quantizer.codebook_bytes > 0
    share = part.experts_share(vectors[:, :size], vectors[:, :size], codes)
    error = squared_error(vectors[:, :size], part.decode(codes))
    assert share["experts_share"] == pytest.approx(1 - error / share["additive_tables_mse"])
    with pytest.raises(ValueError, match="codes"):
        Ours(f"{tmp_path / 'mine'}:9")


def test_limits_name_known_cells_and_give_reasons():
    assert all(method in RIVALS | OURS for method, _ in (*MAX_TRAINING_VECTORS, *LEFT_OUT))
    assert training_vectors("PQ", 8, 384, 1_000) == (1_000, None)
    assert training_vectors("LSQ", 64, 384, 1_000)[0] == 0
    count, reason = training_vectors("LSQ", 32, 384, 10**6)
    assert count == MAX_TRAINING_VECTORS["LSQ", 32][0] and reason


def test_a_stopped_run_continues(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(quality.environment, "RESULTS", tmp_path)
    unit = tasks.unit(vectors)
    data = EmbeddingSet("tiny", "", unit[:500], unit[500:510], unit[510:780], unit[780:], "c0ffee", True)
    monkeypatch.setattr(quality, "load", lambda *args: data)
    monkeypatch.setattr(quality, "SETS", {"tiny": None})
    monkeypatch.setattr(
        sys, "argv", ["quality", "--set", "tiny", "--methods", "float32", "EDEN (PCA)", "--bytes", "8"]
    )
    quality.main()
    cells = quality.environment.load("quality-tiny")["cells"]
    assert len(cells) == 2
    exact, coded = cells.values()
    assert exact["mse"] == 0 and exact["recall_10_at_10"] == exact["recall_at_1_1"] == 1
    assert coded["bytes"] == 8 and 0 < coded["recall_10_at_10_renormalised"] <= 1
    monkeypatch.setattr(quality, "measure", lambda *args: pytest.fail("measured again"))
    quality.main()
    assert quality.environment.load("quality-tiny")["cells"] == cells


class Halved:
    """A quantizer that loses the second half of each vector."""

    encode = staticmethod(lambda vectors: vectors)

    def decode(self, codes):
        return codes * (np.arange(codes.shape[1]) < codes.shape[1] // 2)


def test_a_side_of_each_task_stays_exact_or_both_are_compressed(vectors):
    first, second, queries, documents, packages = (part.copy() for part in np.split(vectors[:500], 5))
    scores, relevant, others = np.arange(100.0), [[row] for row in range(100)], [[99 - row] for row in range(100)]
    known = tasks.Tasks(first, second, scores, queries, documents, relevant, packages, others)
    found, lost = tasks.measure(Halved(), known), Halved().decode
    assert found["sts_spearman_asymmetric"] == tasks.spearman(first, lost(second), scores)
    assert found["sts_spearman_symmetric"] == tasks.spearman(lost(first), lost(second), scores)
    kinds = {"known_item": (queries, relevant), "package": (packages, others)}
    for name, (asked, wanted) in kinds.items():
        for side, given in (("asymmetric", asked), ("symmetric", lost(asked))):
            ndcg, accuracy = tasks.retrieval(given, lost(documents), wanted)
            assert (found[f"{name}_ndcg_at_10_{side}"], found[f"{name}_accuracy_at_1_{side}"]) == (ndcg, accuracy)
    exact = tasks.measure(None, known)
    assert exact["package_ndcg_at_10"] == tasks.retrieval(packages, documents, others)[0]


def test_task_metrics_are_those_of_plain_definitions():
    generator = np.random.default_rng(0)
    documents, queries = generator.normal(size=(40, 8)), generator.normal(size=(6, 8))
    relevant = [[1, 2], [3], [4], [5, 6, 7], [8], [9]]
    gains, hits = [], []
    for query, wanted in zip(queries, relevant, strict=True):
        order = sorted(range(40), key=lambda row: -(documents[row] @ query) / np.linalg.norm(documents[row]))
        found = sum(1 / np.log2(place + 2) for place, row in enumerate(order[:10]) if row in wanted)
        gains.append(found / sum(1 / np.log2(place + 2) for place in range(len(wanted))))
        hits.append(order[0] in wanted)
    assert tasks.retrieval(queries, documents, relevant) == pytest.approx((np.mean(gains), np.mean(hits)))
    np.testing.assert_allclose(tasks.ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1, 3.5, 2])


def test_of_two_measurements_tables_show_the_first_with_the_tasks_of_the_second(monkeypatch):
    first = {"method": "LSQ", "bytes": 8, "training_vectors": 100_000, "mse": 0.4, "tasks": {"sts": 70.0}}
    again = first | {"mse": 0.3, "tasks": {"sts": 71.0, "known_item": 0.4}}
    weights = {"method": "ours:mine:6", "bytes": 8, "training_vectors": 500, "mse": 0.35}
    found = {str(number): cell for number, cell in enumerate((first, again, weights, weights | {"mse": 0.36}))}
    monkeypatch.setattr(environment, "load", lambda name: {"cells": found})
    assert cells("minilm-384") == [first | {"tasks": again["tasks"]}, weights | {"mse": 0.36}]  # larger errors first
