"""Codes that are searched block by block: those of separate quantizers, one on what the other leaves."""

import itertools

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rqmoe_hf import RQMoEConfig, RQMoEModel, truncate_codes, unpack_codes
from rqmoe_hf.cli.train import parse_sizes
from rqmoe_hf.saving import round_weights, save_whole
from rqmoe_hf.training import blocks as training_blocks
from rqmoe_hf.training import initialize
from rqmoe_hf.training.augmentation import NeighborJitter
from rqmoe_hf.training.blocks import checkpoints, train_blocks

SIZES = [16, 16, 4, 32, 8]


def quantizer(codebooks: list[np.ndarray], mean: np.ndarray | None = None, **settings) -> RQMoEModel:
    """An additive quantizer of given codebooks, of scale 1."""
    sizes, size = [len(book) for book in codebooks], codebooks[0].shape[1]
    config = RQMoEConfig.additive(
        hidden_size=size, num_codebooks=len(sizes), codebook_size=max(sizes), codebook_sizes=sizes, **settings
    )
    model = RQMoEModel(config).eval()
    with torch.no_grad():
        model.codebooks.zero_()
        for target, book in zip(model.codebooks, codebooks, strict=True):
            target[: len(book)] = torch.from_numpy(book)
        model.mean.copy_(torch.zeros(size) if mean is None else torch.from_numpy(mean))
        model.scale.fill_(1.0)
    return model


@pytest.fixture
def books() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.normal(size=(size, 16)).astype(np.float32) for size in SIZES]


@pytest.mark.parametrize("local_search", [0, 3])
@pytest.mark.parametrize("split", [[3, 2], [1, 4], [2, 1, 2]])
def test_a_block_is_encoded_as_by_a_quantizer_of_its_own(books, clustered, split, local_search):
    vectors, mean = clustered[:300], clustered.mean(axis=0)
    model = quantizer(books, mean, search_blocks=split, local_search=local_search)
    packed = model.compress(vectors)
    codes, left, start = unpack_codes(packed, len(SIZES), SIZES), vectors - mean, 0
    for count in split:
        part = slice(start, start + count)
        alone = quantizer(books[part], local_search=local_search)
        own = alone.compress(left)
        np.testing.assert_array_equal(codes[:, part], unpack_codes(own, count, SIZES[part]))
        left = left - alone.decompress(own)
        prefix = model.compress(vectors, num_codebooks=part.stop)
        np.testing.assert_array_equal(prefix, truncate_codes(packed, len(SIZES), part.stop, SIZES))
        start += count
    restored = mean + sum(book[column] for book, column in zip(books, codes.T, strict=True))
    np.testing.assert_allclose(model.decompress(packed), restored, atol=1e-5)
    np.testing.assert_allclose(model.encode(torch.from_numpy(vectors)).reconstruction, restored, atol=1e-5)


def test_a_first_block_of_one_codebook_is_the_nearest_codeword(books, clustered):
    codes = quantizer(books, search_blocks=[1, 4]).encode(torch.from_numpy(clustered[:500])).codes
    index = faiss.IndexFlatL2(16)
    index.add(books[0])
    np.testing.assert_array_equal(codes[:, 0], index.search(clustered[:500], 1)[1][:, 0])


def test_a_block_of_one_codebook_needs_no_table_of_its_pairs():
    generator = np.random.default_rng(6)
    books, vectors = generator.normal(size=(2, 40_000, 4)).astype(np.float32), generator.normal(size=(20, 4))
    codes = quantizer(list(books), search_blocks=[1, 1], local_search=4).encode(torch.from_numpy(vectors)).codes
    left = vectors
    for book, column in zip(books, codes.T, strict=True):
        np.testing.assert_array_equal(column, [np.square(book - row).sum(axis=1).argmin() for row in left])
        left = left - book[column]


def test_blocks_survive_saving_and_training_mode(books, clustered, tmp_path):
    model = quantizer(books, search_blocks=[3, 2], local_search=2)
    model.save_pretrained(tmp_path)
    again = RQMoEModel.from_pretrained(tmp_path).eval()
    assert again.config.search_blocks == [3, 2]
    np.testing.assert_array_equal(again.compress(clustered[:100]), model.compress(clustered[:100]))
    with torch.no_grad():
        again.codebooks[3:] *= 2  # the tables of a block follow the weights
    larger = quantizer([*books[:3], *(2 * book for book in books[3:])], search_blocks=[3, 2], local_search=2)
    np.testing.assert_array_equal(again.compress(clustered[:100]), larger.compress(clustered[:100]))


@pytest.mark.parametrize("half_size", [False, True])
def test_the_file_has_the_codewords_one_after_the_other(books, clustered, tmp_path, half_size):
    """Nothing fills up smaller codebooks there; files in which something does can still be read."""
    model = quantizer(books, search_blocks=[3, 2], local_search=2)
    if half_size:
        round_weights(model)
    save_whole(model, tmp_path, half_size=half_size)
    stored = load_file(tmp_path / "model.safetensors")
    expected = torch.from_numpy(np.concatenate(books)).to(torch.bfloat16 if half_size else torch.float32)
    assert torch.equal(stored["codebooks"], expected)
    codes = model.compress(clustered[:100])
    for weights in (stored, stored | {"codebooks": model.codebooks.detach().to(expected.dtype)}):
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.codebooks, model.codebooks) and loaded.codebooks.dtype == torch.float32
        np.testing.assert_array_equal(loaded.compress(clustered[:100]), codes)
        again = RQMoEModel(model.config)
        again.load_state_dict(weights)
        assert torch.equal(again.codebooks, model.codebooks)


