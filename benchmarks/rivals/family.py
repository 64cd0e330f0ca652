"""Members of our own family: published ones and ours, trained by the package's Trainer, and finished quantizers."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rqmoe_hf import RQMoEConfig, RQMoEModel, unpack_codes
from rqmoe_hf.bundled import load_quantizer, quantizer_source
from rqmoe_hf.codes import bits_per_code, sizes_for_bytes, sizes_of
from rqmoe_hf.data import dataset_from_array
from rqmoe_hf.least_squares import MAX_COLUMNS
from rqmoe_hf.local_search_rqmoe import LOCAL_SEARCH, LOCAL_SEARCH_BEAM
from rqmoe_hf.record import TRAINING_FILE
from rqmoe_hf.training import RQMoETrainingArguments, initialize, train_quantizer
from rqmoe_hf.training.initialization import block_bytes
from rqmoe_hf.training.run import suitable_rounds

from .additive_tables import best_tables, decode_tables
from .interface import contiguous, squared_error

VALIDATION = 5_000
TABLE_VECTORS = 200_000
# Of annealing (`--init-rounds`), in each block. More than by default: at 8 bytes and 10 bits it still takes less time
# than Faiss's LSQ. With more than two blocks fewer, since the time grows with their number.
ROUNDS, ROUNDS_OF_MANY_BLOCKS = 80, 30


@dataclass(frozen=True)
class Recipe:
    """How a member with experts is trained.

    Args:
        build: Makes the configuration of the member.
        config: Settings of the member, without sizes of the data.
        batch_size: Vectors per step.
        learning_rate: Of the first step; a cosine takes the place of the authors' drops after a plateau, which a fixed
            time does not have.
        weight_decay: Of the optimizer.
        epochs: How many, instead of as many as fit into a time.
        init_beam_size: Of the residual quantizer that training starts from.
        final_beam_size: Of the encoder, after training.
        bf16: Whether experts are trained in bfloat16.
    """

    build: Callable[..., RQMoEConfig]
    config: dict = field(default_factory=dict)
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: float | None = None
    init_beam_size: int = 1
    final_beam_size: int | None = None
    bf16: bool = False


# Both start from Faiss RQ of beam 1 and evaluate 16 pre-selected codewords per step (QINCo2's A = 16): their authors
# evaluate all 256, which no budget of hours on a processor allows.
SEARCH = {"num_candidates": 16, "beam_size": 1, "codebook_size": 256, "intermediate_size": 256}
RECIPES = {
    # The settings of QINCo's training page for 500,000 vectors.
    "qinco": Recipe(
        RQMoEConfig.qinco, {**SEARCH, "num_expert_layers": 4, "training_loss": "per_step"}, 1024, 1e-3, 0.0
    ),
    # The defaults of the training script of RQ-MoE's authors.
    "official": Recipe(
        RQMoEConfig.official, {**SEARCH, "num_experts": 4, "num_expert_layers": 2, "dropout": 0.1}, 4096, 1e-3, 1e-6
    ),
}
# rqmoe train --conditioning reconstruction --num-experts 1 --num-expert-layers 2 --loss per_step --num-candidates 4
# --beam-size 1 --final-beam-size 16 --epochs 12 --batch-size 512 --learning-rate 0.004 --weight-decay 0.1 --bf16
EXPERTS = Recipe(
    RQMoEConfig,
    SEARCH
    | {"num_candidates": 4, "num_experts": 1, "gate": "none", "num_expert_layers": 2}
    | {"conditioning": "reconstruction", "training_loss": "per_step"},
    batch_size=512,
    learning_rate=4e-3,
    weight_decay=0.1,
    epochs=12,
    init_beam_size=5,
    final_beam_size=16,
    bf16=True,
)


class FamilyMember:
    """A member of the family with experts and 8-bit codes.

    Args:
        recipe: How it is trained.
        dimension: Of the vectors.
        size: Bytes per vector, hence codebooks.
        seconds: Training time that the number of epochs is derived from, where the recipe leaves it open.
        overrides: Fields of the config other than the recipe's.
    """

    def __init__(self, recipe: Recipe, dimension: int, size: int, seconds: float = 3600, **overrides):
        self.recipe = recipe
        self.config = recipe.build(**{**recipe.config, **overrides}, hidden_size=dimension, num_codebooks=size)
        self.seconds = seconds
        self.epochs = 0.0
        self.model = RQMoEModel(self.config)

    @property
    def code_bits(self) -> int:
        """See [`Quantizer`]."""
        return self.config.num_codebooks * self.config.bits_per_code

    @property
    def codebook_bytes(self) -> int:
        """All weights, in float32."""
        return 4 * sum(weight.numel() for weight in self.model.parameters())

    def train(self, vectors: np.ndarray) -> None:
        """Trains for the recipe's epochs, or as many as fit into the time; the best one on held-out vectors counts."""
        held_out = min(VALIDATION, len(vectors) // 10)
        kept, validation = vectors[:-held_out], vectors[-held_out:]
        batch_size = min(self.recipe.batch_size, len(kept))
        self.epochs = self.recipe.epochs or 0.0
        if self.recipe.epochs is None:
            per_batch = seconds_per_batch(self.config, kept, batch_size)
            self.epochs = max(self.seconds / per_batch * batch_size / len(kept), batch_size / len(kept))
        with tempfile.TemporaryDirectory() as folder:
            args = RQMoETrainingArguments(
                output_dir=folder,
                num_train_epochs=self.epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=self.recipe.learning_rate,
                weight_decay=self.recipe.weight_decay,
                bf16=self.recipe.bf16,
                report_to=[],
                disable_tqdm=True,
                logging_strategy="epoch",
            )
            data = dataset_from_array(contiguous(kept)), dataset_from_array(contiguous(validation))
            beams = {"init_beam_size": self.recipe.init_beam_size, "final_beam_size": self.recipe.final_beam_size}
            self.model = train_quantizer(self.config, *data, args, **beams).eval()

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8."""
        return self.model.compress(vectors, show_progress_bar=False)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return self.model.decompress(codes, show_progress_bar=False)


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_per_batch(config: RQMoEConfig, vectors: np.ndarray, batch_size: int) -> float:
    """Time of one training step, the second of two, without the optimizer's few operations per weight."""
    # Any codebooks will do for the time, so few vectors and a beam of one.
    model = initialize(RQMoEModel(config), vectors[: 8 * config.codebook_size], beam_size=1)
    device = best_device()
    model = model.to(device).train()
    batch = torch.from_numpy(np.array(vectors[:batch_size], np.float32)).to(device)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        loss = model(batch).loss
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds


class OursAdditive:
    """The additive member of our family, trained as `rqmoe train --additive --bytes` does.

    Args:
        dimension: Of the vectors.
        size: Bytes per vector.
        bits: Per code.
    """

    def __init__(self, dimension: int, size: int, bits: int = 10):
        blocks = [sizes_for_bytes(share, bits) for share in block_bytes(size)]
        sizes = [codewords for block in blocks for codewords in block]
        self.rounds = ROUNDS if len(blocks) <= 2 else ROUNDS_OF_MANY_BLOCKS
        self.code_bits, self.codebook_bytes = 8 * size, 4 * dimension * sum(sizes)
        settings = {"num_codebooks": len(sizes), "codebook_size": max(sizes)}
        settings |= {"beam_size": LOCAL_SEARCH_BEAM, "local_search": LOCAL_SEARCH}
        settings |= {"search_blocks": [len(block) for block in blocks]} if len(blocks) > 1 else {}
        config = RQMoEConfig.additive(hidden_size=dimension, codebook_sizes=sizes, **settings)
        self.model = RQMoEModel(config).to(best_device())

    def train(self, vectors: np.ndarray) -> None:
        """See [`Quantizer.train`]."""
        initialize(self.model, vectors, "lsq", rounds=self.rounds).eval()
        self.model.config.local_search = suitable_rounds(self.model, vectors)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8."""
        return self.model.compress(vectors, show_progress_bar=False)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return self.model.decompress(codes, show_progress_bar=False)


class Ours:
    """A finished quantizer with the search settings of its config.

    Args:
        given: `name` or `name:codes`: a bundled name or a folder, and how many of its codes to use.
    """

    def __init__(self, given: str):
        name, separator, codes = given.rpartition(":")
        if not separator or not codes.isdigit():
            name, codes = given, ""
        self.model = load_quantizer(name).to(best_device())
        self.source = Path(quantizer_source(name))
        self.codes = int(codes or self.model.config.num_codebooks)
        if not 1 <= self.codes <= self.model.config.num_codebooks:
            raise ValueError(f"{name} has {self.model.config.num_codebooks} codes, got {self.codes}.")
        self.name = f"ours:{Path(name).name}:{self.codes}"

    @property
    def code_bits(self) -> int:
        """See [`Quantizer`]."""
        return sum(bits_per_code(size) for size in sizes_of(self.codes, self.model.config.code_sizes))

    @property
    def codebook_bytes(self) -> int:
        """The weight files, or the weights in float32 if they are not in a local folder."""
        stored = sum(file.stat().st_size for file in self.source.glob("*.safetensors"))
        return stored or 4 * sum(weight.numel() for weight in self.model.parameters())

    @property
    def fingerprint(self) -> str:
        """Twelve digits that change with the weights, so that a quantizer trained anew is measured anew."""
        digest = hashlib.sha256()
        for _, weight in sorted(self.model.state_dict().items()):
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def training_vectors(self) -> int | None:
        """How many vectors it was trained on, as far as its notes say."""
        notes = self.source / TRAINING_FILE
        return json.loads(notes.read_text("utf-8")).get("vectors") if notes.is_file() else None

    def train(self, vectors: np.ndarray) -> None:
        """Nothing: it is trained."""

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Packed codes, uint8."""
        return self.model.compress(vectors, self.codes, show_progress_bar=False)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        return self.model.decompress(codes, self.codes, show_progress_bar=False)

    def experts_share(self, vectors: np.ndarray, database: np.ndarray, codes: np.ndarray) -> dict[str, float] | None:
        """What the experts earn over the best additive tables for the same codes.

        Args:
            vectors: Training vectors `(n, d)`; the tables are fitted to the codes of up to 200,000.
            database: `(m, d)`.
            codes: Packed codes of the database.

        Returns:
            The share 1 - error of the model / error of the tables, and the error of the tables; None for an additive
            quantizer and where the system of equations is too large.
        """
        config = self.model.config
        if not config.has_experts or self.codes * config.codebook_size > MAX_COLUMNS:
            return None
        vectors = vectors[:TABLE_VECTORS]
        known = unpack_codes(self.encode(vectors), self.codes, config.code_sizes)
        tables = best_tables(known, vectors, config.codebook_size)
        restored = decode_tables(tables, unpack_codes(codes, self.codes, config.code_sizes))
        additive = squared_error(database, restored)
        return {
            "experts_share": 1 - squared_error(database, self.decode(codes)) / additive,
            "additive_tables_mse": additive,
        }
