"""Fit check: does a quantizer suit the embeddings at hand as well as those that its card was measured on?"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from .evaluation import evaluate, split_queries
from .modeling_rqmoe import RQMoEModel
from .record import EvaluationRecord

MIN_VECTORS = 300  # fewer make every figure noise
NORM_TOLERANCE = 0.05
# Errors are times the card's; recall@10 and entropy (bits per code) below the card's. Chosen by benchmarks/fit.py:
# quantizers with experts gain more from fine-tuning on English Wikipedia (1.27 times the error, 0.6 bits), and more
# from new training on narrow collections and other languages (from 1.2 times the error, but more than one bit: most
# codewords lie idle): the quantizer of benchmarks/recipes. The error of those of LSQ, which are fine-tuned by least
# squares, falls more by that.
TRUST_ERROR, TRUST_RECALL = 1.15, 0.05
RETRAIN_ERROR, RETRAIN_RECALL, RETRAIN_ENTROPY = 2.0, 0.2, 1.0
VERDICTS = {
    "trust": "trust it: your embeddings are as well compressed as those of the card",
    "fine-tune": "fine-tune it on your texts: rqmoe train --from MODEL",
    "retrain": "train a quantizer for your texts (from about 5,000 of them) and encoder: rqmoe train",
}


@dataclass
class FitReport:
    """A sample beside the card.

    Args:
        verdict: "trust", "fine-tune" or "retrain".
        reasons: What speaks against trust, in words.
        num_vectors: Vectors in the sample's database.
        mse: `(sample, card)`. So are the following; recall and entropy are the card's at the sample's size.
        recall_10_at_10: Share of the true ten nearest found.
        mean_norm: Mean Euclidean norm of the embeddings.
        code_entropy: Mean over the steps, in bits.
    """

    verdict: Literal["trust", "fine-tune", "retrain"]
    reasons: list[str]
    num_vectors: int
    mse: tuple[float, float]
    recall_10_at_10: tuple[float, float]
    mean_norm: tuple[float, float]
    code_entropy: tuple[float, float]

    def as_dict(self) -> dict:
        """The fields as a plain dictionary."""
        return asdict(self)


def check_fit(model: RQMoEModel, embeddings: np.ndarray, record: EvaluationRecord) -> FitReport:
    """Compares a sample with the evaluation that came with the quantizer.

    Error and norm do not depend on the size of the sample; recall and entropy do and are compared at its size. Where
    the sample is larger than the largest size measured, its first vectors are taken.

    Args:
        model: The quantizer; its default search is used, as in the record.
        embeddings: The sample, `(n, hidden_size)`; a tenth, at most 1,000, become queries.
        record: The evaluation beside the quantizer, see `rqmoe_hf.record.load_record`.

    Raises:
        ValueError: If the sample is too small.
    """
    if len(embeddings) < MIN_VECTORS:
        raise ValueError(f"A fit check needs at least {MIN_VECTORS} embeddings, got {len(embeddings)}.")
    queries, database = split_queries(np.ascontiguousarray(embeddings, np.float32))
    database = database[: record.by_size[-1]["vectors"]]
    found = evaluate(model, database, queries)[0]
    fit = FitReport(
        verdict="trust",
        reasons=[],
        num_vectors=len(database),
        mse=(found.mse, record.whole["mse"]),
        recall_10_at_10=(found.recall_10_at_10, record.at_size("recall_10_at_10", len(database))),
        mean_norm=(float(np.linalg.norm(database, axis=1).mean()), record.mean_norm),
        code_entropy=(float(np.mean(found.code_entropy)), record.at_size("code_entropy", len(database))),
    )
    _judge(fit, least_squares=not model.config.has_experts and model.config.local_search > 0)
    return fit


def _judge(fit: FitReport, least_squares: bool) -> None:
    """Sets verdict and reasons from the figures."""
    error = fit.mse[0] / max(fit.mse[1], 1e-12)
    lost = fit.recall_10_at_10[1] - fit.recall_10_at_10[0]
    norm = fit.mean_norm[0] / max(fit.mean_norm[1], 1e-12)
    if abs(norm - 1) > NORM_TOLERANCE:
        fit.reasons.append(
            f"the embeddings have a mean norm of {fit.mean_norm[0]:.3g}, those of the card {fit.mean_norm[1]:.3g}: "
            "another encoder, or normalisation left out"
        )
    if error > TRUST_ERROR:
        fit.reasons.append(f"the error is {error:.2f} times the card's")
    if lost > TRUST_RECALL:
        fit.reasons.append(f"recall@10 is {lost:.3f} below the card's")
    idle = fit.code_entropy[1] - fit.code_entropy[0]
    if idle > RETRAIN_ENTROPY:
        fit.reasons.append(f"the codes carry {idle:.1f} bits less each than on the card's texts: codewords lie idle")
    hopeless = abs(norm - 1) > NORM_TOLERANCE or error > RETRAIN_ERROR or lost > RETRAIN_RECALL
    if hopeless or (fit.reasons and idle > RETRAIN_ENTROPY and not least_squares):
        fit.verdict = "retrain"
    elif fit.reasons:
        fit.verdict = "fine-tune"
