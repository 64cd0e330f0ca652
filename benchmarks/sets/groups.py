"""Pictures that show the same belong together: only the largest of several sizes is used, and no group is split."""

import re
from pathlib import PurePosixPath

import numpy as np

ALIKE = 0.9  # correlation of two thumbnails
SIZE = re.compile(r"[-_]?\d{3,5}x\d{3,5}([-_]portrait)?", re.IGNORECASE)
VARIANT = re.compile(r"[-_]([a-z]|dark|light|cold|warm)(?=[-_]|$)|\d.*", re.IGNORECASE)


def picture_name(path: PurePosixPath) -> str:
    """What the sizes of one picture have in common: the path without its ending and the size in pixels.

    >>> picture_name(PurePosixPath("mate/Elephants_3840x2160.jpg"))
    'mate/Elephants'
    """
    return SIZE.sub("", path.with_suffix("").as_posix()).rstrip("/")


def group_name(path: PurePosixPath) -> str:
    """What a picture and its variants have in common.

    Of Plasma's wallpapers it is their folder, of others the folder and the name without light and dark, and without
    what follows a number: textures `rock001` and `rock002a` are of one author and may be of one photograph.

    >>> group_name(PurePosixPath("textures/rock002a.png"))
    'textures/rock'
    """
    if "contents" in path.parts:
        return "/".join(path.parts[: path.parts.index("contents")])
    name = PurePosixPath(picture_name(path))
    return f"{name.parent}/{VARIANT.sub('', name.name)}"


def largest_sizes(paths: list[PurePosixPath], pixels: list[int]) -> list[int]:
    """Positions of the pictures to use: of each name the one with most pixels, in the order of the paths."""
    best: dict[str, int] = {}
    for position, path in enumerate(paths):
        name = picture_name(path)
        if name not in best or pixels[position] > pixels[best[name]]:
            best[name] = position
    return sorted(best.values())


def join_groups(names: list[str], thumbnails: np.ndarray) -> np.ndarray:
    """Numbers the groups of pictures that share a name or look alike, directly or through others.

    Light and dark variants may be negatives of one another, so it is the size of the correlation that counts.

    Args:
        names: For each picture the name of its group.
        thumbnails: ``(pictures, pixels)`` grey values.

    Returns:
        For each picture the position of the first one of its group, int64 ``(pictures,)``.
    """
    centred = thumbnails.astype(np.float64) - thumbnails.mean(axis=1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    alike = np.abs(centred @ centred.T) > ALIKE
    named = np.unique(names, return_inverse=True)[1]
    alike |= named[:, None] == named[None, :]
    groups = np.arange(len(names))
    while True:  # each takes the lowest number among those it is like, until nothing changes
        lowest = np.where(alike, groups[None, :], len(names)).min(axis=1)
        if np.array_equal(lowest, groups):
            return groups
        groups = lowest


def split_groups(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses whole groups at random while they have no more than the share of the pictures.

    Args:
        groups: ``(pictures,)`` the number of each picture's group.
        share: Of the pictures, between 0 and 1.
        seed: Of the order in which groups are drawn.

    Returns:
        bool ``(pictures,)``, true for the pictures of the groups chosen.
    """
    chosen = np.zeros(len(groups), bool)
    for group in np.random.default_rng(seed).permutation(np.unique(groups)):
        if np.mean(chosen | (groups == group)) <= share:  # a very large group is never chosen
            chosen |= groups == group
    return chosen


def drop_repeats(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops vectors that occur twice, from the test side if they are on both; the order stays.

    Drawn and tiled pictures repeat whole patches. As queries and neighbours, equal vectors would only make ties.

    Args:
        train: uint8 ``(n, d)``.
        test: uint8 ``(m, d)``.
    """
    rows = np.ascontiguousarray(np.concatenate([train, test]))
    first = np.sort(np.unique(rows.view(f"V{rows.shape[1]}").reshape(-1), return_index=True)[1])
    return rows[first[first < len(train)]], rows[first[first >= len(train)]]
