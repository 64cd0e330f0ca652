"""The command: rqmoe train."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import EMBEDDINGS_HELP, TEXTS_HELP, Column, Output, Split, TextColumn


class Member(StrEnum):
    """Members of the family."""

    rqmoe = "rqmoe"
    additive = "additive"
    official = "official"
    qinco = "qinco"


class Conditioning(StrEnum):
    """What deforms the codebooks of RQ-MoE."""

    instruction = "instruction"
    reconstruction = "reconstruction"


class Start(StrEnum):
    """Where codebooks start from."""

    rq = "rq"
    lsq = "lsq"


# Options that describe a new quantizer, and those of a finished one that fine-tuning may change.
NEW = ("member", "additive", "num_codebooks", "codebook_size", "codebook_sizes", "bytes_per_vector", "num_experts",
       "num_expert_layers", "intermediate_size", "instruction_size", "conditioning", "init", "init_beam_size",
       "init_rounds", "init_temperature")  # fmt: skip
TUNED = {"loss": "training_loss"} | {name: name for name in ("dropout", "num_candidates", "beam_size", "local_search")}


def _apply_recipe(context: typer.Context, file: Path | None) -> Path | None:
    """Takes the options that the command line leaves open from a YAML file of option names and values."""
    if file is None:
        return None
    import yaml

    try:
        options = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # characters that YAML excludes have a position, but no line
        place = "" if mark is None else f" in line {mark.line + 1}"
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise ValueError(f"{file} is no YAML{place}: {reason}. Write each option as `name: value`.") from error
    known = {parameter.name for parameter in context.command.params}
    if not isinstance(options, dict) or not set(options) <= known:
        unknown = sorted(set(options) - known) if isinstance(options, dict) else options
        raise ValueError(f"{file} must hold options of `rqmoe train` and their values; it has {unknown}.")
    context.default_map = options
    return file


def train(
    context: typer.Context,
    output: Output,
    recipe: Annotated[
        Path | None,
        typer.Option(callback=_apply_recipe, is_eager=True, help="YAML file with values for these options."),
    ] = None,
    embeddings: Annotated[str | None, typer.Option(help=EMBEDDINGS_HELP)] = None,
    texts: Annotated[str | None, typer.Option(help=TEXTS_HELP + " Needs --encoder.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of the texts; recorded in the config.")] = None,
    column: Column = "embeddings",
    text_column: TextColumn = "text",
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(help="Train on the first so many embeddings only.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read embeddings as they come. Needs --max-steps and --evaluation.")
    ] = False,
    evaluation: Annotated[str | None, typer.Option(help="Held-out embeddings. Default: taken from the rest.")] = None,
    evaluation_size: Annotated[int, typer.Option(help="Held-out embeddings to use.")] = 5_000,
    start_from: Annotated[
        str | None, typer.Option("--from", help="Fine-tune this quantizer; one of LSQ without gradients.")
    ] = None,
    member: Annotated[Member, typer.Option(help="Kind of quantizer.")] = Member.rqmoe,
    additive: Annotated[
        bool, typer.Option("--additive", help="LSQ: codebooks without experts. Quick, and best if vectors are few.")
    ] = False,
    num_codebooks: Annotated[int, typer.Option(help="Codes per vector.")] = 8,
    codebook_size: Annotated[int, typer.Option(help="Codewords per codebook; 256 makes a byte per code.")] = 256,
    codebook_sizes: Annotated[
        str | None,
        typer.Option(
            help="Sizes where they differ, as 1024x6,16 (64 bits), and with + between blocks that are searched one after the other. Replaces the two above."
        ),
    ] = None,
    bytes_per_vector: Annotated[
        int | None,
        typer.Option("--bytes", help="Bytes per vector: chooses codebooks that suit the number of embeddings."),
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Experts per step.")] = 2,
    num_expert_layers: Annotated[int, typer.Option(help="Layers per expert.")] = 1,
    intermediate_size: Annotated[int, typer.Option(help="Width of the experts.")] = 256,
    instruction_size: Annotated[int | None, typer.Option(help="Width of the instructions.")] = None,
    conditioning: Annotated[
        Conditioning,
        typer.Option(help="instruction: all steps decode at once. reconstruction: step after step, with less error."),
    ] = Conditioning.instruction,
    loss: Annotated[str, typer.Option(help="normalized_residual, per_step or last_step.")] = "normalized_residual",
    dropout: Annotated[float, typer.Option(help="Dropout in the experts.")] = 0.0,
    num_candidates: Annotated[int, typer.Option(help="Candidates of the encoder, also in training.")] = 8,
    beam_size: Annotated[
        int | None, typer.Option(help="Beam of the encoder, also in training. Default: 4; additive: 1.")
    ] = None,
    final_beam_size: Annotated[
        int | None, typer.Option(help="Beam of the finished quantizer, which may be wider. Default: as in training.")
    ] = None,
    local_search: Annotated[
        int | None, typer.Option(help="Rounds of local search of the encoder. Default: 0; additive: 32 to 256, as many as lower the error.")
    ] = None,
    init: Annotated[Start, typer.Option(help="rq, or lsq (better and slower; not for huge codebooks).")] = Start.rq,
    init_sample_size: Annotated[
        int, typer.Option(help="Vectors that the rq start is computed from, or that a round of the lsq start sees.")
    ] = 65_536,
    init_beam_size: Annotated[int, typer.Option(help="Beam of the rq start.")] = 5,
    init_rounds: Annotated[int, typer.Option(help="Rounds of the lsq start. More are slower and better.")] = 50,
    init_temperature: Annotated[float, typer.Option(help="Of the lsq start.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the embeddings.")] = 5.0,
    max_steps: Annotated[int, typer.Option(help="Steps, instead of passes.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Vectors per step and process.")] = 1024,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches that make one step of the optimizer.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer (AdamW).")] = 0.0,
    max_grad_value: Annotated[float | None, typer.Option(help="Clip gradient entries to this.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without gain.")] = None,
    evaluations_per_epoch: Annotated[
        int, typer.Option(min=1, help="Evaluations, with a checkpoint each; in all, with --max-steps.")
    ] = 1,
    bf16: Annotated[bool, typer.Option(help="bfloat16 arithmetic where it is safe.")] = False,
    half_size: Annotated[bool, typer.Option(help="Round the result to bfloat16 values: half the file.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Log to TensorBoard (needs the package tensorboard).")] = False,
    description: Annotated[str | None, typer.Option(help="What the texts are, in words, for the card.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Train a quantizer on embeddings, or on texts and an encoder. A run that was stopped continues.

    On several GPUs: torchrun --nproc-per-node 8 -m rqmoe_hf train ... or accelerate launch -m rqmoe_hf train ...
    Files of a stream are divided among the processes.
    """
    from ..bundled import load_quantizer
    from ..codes import describe_sizes
    from ..data import embed_texts, load_embeddings
    from ..data.sources import split_dataset
    from ..hub import write_card
    from ..local_search_rqmoe import LOCAL_SEARCH, LOCAL_SEARCH_BEAM
    from ..training import RQMoETrainingArguments, train_quantizer
    from ..training.initialization import suitable_blocks, suitable_sizes
    from .advice import advice

    given = [name for name in context.params if was_given(context, name)]
    check_source(embeddings, texts, encoder)
    check_start(context, start_from, given)
    check_sizes(bytes_per_vector, codebook_sizes)
    if streaming:
        check_stream(max_steps, evaluation, bytes_per_vector, limit)
    if texts is not None and encoder is not None:
        embed_texts(texts, output / "embeddings", encoder, text_column, split)
        embeddings, column = str(output / "embeddings"), "embeddings"
    dataset = load_embeddings(embeddings, column, split, streaming)
    if limit is not None:
        dataset = dataset.take(limit) if streaming else dataset.select(range(min(limit, len(dataset))))
    if evaluation is None:
        dataset, held_out = split_dataset(dataset, evaluation_size, seed)
    else:
        held_out = load_embeddings(evaluation, column, split)
        held_out = held_out.select(range(min(evaluation_size, len(held_out))))
    count = limit if streaming else len(dataset)
    check_counts(count, len(held_out))
    parts, sizes, blocks, choose_local_search = parse_sizes(codebook_sizes), None, None, False
    if bytes_per_vector is not None:
        assert count is not None  # checked above
        parts = suitable_blocks(bytes_per_vector, count) if additive else [suitable_sizes(bytes_per_vector, count)]
        described = ", then ".join(describe_sizes(len(part), part) for part in parts)
        print(f"{bytes_per_vector} bytes per vector: {described} (or --codebook-sizes instead)")
    if parts is not None:
        sizes = [size for part in parts for size in part]
        blocks = [len(part) for part in parts] if len(parts) > 1 else None
        num_codebooks, codebook_size = len(sizes), max(sizes)
    if additive:
        member, init = Member.additive, Start.lsq
        choose_local_search = local_search is None
        local_search = LOCAL_SEARCH if local_search is None else local_search
        beam_size = LOCAL_SEARCH_BEAM if beam_size is None else beam_size
    if start_from is not None:
        model = load_quantizer(start_from, **{TUNED[name]: context.params[name] for name in given if name in TUNED})
    else:
        model = build_config(
            member,
            hidden_size=len(held_out[0]["embeddings"]),
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            codebook_sizes=sizes,
            search_blocks=blocks,
            num_experts=num_experts,
            num_expert_layers=num_expert_layers,
            intermediate_size=intermediate_size,
            instruction_size=instruction_size,
            conditioning=conditioning.value,
            training_loss=loss,
            dropout=dropout,
            num_candidates=num_candidates,
            beam_size=4 if beam_size is None else beam_size,
            local_search=local_search or 0,
            base_model=encoder,
        )
        for sentence in advice(count, model):
            print(sentence)
    evaluations = evaluations_per_epoch * (1.0 if max_steps > 0 else max(1.0, epochs))
    interval = min(1 / evaluations, 1 - 1e-6)  # 1 would be a number of steps, not a share of them
    args = RQMoETrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=max_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_grad_value=max_grad_value,
        early_stopping_patience=patience,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=interval,
        save_steps=interval,
        bf16=bf16,
        report_to="tensorboard" if tensorboard else "none",
        seed=seed,
    )
    train_quantizer(
        model,
        dataset,
        held_out,
        args,
        init.value,
        init_sample_size,
        init_beam_size,
        init_rounds,
        half_size,
        description,
        init_temperature,
        choose_local_search,
        final_beam_size,
    )
    if args.process_index == 0:
        write_card(output)
        print(
            f"The quantizer, its evaluation and its card are in {output}; `rqmoe push {output} org/name` shares them."
        )


