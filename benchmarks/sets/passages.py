"""Builds the English passages that the bundled quantizers are trained on, from Debian packages.

    python benchmarks/sets/passages.py --output data/passages

writes ``train.parquet`` and ``test.parquet`` with the columns ``text`` and ``source``. The sources are dictionary
entries (WordNet glosses, GCIDE, FOLDOC) and the paragraphs of Debian's package descriptions: short English prose from
many fields. ``packages.parquet`` says for package descriptions in ``test.parquet``, in the column ``text``, what the
short description is that they were written for. Needs ``apt-get`` and ``dpkg-deb`` and a Debian or Ubuntu mirror;
nothing is installed on the system.

Passages that begin with the same words go to the same side of the split, so that the many near-duplicates among
package descriptions ("... This package contains the development files") do not cross it. The order is a shuffle with
a fixed seed: any prefix of a file is a random sample of it.
"""

import argparse
import gzip
import hashlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from downloads import unpack_debian
from storage import text_checksum

PACKAGES = ("wordnet-base", "dict-gcide", "dict-foldoc")
EXPECTED = {  # sha256 of the texts behind the published results
    "train": "94de557861e447f06ee0db188f67c41cfe4a4ef261b3152b48fd6d525e0e8e0a",
    "test": "dddf51ea28898cf162a48e9acac6066087b926a3de846147a9e03b56516d9135",
}
SOURCES = [
    {"name": "Debian package wordnet-base", "version": "1:3.0-37", "licence": "WordNet 3.0 licence"},
    {"name": "Debian package dict-gcide", "version": "0.48.5+nmu2", "licence": "GPL"},
    {"name": "Debian package dict-foldoc", "version": "20230119-1", "licence": "GFDL-1.1"},
    {"name": "Debian package descriptions", "version": "Debian 12", "licence": "that of each package"},
]
TEST_SHARE = 0.05
MIN_WORDS, MAX_WORDS = 3, 200


def download_packages(folder: Path) -> None:
    """Unpacks the dictionaries' packages and the English package descriptions below ``folder``."""
    unpack_debian(PACKAGES, folder)
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache").mkdir()
    # Lists of our own: many systems are set not to fetch the descriptions, and the system's setting stays as it is.
    options = ("Dir::State::lists", folder / "lists"), ("Dir::Cache", folder / "cache"), ("Acquire::Languages", "en")
    flags = [part for key, value in options for part in ("-o", f"{key}={value}")]
    flags += ["-o", "Acquire::GzipIndexes=false", "-o", "Acquire::CompressionTypes::Order::=gz"]
    subprocess.run(["apt-get", *flags, "-q", "update"], check=True, stdout=subprocess.DEVNULL)


def wordnet_glosses(root: Path) -> Iterator[str]:
    """Yields ``word, word: gloss`` for each synonym set of WordNet 3.0 (format: its manual page wndb(5))."""
    for part in ("adj", "adv", "noun", "verb"):
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text("utf-8", "replace").splitlines():
            if line.startswith(" "):  # the licence at the head of each file
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            yield f"{', '.join(words)}: {gloss}"


def dictd_entries(root: Path, name: str) -> Iterator[str]:
    """Yields the paragraphs of a dictd dictionary, each behind its headword."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = value * 64 + digits.index(digit)
        return value

    folder = root / "usr/share/dictd"
    body = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    seen = set()
    for line in (folder / f"{name}.index").read_text("utf-8").splitlines():
        headword, offset, length = line.split("\t")[:3]
        start = number(offset)
        if headword.startswith("00-database") or start in seen:
            continue
        seen.add(start)
        entry = body[start : start + number(length)].decode("utf-8", "replace")
        for paragraph in re.split(r"\n\s*\n", entry):
            yield f"{headword}: {paragraph}"


def package_descriptions(lists: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields short description and paragraphs of the long description of all packages."""
    for path in sorted(lists.glob("*Translation-en*")):
        data = path.read_bytes()
        if path.suffix == ".lz4":
            data = subprocess.run(["lz4", "-dc", path], check=True, capture_output=True).stdout
        for block in data.decode("utf-8", "replace").split("\n\n"):
            text = block.partition("Description-en: ")[2]
            short, _, long = text.partition("\n")
            yield short, re.split(r"\n \.\n", long)


