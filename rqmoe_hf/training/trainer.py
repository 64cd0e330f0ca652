"""Training on transformers' Trainer: what differs for a quantizer is its evaluation and its defaults."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..data.sampling import MANY_ROWS, PooledSampler
from ..data.sources import EmbeddingRows, as_array, collate_rows
from ..evaluation import evaluate
from ..saving import write_text

logger = logging.getLogger(__name__)

MAX_EVALUATION_VECTORS = 20_000


@dataclass
class RQMoETrainingArguments(TrainingArguments):
    """TrainingArguments with defaults that suit quantizers.

    Args:
        max_grad_value: Clip every gradient entry to this absolute value. Beside it, `max_grad_norm` (0 turns it off)
            clips the norm.
        early_stopping_patience: Stop after this many evaluations without a lower validation error.
    """

    per_device_train_batch_size: int = 1024
    num_train_epochs: float = 5.0
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_grad_norm: float = 1.0
    max_grad_value: float | None = field(default=None, metadata={"help": "Clip gradients to this absolute value."})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "Evaluations without improvement."})
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "eval_mse"
    greater_is_better: bool = False
    logging_steps: float = 20
    ddp_find_unused_parameters: bool = False

    def __post_init__(self):
        # One reader per rank: accelerate would otherwise let rank 0 read a stream for all.
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else bf16 on a CPU is refused
        super().__post_init__()


class ClipGradientValues(TrainerCallback):
    """Clips gradient entries, which the Trainer itself does not offer."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Runs after the backward pass and the clipping of the norm."""
        torch.nn.utils.clip_grad_value_(kwargs["model"].parameters(), self.limit)


class RQMoETrainer(Trainer):
    """Trains an initialised [`RQMoEModel`] on a data set with an `embeddings` column.

    `evaluate` reports validation MSE, R@1, R@10, recall@10, entropy and use of the codes. Every rank evaluates the
    same vectors and takes rank 0's numbers, so that all ranks keep one schedule and stop together.
    """

    def __init__(
        self, model=None, args: RQMoETrainingArguments | None = None, train_dataset: Any = None, **kwargs
    ):
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collate_rows
            train_dataset = EmbeddingRows(train_dataset) if isinstance(train_dataset, Dataset) else train_dataset
        if args is not None and args.n_gpu > 1:  # the Trainer would copy the model to all of them: nn.DataParallel
            logger.warning(
                "This process trains on one of %d GPUs. For all of them start one process each: torchrun "
                "--nproc-per-node %d -m rqmoe_hf train ...",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if args is not None and args.max_grad_value is not None:
            self.add_callback(ClipGradientValues(args.max_grad_value))
        if args is not None and args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """The order of the training set; of a large one without the list of all rows that torch would make."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, EmbeddingRows) or len(dataset) <= MANY_ROWS:
            return super()._get_train_sampler(train_dataset)
        return PooledSampler(len(dataset), self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measures the model on held-out embeddings; keys are `{prefix}_mse`, `{prefix}_recall_at_1_1` and so on."""
        start = time.perf_counter()
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        vectors = as_array(dataset, np.arange(min(len(dataset), MAX_EVALUATION_VECTORS)))
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with self.accelerator.autocast():
            report = evaluate(model, vectors)[0].as_dict()
        model.train(training)
        metrics: dict[str, float] = {}
        for name, value in report.items():
            if isinstance(value, list):
                metrics |= {f"{metric_key_prefix}_{name}_{step}": number for step, number in enumerate(value)}
            elif name not in ("num_codebooks", "bytes_per_vector"):
                metrics[f"{metric_key_prefix}_{name}"] = value
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_rng_state(self, output_dir: str) -> None:
        """Waits for the files of all ranks, since the first then writes what says that the checkpoint is complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, model_name: str | None = None, **kwargs) -> None:
        """Writes the quantizer's card to `output_dir`; the Trainer's own describes a fine-tuned language model."""
        from ..hub.cards import render_card

        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            card = render_card(self.accelerator.unwrap_model(self.model), model_name or folder.name)
            write_text(folder / "README.md", str(card))


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; those that were cut off are deleted.

    The Trainer writes `trainer_state.json` last, when all ranks have written their files, so a checkpoint without a
    readable one is incomplete.
    """
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))):
        try:
            json.loads((Path(checkpoint) / "trainer_state.json").read_text("utf-8"))
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None