def check_source(embeddings: str | None, texts: str | None, encoder: str | None) -> None:
    """Raises ValueError unless there is one source of embeddings."""
    if (embeddings is None) == (texts is None) or (texts is not None and encoder is None):
        raise ValueError("Give either --embeddings, or --texts and --encoder.")


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line or in the recipe."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"  # by name: typer has click's enum, or its own copy of it


def check_start(context: typer.Context, start_from: str | None, given: list[str]) -> None:
    """Raises ValueError if a finished quantizer is to start from, and options describe another one."""
    described = [option.opts[0] for option in context.command.params if option.name in given and option.name in NEW]
    if start_from is not None and described:
        raise ValueError(
            f"--from {start_from} trains a finished quantizer further, and {', '.join(described)} would describe a new "
            "one: leave out one or the other."
        )


def check_sizes(bytes_per_vector: int | None, codebook_sizes: str | None) -> None:
    """Raises ValueError if codebooks are both to be chosen and given."""
    if bytes_per_vector is not None and codebook_sizes is not None:
        raise ValueError(
            f"--bytes chooses codebooks and --codebook-sizes names them: give one, not {bytes_per_vector} and "
            f"{codebook_sizes!r}."
        )


def check_stream(max_steps: int, evaluation: str | None, bytes_per_vector: int | None, limit: int | None) -> None:
    """Raises ValueError if something is left open that the length of a stream would have to tell."""
    if max_steps < 1 or evaluation is None:
        raise ValueError("A stream has no length and cannot be split: give --max-steps and --evaluation.")
    if bytes_per_vector is not None and limit is None:
        raise ValueError("--bytes chooses by the number of embeddings, which a stream does not tell: give --limit.")