def first_paragraphs(descriptions: list[tuple[str, list[str]]]) -> dict[str, str]:
    """The short description that the first paragraph of a long one goes with, both cleaned: `{paragraph: short}`.

    Packages of one source often share the paragraph: then it goes with the first one's.
    """
    pairs: dict[str, str] = {}
    for short, paragraphs in descriptions:
        query, passage = clean(short), clean(paragraphs[0])
        if query and passage:
            pairs.setdefault(passage, query)
    return pairs


def clean(text: str) -> str | None:
    """Folds white space and markup; None if the text is too short or is no prose."""
    text = re.sub(r"[{}\\\[\]|]", "", re.sub(r"\s+", " ", text))
    text = re.sub(
        r"\s*\b(1913 Webster|Webster 1913 Suppl\.|WordNet 1\.5|PJC)(?!\w)", "", text
    ).strip()  # GCIDE's sources
    words = text.split()
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(words) < MIN_WORDS or letters < 0.75 * len(text):
        return None
    return " ".join(words[:MAX_WORDS])


def split_key(text: str) -> float:
    """A number in [0, 1) that is the same for texts that begin with the same five words."""
    start = " ".join(re.findall(r"[a-z0-9]+", text.lower())[:5])
    return int.from_bytes(hashlib.blake2b(start.encode(), digest_size=6).digest(), "big") / 2**48


def build(output: Path, seed: int) -> None:
    """Downloads the sources and writes the two parquet files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # apt's own user reads the folder
        download_packages(folder)
        descriptions = list(package_descriptions(folder / "lists"))
        sources = {
            "wordnet": wordnet_glosses(folder / "root"),
            "gcide": dictd_entries(folder / "root", "gcide"),
            "foldoc": dictd_entries(folder / "root", "foldoc"),
            "debian": (text for short, paragraphs in descriptions for text in (short, *paragraphs)),
        }
        passages: dict[str, str] = {}
        for source, texts in sources.items():
            for text in filter(None, map(clean, texts)):
                passages.setdefault(text, source)
    rows = sorted(passages.items())
    random.Random(seed).shuffle(rows)
    output.mkdir(parents=True, exist_ok=True)
    for split, wanted in (("train", False), ("test", True)):
        part = [row for row in rows if (split_key(row[0]) < TEST_SHARE) == wanted]
        table = pa.table({"text": [text for text, _ in part], "source": [source for _, source in part]})
        pq.write_table(table, output / f"{split}.parquet", compression="zstd")
        print(f"{split}: {len(part):,} passages, sha256 of the texts {check([text for text, _ in part], split)[:16]}")
    held_out = {text for text, source in part if source == "debian"}  # of the last split, which is the test
    pairs = sorted(item for item in first_paragraphs(descriptions).items() if item[0] in held_out)
    table = pa.table({"text": [text for text, _ in pairs], "short": [short for _, short in pairs]})
    pq.write_table(table, output / "packages.parquet", compression="zstd")


def check(texts: list[str], split: str) -> str:
    """Warns if the texts are not those behind the published results; returns their sha256."""
    found = text_checksum(texts)
    if found != EXPECTED[split]:
        print(
            f"Warning: the {split} passages differ from those behind the published results (sha256 {found[:16]}, not "
            f"{EXPECTED[split][:16]}). Point releases of Debian change package descriptions. Sets made of them are as "
            "good to compare methods on, but their results differ a little from the published ones.",
            file=sys.stderr,
        )
    return found


def read(folder: Path, split: str, limit: int | None = None) -> list[str]:
    """Reads the texts of a split, "train" or "test", and warns if they are not the expected ones.

    Args:
        folder: What ``--output`` was.
        split: Which one.
        limit: Only so many from the beginning, which are a random sample.
    """
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SystemExit(f"There is no {path}: python benchmarks/sets/passages.py --output {folder} makes it.")
    texts = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    check(texts, split)
    return texts[:limit]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/passages"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed)