def test_a_file_with_too_few_codewords_is_refused(books, tmp_path):
    quantizer(books).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["codebooks"] = stored["codebooks"][1:].contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{sum(SIZES) - 1}, 16.* instead of .{sum(SIZES)}, 16"):
        RQMoEModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        RQMoEModel(quantizer(books).config).load_state_dict(stored)


def test_training_a_second_block_lowers_the_error_as_a_second_quantizer_does(clustered):
    """Half the bits of LSQ, then Faiss's LSQ on what it leaves, is what two blocks have to reach."""
    train, others = clustered[:4000], clustered[4000:6000]
    config = RQMoEConfig.additive(
        hidden_size=16, num_codebooks=4, codebook_size=32, search_blocks=[2, 2], local_search=8
    )
    model = initialize(RQMoEModel(config), train, "lsq", rounds=15, show_progress_bar=False).eval()
    left = others - model.decompress(model.compress(others, num_codebooks=2), num_codebooks=2)
    known = train - model.decompress(model.compress(train, num_codebooks=2), num_codebooks=2)
    theirs = faiss.LocalSearchQuantizer(16, 2, 5)
    theirs.train(known)
    reached = np.square(left - theirs.decode(theirs.compute_codes(left))).sum(axis=1).mean()
    ours = np.square(others - model.decompress(model.compress(others))).sum(axis=1).mean()
    assert ours <= 1.02 * reached
    assert ours < 0.7 * np.square(left).sum(axis=1).mean()


def test_a_first_block_of_one_codebook_is_trained_by_k_means(clustered):
    config = RQMoEConfig.additive(hidden_size=16, num_codebooks=3, codebook_size=32, search_blocks=[1, 2])
    model = initialize(RQMoEModel(config), clustered, "lsq", rounds=3, show_progress_bar=False).eval()
    kmeans = faiss.Kmeans(16, 32, niter=25, seed=3)
    kmeans.train(clustered)
    error = np.square(clustered - model.decompress(model.compress(clustered, num_codebooks=1), num_codebooks=1))
    assert error.sum(axis=1).mean() <= 1.05 * kmeans.obj[-1] / len(clustered)


def test_k_means_is_not_held_to_the_limit_of_tables(clustered, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.training.initialization.MAX_PAIRS", 31**2)
    config = RQMoEConfig.additive(hidden_size=16, num_codebooks=2, codebook_size=32, search_blocks=[1, 1])
    assert initialize(RQMoEModel(config), clustered, "lsq", rounds=1, show_progress_bar=False).is_initialized


def test_training_continues_in_the_block_where_it_was_stopped(clustered, tmp_path, monkeypatch):
    settings = {"rounds": 3, "final_rounds": 1, "batch_size": 2048, "show_progress_bar": False}
    vectors, sizes, file = clustered[:3000], [[16, 8], [16, 4]], tmp_path / "lsq.npz"
    whole = train_blocks(vectors, sizes, NeighborJitter(vectors), **settings)
    from rqmoe_hf.training import lsq

    improve, calls = lsq._improve, itertools.count()

    def stop(*args):
        if next(calls) == 6:  # of four in the first block
            raise KeyboardInterrupt
        return improve(*args)

    monkeypatch.setattr(lsq, "_improve", stop)
    monkeypatch.setattr(lsq, "SAVING_SHARE", float("inf"))  # after every round, however long a slow disk takes
    with pytest.raises(KeyboardInterrupt):
        train_blocks(vectors, sizes, NeighborJitter(vectors), file, **settings)
    monkeypatch.undo()
    assert [one.name for one in checkpoints(file)] == ["lsq-0.npz", "lsq-1.npz"]
    rounds = []
    monkeypatch.setattr(lsq, "_improve", lambda *args: rounds.append(1) or improve(*args))
    resumed = train_blocks(vectors, sizes, NeighborJitter(vectors), file, **settings)
    assert len(rounds) == 2  # the first block is not trained again, nor the rounds of the second
    for block, expected in zip(resumed, whole, strict=True):
        for codebook, before in zip(block.codebooks, expected.codebooks, strict=True):
            np.testing.assert_array_equal(codebook, before)


def test_a_block_leaves_moved_vectors_as_if_they_were_encoded(clustered, books):
    """The codes of a vector are where the search for its neighbour's begins: hardly worse than from the beam's."""
    vectors = clustered[:500]
    model = quantizer(books[:3], local_search=16)
    codes = unpack_codes(model.compress(vectors), 3, SIZES[:3])
    moved = vectors + np.random.default_rng(0).normal(scale=0.1, size=vectors.shape).astype(np.float32)
    left = training_blocks.TrainedBlock(books[:3], codes).leave(np.arange(500), torch.from_numpy(moved), 7)
    encoded = moved - model.decompress(model.compress(moved))
    assert np.square(left.numpy()).sum() <= 1.03 * np.square(encoded).sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search_blocks": [3, 3]}, "5 together"),
        ({"search_blocks": [5, 0]}, "from 1"),
        ({"search_blocks": []}, "5 together"),
        ({"search_blocks": [3, 2], "num_experts": 1}, "additive"),
    ],
)
def test_blocks_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RQMoEConfig.additive(num_codebooks=5, **settings)


def test_sizes_of_blocks_are_read_from_the_command_line():
    assert parse_sizes("1024x12,256+1024x2,64") == [[1024] * 12 + [256], [1024] * 2 + [64]]
    assert parse_sizes("4096+16x2") == [[4096], [16, 16]]
    assert parse_sizes("16x2,4") == [[16, 16, 4]]
    assert parse_sizes(None) is None
    for wrong in ("16x2++4", "+4", "4+", "4 + 4"):
        with pytest.raises(ValueError, match="codebook_sizes must be"):
            parse_sizes(wrong)
