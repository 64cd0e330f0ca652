"""Vectors that are drawn near others: along differences of true neighbours, and at the norm that they had."""

import numpy as np
import pytest
import torch

from rqmoe_hf.training import augmentation
from rqmoe_hf.training.augmentation import NeighborJitter


def true_neighbors(vectors: np.ndarray, count: int) -> list[set[int]]:
    distances = np.square(vectors[:, None] - vectors[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return [set(row) for row in np.argsort(distances, axis=1)[:, :count]]


def test_neighbours_are_the_nearest_others(clustered):
    vectors = clustered[:400]
    found = NeighborJitter(vectors, neighbors=7).neighbors
    assert [set(row) for row in found] == true_neighbors(vectors, 7)


def test_neighbours_that_a_device_looks_for_are_the_same(clustered, monkeypatch):
    vectors = clustered[:400]
    monkeypatch.setattr(augmentation, "DISTANCES", 20_000)  # in blocks of 50 vectors
    found = augmentation._others(augmentation._nearest_on_device(torch.from_numpy(vectors), 8, False))
    assert [set(row) for row in found] == true_neighbors(vectors, 7)


def test_vectors_move_by_the_difference_of_two_neighbours(clustered):
    vectors = clustered[:60]
    jitter = NeighborJitter(vectors, center=np.full(16, 3.0), neighbors=4)
    rows = np.arange(60)
    drawn = jitter.draw(rows, 4.0, np.random.default_rng(0)).numpy()
    first, second = (jitter.neighbors[rows, place] for place in np.random.default_rng(0).integers(4, size=(2, 60)))
    strength = 2 / np.square(vectors[first] - vectors[second]).sum(-1).mean() ** 0.5
    for row, near in zip(rows, true_neighbors(vectors, 4), strict=True):
        before = vectors[row] + 3
        moved = [before + strength * (vectors[one] - vectors[other]) for one in near for other in near]
        allowed = [np.linalg.norm(before) / np.linalg.norm(vector) * vector - 3 for vector in moved]
        assert min(np.abs(drawn[row] - vector).max() for vector in allowed) < 1e-4
    np.testing.assert_allclose(np.linalg.norm(drawn + 3, axis=1), np.linalg.norm(vectors + 3, axis=1), rtol=1e-5)
    assert np.abs(drawn - vectors).max() > 0.01
    assert not np.array_equal(drawn, jitter.draw(rows, 4.0, np.random.default_rng(1)))
    np.testing.assert_array_equal(drawn, jitter.draw(rows, 4.0, np.random.default_rng(0)))


def test_approximate_neighbours_of_many_vectors_are_mostly_right(clustered, monkeypatch):
    exact = NeighborJitter(clustered, neighbors=10).neighbors
    monkeypatch.setattr(augmentation, "EXHAUSTIVE", 1000)
    found = NeighborJitter(clustered, neighbors=10).neighbors
    shared = [len(set(one) & set(other)) for one, other in zip(exact, found, strict=True)]
    assert np.mean(shared) > 9
    assert not (found == np.arange(len(clustered))[:, None]).any()


@pytest.mark.parametrize("energy", [0.0, 0.5])
def test_nothing_breaks_on_few_equal_or_zero_vectors(energy):
    generator = np.random.default_rng(0)
    for vectors in (np.zeros((50, 4)), np.ones((50, 4)), generator.normal(size=(3, 4)), generator.normal(size=(1, 4))):
        drawn = NeighborJitter(vectors.astype(np.float32)).draw(np.arange(len(vectors)), energy, generator)
        assert drawn.shape == vectors.shape
        assert np.isfinite(drawn).all()
        if energy == 0 or len(vectors) in (1, 50):
            np.testing.assert_allclose(drawn, vectors, atol=1e-6)
