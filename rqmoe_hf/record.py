"""The evaluation that travels with a checkpoint as `evaluation.json`: what cards show and fit checks compare with."""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .codes import unpack_codes
from .evaluation import code_usage, evaluate, nearest_neighbors, recalls, split_queries
from .machine import describe_machine
from .modeling_rqmoe import RQMoEModel
from .saving import weights_checksum

logger = logging.getLogger(__name__)
RECORD_FILE = "evaluation.json"
TRAINING_FILE = "training.json"  # what the training was; `rqmoe_hf.training.train_quantizer` writes it
DATABASE_SIZES = (250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)


@dataclass
class EvaluationRecord:
    """Measurements of one checkpoint on held-out embeddings.

    Args:
        weights: Checksum of the weights measured (`rqmoe_hf.saving.weights_checksum`).
        num_vectors: Vectors in the database.
        num_queries: Queries, uncompressed.
        mean_norm: Mean Euclidean norm of the embeddings.
        variance: Mean squared distance of the embeddings to the quantizer's mean: the error of storing nothing.
        reports: A `QuantizerReport`, as a dictionary, for every prefix of the codes; the use of the codes step by
            step only for the whole.
        by_size: Of the whole code on the first so many vectors: `vectors`, `recall_10_at_10`, `code_entropy` (mean
            over steps, bits). Both depend on the size, so a fit check compares at its own sample's.
        speed: `encode_per_second`, `decode_per_second` (vectors), `num_candidates`, `beam_size`.
        environment: Machine, versions and date.
        texts: What was embedded, in words.
        comparison: Other methods at similar bytes: `method`, `bytes_per_vector`, `mse` and the three recalls.
        preserved: What tasks keep: `task`, `metric`, `bytes_per_vector`, `value`, `uncompressed`, and optionally
            `dataset_id` and `task_id` on the Hub.
    """

    weights: str
    num_vectors: int
    num_queries: int
    mean_norm: float
    variance: float
    reports: list[dict[str, Any]]
    by_size: list[dict[str, Any]]
    speed: dict[str, Any]
    environment: dict[str, Any]
    texts: str | None = None
    comparison: list[dict[str, Any]] = field(default_factory=list)
    preserved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> dict[str, Any]:
        """The report of the whole code."""
        return self.reports[-1]

    def at_size(self, name: str, vectors: int) -> float:
        """`recall_10_at_10` or `code_entropy` as it would be with so many vectors, between the sizes measured."""
        sizes = np.log([row["vectors"] for row in self.by_size])
        return float(np.interp(np.log(vectors), sizes, [row[name] for row in self.by_size]))

    def to_json(self) -> str:
        """The text of `evaluation.json`."""
        return json.dumps(_rounded(asdict(self)), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationRecord":
        """Reads `evaluation.json`.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            found = json.loads(text)
            return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})
        except (TypeError, ValueError) as error:
            raise ValueError(f"This is no {RECORD_FILE} of a quantizer: {error}. Write a new one.") from error


def measure(model: RQMoEModel, embeddings: np.ndarray, texts: str | None = None) -> EvaluationRecord:
    """Measures a checkpoint on held-out embeddings with its default search: every prefix, several sizes, speed.

    Args:
        model: The quantizer.
        embeddings: `(n, hidden_size)`; the first tenth, at most 1,000, are the queries.
        texts: What was embedded, in words, for the card.
    """
    config = model.config
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    queries, database = split_queries(embeddings)
    reports = evaluate(model, database, queries, list(range(1, config.num_codebooks + 1)))
    model.compress(database[:256])  # builds the tables, which the clock should not see
    start = time.perf_counter()
    packed = model.compress(database)
    encoded = time.perf_counter()
    restored = model.decompress(packed)
    decoded = time.perf_counter()
    codes = unpack_codes(packed, config.num_codebooks, config.code_sizes)
    by_size = []
    for size in sorted({*(size for size in DATABASE_SIZES if size < len(database)), len(database)}):
        truth = nearest_neighbors(queries, database[:size], 10)
        found = nearest_neighbors(queries, restored[:size], 10)
        entropy = float(np.mean(code_usage(codes[:size], config.code_sizes)[0]))
        by_size.append({"vectors": size, "recall_10_at_10": recalls(truth, found)[2], "code_entropy": entropy})
    return EvaluationRecord(
        weights=weights_checksum(model),
        num_vectors=len(database),
        num_queries=len(queries),
        mean_norm=float(np.linalg.norm(embeddings, axis=1).mean()),
        variance=float(np.square(embeddings - model.mean.float().cpu().numpy()).sum(axis=1).mean()),
        reports=[_brief(report.as_dict()) for report in reports[:-1]] + [reports[-1].as_dict()],
        by_size=by_size,
        speed={
            "encode_per_second": round(len(database) / (encoded - start)),
            "decode_per_second": round(len(database) / (decoded - encoded)),
            "num_candidates": config.num_candidates,
            "beam_size": config.beam_size,
        },
        environment=describe_machine(),
        texts=texts,
    )


def load_record(name: str | os.PathLike, revision: str | None = None) -> EvaluationRecord | None:
    """The record beside a checkpoint, given its folder or Hub id; `None` if it has none, or is not there."""
    folder = Path(name)
    if folder.is_dir():
        file = folder / RECORD_FILE
        return EvaluationRecord.from_json(file.read_text("utf-8")) if file.is_file() else None
    try:
        found = hf_hub_download(str(name), RECORD_FILE, revision=revision)
    except (HFValidationError, EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return EvaluationRecord.from_json(Path(found).read_text("utf-8"))


def record_of(model: RQMoEModel, name: str | os.PathLike, revision: str | None = None) -> EvaluationRecord | None:
    """As [`load_record`], but `None`, with a warning, where other weights than this model's were measured."""
    record = load_record(name, revision)
    if record is None or record.weights == weights_checksum(model):
        return record
    logger.warning(
        "The %s of %s was measured with other weights and is left out: measure these with `rqmoe evaluate --save`.",
        RECORD_FILE,
        name,
    )
    return None


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    """Without the use of the codes, which is the same for a prefix."""
    return {name: value for name, value in report.items() if not isinstance(value, list)}


def _rounded(value: Any) -> Any:
    """Floats with six significant digits: files that people read and compare."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
