"""What `rqmoe train` says to those who have few embeddings."""

from ..bundled import bundled_quantizers
from ..configuration_rqmoe import RQMoEConfig

# On SIFT descriptors experts pay with 100,000 vectors; on Fashion-MNIST's 50,000, and on text embeddings, they do not
# (benchmarks/LEVERS.md, Experts).
FEW_FOR_EXPERTS = 100_000
# On 6,000 texts a fine-tuned quantizer has less error than one that is trained anew (README, Does it suit your texts?),
# and on texts like its own the one for all-MiniLM-L6-v2 has less than any with up to 300,000 (How good it is).
FEW_FOR_CODEBOOKS = 30_000


def advice(vectors: int | None, config: RQMoEConfig) -> list[str]:
    """What may serve better than training this quantizer on so few embeddings.

    Args:
        vectors: How many there are; None if that is not known.
        config: Of the quantizer that is to be trained from nothing.

    Returns:
        Sentences, none if there are enough.
    """
    if vectors is None:
        return []
    found = []
    if config.has_experts and vectors < FEW_FOR_EXPERTS:
        found.append(
            f"{vectors:,} embeddings are few for experts, which have been worth it with {FEW_FOR_EXPERTS:,} and more: "
            "codebooks alone (--additive --bytes 8) have less error as a rule, in minutes."
        )
    if vectors < FEW_FOR_CODEBOOKS:
        for encoder, names in suitable_quantizers(config).items():
            found.append(
                f"If these {vectors:,} embeddings are from {encoder}, look how well {' or '.join(names)} suits them "
                f"(rqmoe evaluate), or fine-tune it (--from {names[0]}): it was trained on more."
            )
    return found


def suitable_quantizers(config: RQMoEConfig) -> dict[str, list[str]]:
    """Names of the bundled quantizers for embeddings of this size and, if it is known, of this encoder, by encoder."""
    found: dict[str, list[str]] = {}
    for name, folder in bundled_quantizers().items():
        other = RQMoEConfig.from_pretrained(folder)
        encoder = (other.base_model or "").rpartition("/")[2]
        same = config.base_model is None or config.base_model.rpartition("/")[2] == encoder
        if encoder and same and other.hidden_size == config.hidden_size:
            found.setdefault(encoder, []).append(name)
    return found
