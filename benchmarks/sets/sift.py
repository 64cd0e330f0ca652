"""Builds the set sift-128: SIFT descriptors of wallpapers and textures in Debian packages, whole numbers up to 255.

    pip install opencv-python-headless
    python benchmarks/sets/sift.py --output data/sift-128

The descriptors are of the kind of SIFT1M, but not its vectors: those are in no package. Of a wallpaper that comes in
several sizes the largest is used. Pictures that look alike (light and dark variants, copies) are on one side of the
split. The descriptors of a picture are kept in ``<output>/pictures``, and a run that was stopped continues there.
Needs ``apt-get`` and ``dpkg-deb`` and a Debian or Ubuntu mirror; nothing is installed on the system.
"""

import argparse
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from downloads import unpack_debian
from groups import drop_repeats, group_name, join_groups, largest_sizes, split_groups
from storage import save_array, write_set
from tqdm import tqdm

try:
    import cv2
except ImportError:
    sys.exit("SIFT descriptors need OpenCV: python -m pip install opencv-python-headless, then repeat the command.")

LICENCES = {  # of the pictures, after the packages' copyright files
    "plasma-workspace-wallpapers": "GPL-2+",
    "mate-backgrounds": "GPL-2+, CC BY-SA 4.0",
    "gnome-backgrounds": "CC BY-SA 3.0, CC BY-SA 2.0, CC BY 2.0",
    "ukui-wallpapers": "CC BY-SA 3.0",
    "lomiri-wallpapers-16.04": "CC BY 4.0, CC BY-SA 4.0, CC0 1.0",
    "lomiri-wallpapers-20.04": "CC BY-SA 3.0",
    "ufoai-textures": "GPL-2, GPL-2+, GPL-3+, CC BY-SA 3.0, CC BY 3.0, MIT, public domain",
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MIN_BYTES = 100_000  # smaller files are previews, or gradients without corners
LONGEST_SIDE = 3_840  # pixels
CONTRAST = 0.02  # half of OpenCV's default: more descriptors, of weaker corners too
NO_PHOTOS = re.compile(r"_(nm|gm|sm|rm|norm|bump)$|^screenshot$")  # maps of normals, gloss and so on; previews
TRAIN_CAP, TEST_CAP = 3_000, 400  # descriptors per picture, or a few pictures would be most of the set
TEST_SHARE = 0.1  # of the pictures
VALIDATION, QUERIES = 5_000, 1_000


def read_grey(path: Path) -> np.ndarray:
    """Reads a picture as grey values, uint8 ``(height, width)``, made smaller if it is very large."""
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise ValueError(f"OpenCV cannot read {path}.")
    factor = LONGEST_SIDE / max(picture.shape)
    if factor < 1:
        size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return picture


def unzip(archive: Path) -> None:
    """Unpacks a zip file beside itself, once."""
    folder, scratch = archive.with_suffix(""), archive.with_suffix(".tmp")
    if not folder.exists():
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(scratch)
        os.replace(scratch, folder)


def find_pictures(root: Path) -> tuple[list[Path], np.ndarray]:
    """Finds the pictures to use and which belong together.

    Returns:
        Their paths below ``root``, and int64 ``(pictures,)`` the number of each one's group.
    """
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in ENDINGS and not path.is_symlink()]
    files = [path for path in files if path.stat().st_size > MIN_BYTES and not NO_PHOTOS.search(path.stem)]
    pixels, thumbnails = [], []
    for path in tqdm(files, desc="compare", unit="picture"):
        picture = read_grey(path)
        pixels.append(picture.size)
        thumbnails.append(cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA).reshape(-1))
    paths = [PurePosixPath(path.relative_to(root)) for path in files]
    groups = join_groups([group_name(path) for path in paths], np.stack(thumbnails))
    kept = largest_sizes(paths, pixels)
    return [Path(paths[position]) for position in kept], groups[kept]


def describe(path: Path, cache: Path) -> np.ndarray:
    """All SIFT descriptors of a picture, uint8 ``(n, 128)``, computed once."""
    found = cache / f"{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}.npy"
    if not found.exists():
        _, descriptors = cv2.SIFT_create(contrastThreshold=CONTRAST).detectAndCompute(read_grey(path), None)
        descriptors = np.zeros((0, 128)) if descriptors is None else descriptors
        save_array(found, descriptors.astype(np.uint8))  # OpenCV's values are whole numbers up to 255
    return np.load(found)


def sample(descriptors: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """At most ``count`` of the rows, drawn without order."""
    return descriptors[generator.permutation(len(descriptors))[:count]]


def build(output: Path, packages: Path, seed: int) -> None:
    """Downloads the pictures, describes them and writes the set."""
    cv2.setNumThreads(1)  # the order of the descriptors would depend on it
    versions = unpack_debian(tuple(LICENCES), packages)
    root, cache = packages / "root", output / "pictures"
    for archive in root.rglob("*.pk3"):
        unzip(archive)
    cache.mkdir(parents=True, exist_ok=True)
    paths, groups = find_pictures(root)
    held_out = split_groups(groups, TEST_SHARE, seed)
    generator = np.random.default_rng(seed)
    train, test = [], []
    for path, is_test in tqdm(list(zip(paths, held_out, strict=True)), desc="describe", unit="picture"):
        part, cap = (test, TEST_CAP) if is_test else (train, TRAIN_CAP)
        part.append(sample(describe(root / path, cache), cap, generator))
    vectors = drop_repeats(np.concatenate(train), np.concatenate(test))
    write_set(
        output,
        *(sample(part, len(part), generator) for part in vectors),
        (VALIDATION, QUERIES),
        [
            {"name": f"Debian package {package}", "version": versions[package], "licence": licence}
            for package, licence in LICENCES.items()
        ],
        f"python benchmarks/sets/sift.py --seed {seed}",
        ("opencv-python-headless",),
        seed=seed,
        pictures={"train": len(train), "test": len(test), "groups": len(np.unique(groups))},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/sift-128"))
    parser.add_argument("--packages", type=Path, default=Path("data/packages/pictures"), help="For downloads.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, arguments.packages, arguments.seed)
