"""Compiled local search: the codes of a naive loop and of PyTorch's operations, with and without Numba."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from rqmoe_hf import local_search_rqmoe
from rqmoe_hf.local_search_rqmoe import build_pair_tables, local_search

SIZES = [[5, 5, 5], [2, 7], [128, 256, 300, 7], [16] * 9, [1000, 16, 130]]


def problem(sizes: list[int], count: int, coarse: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Codebooks, vectors and codes; coarse ones are small integers, of which many sums are equal."""
    generator = torch.Generator().manual_seed(sum(sizes) + count)
    codebooks = [torch.randn(size, 6, generator=generator) for size in sizes]
    vectors = 2 * torch.randn(count, 6, generator=generator)
    codes = torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)
    return ([part.round() for part in codebooks], vectors.round(), codes) if coarse else (codebooks, vectors, codes)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_codes_are_those_of_pytorchs_operations(sizes, count, coarse, threads, monkeypatch):
    codebooks, vectors, codes = problem(sizes, count, coarse)
    compiled = build_pair_tables(codebooks)
    monkeypatch.setattr(local_search_rqmoe, "can_sweep", lambda *_: False)
    plain = build_pair_tables(codebooks)
    assert compiled.tiled and not plain.tiled
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = [local_search(vectors, codes, pairs, 6) for pairs in (compiled, plain)]
        prefixes = [local_search(vectors, codes[:, :2], pairs, 3)[0] for pairs in (compiled, plain)]
        begun = [local_search(vectors, len(sizes), pairs, rounds) for pairs in (compiled, plain) for rounds in (0, 6)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(*prefixes)
    torch.testing.assert_close(found[0][1], found[1][1])
    assert torch.equal(begun[0][0], begun[2][0]) and torch.equal(begun[1][0], begun[3][0])
    torch.testing.assert_close(begun[1][1], begun[3][1])
    assert count == 1 or not torch.equal(found[0][0], codes)


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_each_code_is_the_best_of_a_naive_loop(sizes):
    codebooks, vectors, codes = problem(sizes, 40, coarse=False)
    pairs = build_pair_tables(codebooks)
    rows = (codes + pairs.starts).contiguous()
    order = list(range(len(sizes)))[::-1]
    local_search_rqmoe._choose_again(rows, local_search_rqmoe._scores(vectors, len(sizes), pairs, True), order, pairs)
    books, wanted = [part.double().numpy() for part in codebooks], codes.numpy().copy()
    for vector, code in zip(vectors.double().numpy(), wanted, strict=True):
        for step in 2 * order:
            left = vector - sum(books[other][code[other]] for other in order if other != step)
            code[step] = np.square(left - books[step]).sum(axis=1).argmin()
    assert (rows.numpy() - pairs.starts.numpy() == wanted).mean() > 0.97  # float16 finds some others as near


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_greedy_codes_are_the_best_of_a_naive_loop(sizes, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(local_search_rqmoe, "can_sweep", lambda *_: False)
    codebooks, vectors, _ = problem(sizes, 40, coarse=False)
    found, restored = local_search(vectors, len(sizes), build_pair_tables(codebooks), 0)
    books, wanted = [part.double().numpy() for part in codebooks], []
    for left in vectors.double().numpy():
        code = []
        for book in books:
            code.append(np.square(left - book).sum(axis=1).argmin())
            left = left - book[code[-1]]
        wanted.append(code)
    assert (found.numpy() == wanted).mean() > 0.97  # float16 finds some others as near
    sums = sum(book[code] for book, code in zip(codebooks, found.T, strict=True))
    torch.testing.assert_close(restored, sums)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("size", [1e6, 1e19, 3e38])
def test_vectors_whose_errors_overflow_get_codes_that_exist(size, count):
    sizes = [5, 300, 7]
    codebooks, vectors, _ = problem(sizes, count, coarse=False)
    vectors = (vectors.sign() * size).contiguous()
    vectors[:, 0] = 0
    codes, restored = local_search(vectors, len(sizes), build_pair_tables(codebooks), 6)
    assert (codes >= 0).all() and (codes < torch.tensor(sizes)).all()
    torch.testing.assert_close(restored, sum(book[code] for book, code in zip(codebooks, codes.T, strict=True)))


@pytest.mark.parametrize("count", [1, 5, 40])  # those of few vectors are compiled too
def test_scores_are_the_distances_of_single_codewords(count):
    codebooks, vectors, _ = problem([300, 7], count, coarse=False)
    pairs = build_pair_tables(codebooks)
    found = local_search_rqmoe._scores(vectors, 2, pairs, True).double() / pairs.unit
    for part, codebook in zip(found.split(pairs.widths, dim=1), codebooks, strict=True):
        wanted = torch.cdist(vectors.double(), codebook.double()).square() - vectors.double().square().sum(1)[:, None]
        torch.testing.assert_close(part[:, : len(codebook)], wanted, rtol=2e-3, atol=2e-3)


PROGRAM = """
import sys
if sys.argv[1] == "without": sys.modules["numba"] = None
import torch
from rqmoe_hf.local_search_rqmoe import build_pair_tables, local_search
generator = torch.Generator().manual_seed(0)
codebooks = [torch.randn(40, 6, generator=generator) for _ in range(4)]
pairs = build_pair_tables(codebooks)
codes = local_search(torch.randn(200, 6, generator=generator), torch.zeros(200, 4, dtype=torch.long), pairs, 4)[0]
print(pairs.tiled, codes.tolist())
"""


def test_numba_is_not_needed():
    runs = [("with", {}), ("without", {}), ("with", {"NUMBA_DISABLE_JIT": "1"})]
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, argument],
            env={"PATH": ""} | more,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(" ", 1)
        for argument, more in runs
    ]
    assert [tiled for tiled, _ in printed] == ["True", "False", "False"]
    assert printed[0][1] == printed[1][1] == printed[2][1]
