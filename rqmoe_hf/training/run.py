"""One training run from configuration to finished checkpoint, resumable; the same for one process and for many."""

import copy
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments, set_seed

from ..configuration_rqmoe import RQMoEConfig
from ..data.jobs import fingerprint
from ..data.sources import as_array, sample_array
from ..evaluation import evaluate
from ..local_search_rqmoe import LOCAL_SEARCH, LOCAL_SEARCH_BEAM
from ..machine import warn_of_slow_bfloat16
from ..modeling_rqmoe import RQMoEModel
from ..record import RECORD_FILE, TRAINING_FILE, measure
from ..saving import differences, round_weights, save_whole, weights_checksum, write_text
from .adaptation import adapt
from .blocks import checkpoints
from .initialization import METHODS, check_method, initialize
from .lsq import TEMPERATURE
from .trainer import MAX_EVALUATION_VECTORS, RQMoETrainer, RQMoETrainingArguments, last_complete_checkpoint

logger = logging.getLogger(__name__)

STATISTICS_ROWS = 200_000  # mean and scale of a larger set are those of a sample
LSQ_ROWS = 1_000_000  # vectors that LSQ is trained on, at most: all are kept in memory
MAX_LOCAL_SEARCH, WORTHWHILE = 256, 0.02  # rounds at most; error that twice the rounds must take off to be worth it
TRIED_VECTORS = 1_000  # that rounds are tried on
LSQ_FILE = "lsq.npz"  # beside the checkpoints, with a number: LSQ half done
# Entries of a config that are no settings of a run.
FOUND = ("_name_or_path", "architectures", "dtype", "transformers_version", "unit_norm")
ADDITIVE_FOLDER = "additive"  # beside the checkpoints: what training started from
RUN_FILE = "run.json"  # beside the checkpoints: whose they are