def check_counts(count: int | None, held_out: int) -> None:
    """Raises ValueError unless there are embeddings to train on, if their number is known, and to measure on."""
    from ..evaluation import MIN_VECTORS

    if count == 0 or held_out < MIN_VECTORS:
        raise ValueError(
            f"Training needs embeddings and at least {MIN_VECTORS} held-out ones, got {count} and {held_out}. At most "
            "a fifth is held out: give more embeddings, others with --evaluation, or a larger --limit or "
            "--evaluation-size."
        )


def parse_sizes(text: str | None) -> list[list[int]] | None:
    """Reads "1024x6,16" as a block of six codebooks of 1,024 codewords and one of 16; "256x8+256x8" as two blocks."""
    if text is None:
        return None
    part = r"\d+(x\d+)?"
    if not re.fullmatch(rf"{part}([,+]{part})*", text):
        raise ValueError(
            "codebook_sizes must be sizes and how often they occur, as in 1024x6,16, with + between blocks; "
            f"got {text!r}."
        )
    blocks = []
    for block in text.split("+"):
        parts = [part.partition("x") for part in block.split(",")]
        blocks.append([int(size) for size, _, count in parts for _ in range(int(count or 1))])
    return blocks


def build_config(member: Member, **settings):
    """The configuration of a member; settings that its definition fixes are dropped."""
    from ..configuration_rqmoe import RQMoEConfig

    if member != Member.rqmoe:
        del settings["conditioning"]
    if member == Member.additive:
        del settings["num_experts"]
        return RQMoEConfig.additive(**settings)
    if member == Member.official:
        return RQMoEConfig.official(**settings)
    if member == Member.qinco:
        for fixed in ("num_experts", "instruction_size"):
            del settings[fixed]
        return RQMoEConfig.qinco(**settings)
    # A gate that has one expert to choose from chooses nothing.
    return RQMoEConfig(**settings, gate="none" if settings["num_experts"] == 1 else "linear")
