"""The benchmark's sets: what can break without a download."""

import json
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rqmoe_hf.data import dataset_from_array

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "sets"))
import sets
import tasks
from passages import first_paragraphs
from sets.groups import drop_repeats, group_name, join_groups, largest_sizes, picture_name, split_groups
from sets.storage import MANIFEST, array_checksum, write_set

NAME = "sift-128"


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 128)).astype(np.float32)


@pytest.fixture
def root(tmp_path, vectors) -> Path:
    sources = [{"name": "random", "version": "0", "licence": "none"}]
    write_set(tmp_path / NAME, vectors[:40], vectors[40:], (6, 4), sources, "pytest")
    return tmp_path


def write_shards(folder: Path, vectors: np.ndarray, rows: int) -> None:
    folder.mkdir(parents=True)
    dataset_from_array(vectors).to_parquet(folder / "part-00000.parquet")
    (folder / "rqmoe_job.json").write_text(json.dumps({"rows": rows}))


def test_a_set_is_split_as_its_manifest_says(root, vectors):
    loaded = sets.load(NAME, root)
    np.testing.assert_array_equal(loaded.train, vectors[:40])
    np.testing.assert_array_equal(loaded.validation, vectors[40:46])
    np.testing.assert_array_equal(loaded.queries, vectors[46:50])
    np.testing.assert_array_equal(loaded.database, vectors[50:])
    assert not loaded.unit_norm and loaded.database.dtype == np.float32
    manifest = json.loads((root / NAME / MANIFEST).read_text())
    assert (manifest["train"], manifest["test"], manifest["dimension"]) == (40, 20, 128)


def test_the_checksum_is_of_the_vectors_used(root, vectors):
    whole, part = sets.load(NAME, root), sets.load(NAME, root, limit=30)
    assert len(part.train) == 30 and part.checksum != whole.checksum
    assert sets.load(NAME, root).checksum == whole.checksum
    changed = vectors.copy()
    changed[3, 5] += 1
    assert array_checksum([vectors]) != array_checksum([changed])
    assert array_checksum([vectors[:2], vectors[2:]]) != array_checksum([vectors[:3], vectors[3:]])


def test_errors_name_the_command(root, tmp_path):
    with pytest.raises(ValueError, match="no set 'sift'; the sets are minilm-384"):
        sets.load("sift", root)
    for name in ("fashion-mnist-784", "minilm-384"):
        with pytest.raises(ValueError, match=f"`make {name}` builds it"):
            sets.load(name, root)
    with pytest.raises(ValueError, match="at least 1"):
        sets.load(NAME, root, limit=0)


def test_changed_files_are_refused(root, vectors):
    np.save(root / NAME / "test.npy", vectors[40:] + 1)
    with pytest.raises(ValueError, match=r"test\.npy is not what manifest"):
        sets.load(NAME, root)


def test_shards_are_read_only_when_whole(tmp_path, vectors):
    wide = np.tile(vectors[:50], 3) / np.linalg.norm(np.tile(vectors[:50], 3), axis=1, keepdims=True)
    write_shards(tmp_path / "minilm-384" / "train", wide, rows=50)
    write_shards(tmp_path / "minilm-384" / "test", np.tile(wide, (140, 1)), rows=7_000)
    loaded = sets.load("minilm-384", tmp_path)
    assert loaded.unit_norm and len(loaded.database) == 1_000
    assert (len(loaded.validation), len(loaded.queries)) == (5_000, 1_000)
    (tmp_path / "minilm-384" / "train" / "rqmoe_job.json").write_text('{"rows": 51}')
    with pytest.raises(ValueError, match="50 of 51 vectors"):
        sets.load("minilm-384", tmp_path)


def test_too_few_test_vectors_or_another_dimension(tmp_path, vectors):
    for part in ("train", "test"):
        write_shards(tmp_path / "mpnet-768" / part, vectors, rows=60)
    with pytest.raises(ValueError, match="768 dimensions"):
        sets.load("mpnet-768", tmp_path)


def test_sizes_and_variants_of_a_picture_have_one_name():
    sizes = [PurePosixPath(f"mate/Elephants{size}.jpg") for size in ("", "_3840x2160", "_5640x3172")]
    assert {picture_name(path) for path in sizes} == {"mate/Elephants"}
    assert largest_sizes(sizes, [10, 30, 20]) == [1]
    dark, light = (
        PurePosixPath(f"wallpapers/Kay/contents/{folder}/5120x2880.png") for folder in ("images_dark", "images")
    )
    assert picture_name(dark) != picture_name(light) and group_name(dark) == group_name(light)
    assert group_name(PurePosixPath("gnome/grid-d.webp")) == group_name(PurePosixPath("gnome/grid-l.webp"))
    assert group_name(PurePosixPath("a/rock002a.png")) == group_name(PurePosixPath("a/rock014.jpg")) == "a/rock"
    assert group_name(PurePosixPath("a/Wood.jpg")) != group_name(PurePosixPath("a/Wool.jpg"))


def test_pictures_alike_are_in_one_group_also_through_others():
    generator = np.random.default_rng(0)
    one, two, three = generator.normal(size=(3, 256))
    # 0 is like 2 (a negative), 2 has the name of 4, 4 is like 5; a picture of one grey value is like none
    thumbnails = np.stack([one, two, 255 - one, np.ones(256), three, three * 2 + 1])
    groups = join_groups(["a", "b", "c", "d", "c", "e"], thumbnails)
    np.testing.assert_array_equal(groups, [0, 1, 0, 3, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides(seed):
    groups = np.random.default_rng(seed).integers(0, 30, 100)
    held_out = split_groups(groups, 0.2, seed)
    assert not set(groups[held_out]) & set(groups[~held_out])
    assert 0.15 < held_out.mean() <= 0.2
    np.testing.assert_array_equal(held_out, split_groups(groups, 0.2, seed))


def test_repeated_vectors_are_dropped_and_never_on_both_sides():
    train = np.array([[3, 1], [0, 2], [3, 1]], np.uint8)
    test = np.array([[9, 9], [0, 2], [1, 0], [9, 9]], np.uint8)
    kept = drop_repeats(train, test)
    np.testing.assert_array_equal(kept[0], [[3, 1], [0, 2]])
    np.testing.assert_array_equal(kept[1], [[9, 9], [1, 0]])


def test_packages_are_asked_for_by_their_short_descriptions(tmp_path):
    """The first paragraph is wanted, by the first package that has it; other paragraphs and training ones are not."""
    descriptions = [
        ("reads old tapes", [" A program that reads the\n tapes of old machines.", " It also writes them slowly."]),
        ("writes old tapes", [" A program that reads the\n tapes of old machines."]),
        ("reads old tapes", [" Another reader of tapes."]),
        ("too short", [" Of which the short one is."]),
        ("this is not held out", [" A paragraph for training."]),
    ]
    pairs = first_paragraphs(descriptions)
    file, documents = tmp_path / "packages.parquet", ["something else", *list(pairs)[:2]]
    pq.write_table(pa.table({"text": list(pairs), "short": list(pairs.values())}), file)
    assert documents[1:] == ["A program that reads the tapes of old machines.", "Another reader of tapes."]
    assert tasks.package_items(file, documents) == (["reads old tapes"], [[1, 2]])