def train_quantizer(
    model: RQMoEConfig | RQMoEModel,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset,
    args: RQMoETrainingArguments,
    init_method: Literal["rq", "lsq"] = "rq",
    init_sample_size: int = 65_536,
    init_beam_size: int = 5,
    init_rounds: int = 50,
    half_size: bool = False,
    description: str | None = None,
    init_temperature: float = TEMPERATURE,
    choose_local_search: bool = False,
    final_beam_size: int | None = None,
) -> RQMoEModel:
    """Initialises and trains a quantizer, and saves it to `args.output_dir`.

    A run that was interrupted continues from its last checkpoint in `output_dir/checkpoints` when it is started
    again with the same arguments. Those of the Trainer may be others, such as more epochs.

    Args:
        model: Configuration of a new quantizer, or an initialised one to fine-tune, which is trained in place.
        train_dataset: Data set with an `embeddings` column; see [`load_embeddings`].
        eval_dataset: Held-out embeddings, never trained on.
        args: Training arguments; they are left as they are.
        init_method: See [`initialize`].
        init_sample_size: See [`initialize`].
        init_beam_size: See [`initialize`].
        init_rounds: See [`initialize`], `rounds`.
        half_size: Round the final weights to bfloat16 values and store them in half the bytes.
        description: What the texts are, in words, for the card.
        init_temperature: See [`initialize`], `temperature`.
        choose_local_search: Give an additive quantizer started by LSQ the [`suitable_rounds`] of local search instead
            of those of `model`.
        final_beam_size: Beam of the finished quantizer, default that of `model`, with which every batch is encoded in
            training: a narrow one trains quickly, and the codes of a wide one are better all the same.

    If the additive quantizer that a new model starts from has a lower error on `eval_dataset` in the end (few vectors,
    few epochs), it is saved instead, and a warning says so. Additive quantizers started by LSQ are complete as they
    are, and those that are fine-tuned are so by least squares ([`adapt`]): `num_train_epochs` means nothing to them.

    Beside the weights stand the training log, what the training was (`training.json`) and its evaluation on
    `eval_dataset` (`evaluation.json`): `push_to_hub` makes the card from them.

    Returns:
        The model with the lowest validation error (if `args.load_best_model_at_end`), on the training device.

    Raises:
        ValueError: If the final beam is none, `init_method` is none of the two, there are too few vectors
            ([`initialize`]), or the checkpoints are of a run with another quantizer or other vectors.
    """
    _check_settings(init_method, final_beam_size)
    started = time.perf_counter()
    output, args = Path(str(args.output_dir)), copy.copy(args)
    args.output_dir = str(output / "checkpoints")
    checkpoint = last_complete_checkpoint(Path(args.output_dir))
    set_seed(args.seed)  # the Trainer seeds too, but the experts' random weights come before it
    start = _Start(init_method, init_sample_size, init_beam_size, init_rounds, init_temperature)
    run = _identify(model, train_dataset, args.seed, start)
    _check_run(checkpoint, run)
    quantizer = RQMoEModel(copy.deepcopy(model)) if isinstance(model, RQMoEConfig) else model
    without_gradients = not quantizer.config.has_experts and (
        init_method == "lsq" if isinstance(model, RQMoEConfig) else quantizer.config.local_search > 0
    )
    if args.bf16 and not without_gradients:
        warn_of_slow_bfloat16(torch.bfloat16, args.device)
    if checkpoint is not None:
        quantizer = RQMoEModel.from_pretrained(checkpoint, dtype=torch.float32)
    elif args.process_index == 0:
        shutil.rmtree(Path(args.output_dir) / ADDITIVE_FOLDER, ignore_errors=True)  # of a run that got no further
        if not quantizer.is_initialized:
            _initialize(quantizer, train_dataset, args, start)
        elif without_gradients:
            _adapt(quantizer, train_dataset, eval_dataset, args, init_sample_size)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(args.output_dir) / RUN_FILE, json.dumps(run, indent=1) + "\n")
    share_weights(quantizer, args)
    trainer = RQMoETrainer(model=quantizer, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    if without_gradients:  # least squares have found what gradients would look for
        if choose_local_search:  # every process by itself: all have the same weights and the same vectors
            some = as_array(eval_dataset, np.arange(min(len(eval_dataset), TRIED_VECTORS)))
            quantizer.config.local_search = suitable_rounds(quantizer.eval(), some)
        trainer.evaluate()
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    quantizer = trainer.accelerator.unwrap_model(trainer.model)
    if final_beam_size is not None:
        quantizer.config.beam_size = final_beam_size
    if trainer.is_world_process_zero():
        notes = _training_notes(trainer, train_dataset, model, init_method, description)
        quantizer = _finish(trainer, quantizer.eval(), eval_dataset, notes, started, half_size)
    trainer.accelerator.wait_for_everyone()
    quantizer.name_or_path, quantizer.commit_hash = str(output), None  # where push_to_hub finds evaluation and notes
    return quantizer


@dataclass(frozen=True)
class _Start:
    """How a new quantizer is initialised: arguments of [`initialize`]."""

    method: Literal["rq", "lsq"]
    sample_size: int
    beam_size: int
    rounds: int
    temperature: float


def _check_settings(init_method: str, final_beam_size: int | None) -> None:
    """Refuses what would come to light after hours of training only."""
    check_method(init_method)
    if final_beam_size is not None and final_beam_size < 1:
        raise ValueError(f"final_beam_size must be at least 1, got {final_beam_size}.")


def _identify(
    model: RQMoEConfig | RQMoEModel, dataset: Dataset | IterableDataset, seed: int, start: _Start
) -> dict[str, Any]:
    """What a run must have in common with the one whose checkpoints it continues."""
    config = model if isinstance(model, RQMoEConfig) else model.config
    fields = json.loads(config.to_json_string(use_diff=False))  # as it will be read again
    fields = {name: value for name, value in fields.items() if name not in FOUND}
    return {
        **fields,
        **{f"init_{name}": value for name, value in asdict(start).items()},
        "started_from": weights_checksum(model) if isinstance(model, RQMoEModel) else None,
        "seed": seed,
        "data": fingerprint(dataset) if isinstance(dataset, Dataset) else None,
    }


def _check_run(checkpoint: str | None, run: dict[str, Any]) -> None:
    """Refuses to continue the checkpoints of another run, which would be saved as what this one was to be."""
    file = Path(checkpoint or "").parent / RUN_FILE
    if checkpoint is None or not file.is_file():
        return
    if changes := differences(json.loads(file.read_text("utf-8")), run):
        raise ValueError(
            f"{file.parent} has the checkpoints of another training ({changes}): choose a new output folder or delete "
            "this one."
        )


def _initialize(
    quantizer: RQMoEModel, dataset: Dataset | IterableDataset, args: RQMoETrainingArguments, start: _Start
) -> None:
    """Initialises a new quantizer, and keeps what it starts from beside the checkpoints if training goes on."""
    folder = Path(str(args.output_dir))
    if args.device.type == "cuda":
        torch.nn.Module.to(quantizer, args.device)
    least = LSQ_ROWS if start.method == "lsq" else STATISTICS_ROWS
    sample = sample_array(dataset, max(least, start.sample_size), args.seed)
    beside: dict[str, Any] = {"seed": args.seed, "checkpoint": folder / LSQ_FILE}
    initialize(quantizer, sample, **asdict(start), **beside, show_progress_bar=not args.disable_tqdm)
    if quantizer.config.has_experts:
        save_whole(additive_member(quantizer, start.method), folder / ADDITIVE_FOLDER, {}, False)


def _adapt(
    quantizer: RQMoEModel,
    dataset: Dataset | IterableDataset,
    held_out: Dataset,
    args: RQMoETrainingArguments,
    sample_size: int,
) -> None:
    """Fine-tunes an additive quantizer, and takes that back if it is no better for it."""
    if args.device.type == "cuda":
        torch.nn.Module.to(quantizer.eval(), args.device)
    vectors = as_array(held_out, np.arange(min(len(held_out), MAX_EVALUATION_VECTORS)))
    weights = {name: weight.clone() for name, weight in quantizer.state_dict().items()}
    before = evaluate(quantizer.eval(), vectors)[0].mse
    sample = sample_array(dataset, max(LSQ_ROWS, sample_size), args.seed)
    file = Path(str(args.output_dir)) / LSQ_FILE
    adapt(quantizer, sample, sample_size, args.seed, file, show_progress_bar=not args.disable_tqdm)
    after = evaluate(quantizer, vectors)[0].mse
    if after >= before:
        logger.warning(
            "Fine-tuning would raise the validation error from %.4g to %.4g: the quantizer stays as it was. The "
            "embeddings are too few for it, or like those that it was trained on.",
            before,
            after,
        )
        quantizer.load_state_dict(weights)


def _finish(
    trainer: RQMoETrainer,
    trained: RQMoEModel,
    held_out: Dataset,
    notes: dict[str, Any],
    started: float,
    half_size: bool,
) -> RQMoEModel:
    """Saves the best member with its notes and its evaluation, and gives it back."""
    checkpoint_folder = Path(str(trainer.args.output_dir))
    output = checkpoint_folder.parent
    vectors = as_array(held_out, np.arange(min(len(held_out), MAX_EVALUATION_VECTORS)))
    quantizer = _best_member(trained, checkpoint_folder / ADDITIVE_FOLDER, vectors)
    if half_size:
        round_weights(quantizer)
    if quantizer is not trained or not trainer.state.global_step:  # the Trainer had no part in what is saved
        notes |= dict.fromkeys(("epochs", "steps", "batch_size", "learning_rate", "loss", "precision"))
        notes["seconds"] = round(time.perf_counter() - started)
    files = {
        "training_log.json": json.dumps(trainer.state.log_history, indent=1) + "\n",
        TRAINING_FILE: json.dumps(notes | {"member": _member(quantizer.config)}, indent=1) + "\n",
    }
    save_whole(quantizer, output, files, half_size)  # first: nothing that is measured may cost the weights
    write_text(output / RECORD_FILE, measure(quantizer, vectors).to_json())
    for file in checkpoints(checkpoint_folder / LSQ_FILE):
        file.unlink()
    return quantizer


def suitable_rounds(model: RQMoEModel, vectors: np.ndarray) -> int:
    """Rounds of local search that suit a quantizer.

    How many it takes depends on the vectors: codes of text embeddings in 8 bytes hardly get better after 32 rounds,
    those of image descriptors still do after 128 (benchmarks/LEVERS.md).

    Args:
        model: An additive quantizer.
        vectors: float32 `(n, hidden_size)`, the first 1,000 of which are encoded.

    Returns:
        32, or twice, four or eight times as many: doubled while that lowers the error by 2 % or more.
    """

    def error(rounds: int) -> float:
        codes = model.compress(some, local_search=rounds, show_progress_bar=False)
        restored = model.decompress(codes, show_progress_bar=False)
        return float(np.square(some - restored).sum(axis=1, dtype=np.float64).mean())

    some, rounds = np.ascontiguousarray(vectors[:TRIED_VECTORS], np.float32), LOCAL_SEARCH
    known = error(rounds)
    while rounds < MAX_LOCAL_SEARCH:
        better = error(2 * rounds)
        if better >= (1 - WORTHWHILE) * known:
            break
        rounds, known = 2 * rounds, better
    return rounds


def additive_member(model: RQMoEModel, init_method: str) -> RQMoEModel:
    """The additive quantizer that a new model starts from: its codebooks, without experts."""
    config = model.config
    names = ("hidden_size", "num_codebooks", "codebook_size", "codebook_sizes", "base_model", "unit_norm")
    search = {"beam_size": config.beam_size, "local_search": config.local_search}
    if init_method == "lsq":
        search = {"beam_size": LOCAL_SEARCH_BEAM, "local_search": max(config.local_search, LOCAL_SEARCH)}
    member = RQMoEModel(RQMoEConfig.additive(**{name: getattr(config, name) for name in names}, **search))
    member.load_state_dict({name: model.state_dict()[name] for name in member.state_dict()})
    return member.eval()


def _best_member(model: RQMoEModel, additive: Path, vectors: np.ndarray) -> RQMoEModel:
    """The trained model, or the additive quantizer that it started from if that is still the better one."""
    if not additive.is_dir():
        return model
    start = RQMoEModel.from_pretrained(additive).eval().to(model.device)
    rounds = start.config.local_search  # both with the same search: experts should lose to codebooks only
    if not rounds:
        start.config.beam_size = model.config.beam_size  # which may be wider than in training
    trained, before = (evaluate(member, vectors, local_search=rounds)[0].mse for member in (model, start))
    if trained <= before:
        model.config.local_search = rounds
        return model
    logger.warning(
        "The additive quantizer that training started from has the lower validation error (%.4g; with experts %.4g), "
        "so it is what is saved. Experts need more vectors or more epochs: give them, fine-tune a quantizer that was "
        "trained on many vectors (--from), or train with --additive from the start.",
        before,
        trained,
    )
    return start


def _member(config: RQMoEConfig) -> str:
    """What kind of quantizer a configuration describes, in a word."""
    if not config.has_experts:
        return "additive"
    return "qinco" if config.conditioning == "reconstruction" else "rqmoe" if config.residual else "official"


def _training_notes(
    trainer: RQMoETrainer,
    dataset: Dataset | IterableDataset,
    start: RQMoEConfig | RQMoEModel,
    init: str,
    description: str | None,
) -> dict[str, Any]:
    """What the card tells of a training. No paths: these files are made to be shared."""
    args, log = trainer.args, trainer.state.log_history
    source = start.name_or_path if isinstance(start, RQMoEModel) else None
    return {
        "description": description,
        "vectors": len(dataset) if isinstance(dataset, Dataset) else None,
        "epochs": round(trainer.state.epoch or 0, 2),
        "steps": trainer.state.global_step,
        "batch_size": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "loss": trainer.accelerator.unwrap_model(trainer.model).config.training_loss,
        "start": METHODS[init] if isinstance(start, RQMoEConfig) else None,
        "started_from": source and (Path(source).name if Path(source).is_dir() else source),
        "precision": "bfloat16" if args.bf16 else "float32",
        "seconds": next((round(entry["train_runtime"]) for entry in log if "train_runtime" in entry), None),
        "seed": args.seed,
    }  # fmt: skip


def share_weights(model: RQMoEModel, args: TrainingArguments) -> None:
    """Gives all ranks the weights of rank 0, which alone has initialised them."""
    if args.world_size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        shared = tensor.data.to(args.device)
        dist.broadcast(shared, 0)
        tensor.data.copy_(shared)
