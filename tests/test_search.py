"""Searching codes in one call: against brute force, below and above the size where Faiss helps."""

import numpy as np
import pytest
import torch
from conftest import MEMBERS, SIZE, randomize

from rqmoe_hf import RQMoEModel, quantize_embeddings, search, semantic_search, unpack_codes
from rqmoe_hf.additive import faiss_scanner, mean_contributions
from rqmoe_hf.bundled import load_quantizer


def brute_force(model, queries, codes, top_k, normalize=False):
    restored = model.decompress(codes)
    if normalize:
        restored = restored / np.linalg.norm(restored, axis=1, keepdims=True)
    scores = queries @ restored.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return ids, np.take_along_axis(scores, ids, 1)


def unpacked_hits(hits):
    return (
        np.array([[hit["corpus_id"] for hit in row] for row in hits]),
        np.array([[hit["score"] for hit in row] for row in hits]),
    )


def test_a_small_collection_is_searched_exactly(model, vectors):
    codes = quantize_embeddings(vectors.numpy(), model)
    queries = vectors[:7].numpy()
    hits, seconds = semantic_search(queries, codes, model, top_k=5)
    ids, scores = unpacked_hits(hits)
    _, expected = brute_force(model, queries, codes, 5)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)  # codes that repeat share their score
    np.testing.assert_allclose((queries[:, None] * model.decompress(codes)[ids]).sum(-1), scores, rtol=1e-4, atol=1e-4)
    assert seconds > 0
    assert [len(row) for row in semantic_search(queries, codes[:3], model, top_k=5)[0]] == [3] * 7


def test_ways_to_give_embeddings(paper_model, vectors):
    codes = quantize_embeddings(vectors, paper_model)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, paper_model.compress(vectors.numpy()))
    np.testing.assert_array_equal(quantize_embeddings(list(vectors), paper_model), codes)
    np.testing.assert_array_equal(quantize_embeddings(vectors[3].numpy(), paper_model), codes[3])
    one, _ = semantic_search(vectors[3], codes, paper_model, top_k=1)
    many, _ = semantic_search(list(vectors[3:5].numpy()), codes, paper_model, top_k=1)
    assert one[0][0] == pytest.approx(many[0][0])


def test_scores_are_cosines_where_the_embeddings_had_norm_one(monkeypatch, clustered):
    model = load_quantizer("minilm-384-32-bytes")
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(400, 384)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    codes = quantize_embeddings(embeddings, model, beam_size=1)
    ids, scores = unpacked_hits(semantic_search(embeddings[:20], codes, model, top_k=3)[0])
    expected_ids, expected = brute_force(model, embeddings[:20], codes, 3, normalize=True)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_the_tables_are_mean_contributions_and_faiss_adds_them_up(model, vectors):
    packed = model.compress(vectors.numpy())
    codes = unpack_codes(packed, model.config.num_codebooks, model.config.codebook_size)
    tables = mean_contributions(model, codes)
    contributions = model.contributions(torch.from_numpy(codes.astype(np.int64))).detach().numpy()
    for step, codeword in ((0, codes[0, 0]), (2, codes[5, 2])):
        expected = contributions[codes[:, step] == codeword, step].mean(axis=0) * float(model.scale)
        np.testing.assert_allclose(tables[step, codeword], expected, rtol=1e-4, atol=1e-5)
    absent = sorted(set(range(model.config.codebook_size)) - set(codes[:, 1].tolist()))
    for codeword in absent:
        np.testing.assert_allclose(tables[1, codeword], model.codebooks[1, codeword].detach().numpy() * 0.7, rtol=1e-5)
    sums = sum(tables[step][codes[:, step]] for step in range(codes.shape[1]))
    queries = vectors[:4].numpy()
    scanner = faiss_scanner(tables, packed, model.config.code_sizes)
    scores, ids = scanner.search(queries, 300)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ sums.T, ids, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("member", ["additive", "paper"])
def test_a_large_collection_is_ranked_by_decoding_a_shortlist(member, clustered, monkeypatch):
    monkeypatch.setattr(search, "DECODE_ALL", 2000)
    model = randomize(RQMoEModel(MEMBERS[member]))
    codes = model.compress(clustered)
    queries = clustered[:50] + np.random.default_rng(2).normal(size=(50, SIZE)).astype(np.float32) * 0.1
    hits, _ = semantic_search(queries, codes, model, top_k=10, rescore_multiplier=20)
    ids, scores = unpacked_hits(hits)
    restored = model.decompress(codes)
    np.testing.assert_allclose(scores, (queries[:, None] * restored[ids]).sum(-1), rtol=1e-4, atol=1e-4)
    _, best = brute_force(model, queries, codes, 10)
    assert (np.diff(scores, axis=1) <= 1e-5).all()
    found = np.isclose(scores, best, rtol=1e-4, atol=1e-4).mean()
    assert found == 1.0 if member == "additive" else found > 0.9


def test_bad_input(paper_model, vectors):
    codes = paper_model.compress(vectors.numpy())
    with pytest.raises(ValueError, match="top_k and rescore_multiplier must be at least 1, got 0"):
        semantic_search(vectors, codes, paper_model, top_k=0)
    with pytest.raises(ValueError, match=r"Expected embeddings of shape \(n, 16\)"):
        semantic_search(vectors[:, :5], codes, paper_model)
    with pytest.raises(ValueError, match="expects packed codes"):
        semantic_search(vectors, codes.astype(np.int64), paper_model)
