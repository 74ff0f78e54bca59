"""Contrastive fine-tuning: the training loop of pretraining with pairs, another module and another evaluation.

The user's config says little about the model. `bind_checkpoint` gives the config of the run: `model` and
`tokenizer` are the checkpoint's, and `model.init_from` is the folder its weights are read from, so that the saved
config describes the run without looking anywhere else.
"""

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.config.rules import validate, warnings
from neobert.config.schema import Config, ModelSection
from neobert.config.schema_data import TokenizerSection
from neobert.contrastive.evaluate import evaluate_sets
from neobert.contrastive.pair_data import build_contrastive_data
from neobert.contrastive.set_folder import sets_folder
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import StartupError
from neobert.model.config import Architecture, ModelConfig
from neobert.objectives.late_interaction import TOKENS
from neobert.objectives.table import check_task
from neobert.train.loop import RunResult, train
from neobert.train.machine import choose_compile, describe_precision
from neobert.train.run import Job, Run, build_run
from neobert.train.start import choose_start, read_checkpoint_config, write_config
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import find_weights, load_encoder_weights
from neobert.weights.folder import checkpoint_steps

_OF_TRAINING = ("dropout_prob", "embedding_init_range", "decoder_init_range")
"""Fields of the architecture that a fine-tuning run sets for itself."""


def bind_checkpoint(config: Config) -> Config:
    """The config with the architecture and tokenizer of its checkpoint: the run's own one when it is resumed, else
    `contrastive.pretrained_checkpoint_dir`. Without either, the config as it is.

    Raises:
        StartupError: the checkpoint cannot be read, or the config says something else than it, or the run would write
            among the prepared sets.
    """
    _check_output_dir(config)
    own = choose_start(config).path
    if own is not None:
        saved = read_checkpoint_config(own)
        theirs = ModelConfig.from_dict(parse_json((own / "model_config.json").read_text()))
        bound = _bind(config, theirs, str(own), init_from=saved.model.init_from, tokenizer=saved.tokenizer)
    elif config.contrastive.pretrained_checkpoint_dir is None:
        return config
    else:
        bound = _bind_pretrained(config)
    errors = validate(bound)
    if errors:
        raise StartupError("\n".join(["the config does not fit the checkpoint:", *errors]))
    return bound


def _check_output_dir(config: Config) -> None:
    """Raises when the run would write among the prepared sets, which `preprocess.py` removes to make them again."""
    sets, output_dir = sets_folder(str(config.dataset.path)), Path(config.trainer.output_dir)
    if output_dir.resolve().is_relative_to(sets.resolve()):
        raise StartupError(
            f"trainer.output_dir: {output_dir} is in {sets}, where the prepared sets of dataset.path are; choose a "
            "folder outside of it"
        )


def _bind_pretrained(config: Config) -> Config:
    key = "contrastive.pretrained_checkpoint_dir"
    source = _choose_source(config)
    try:
        folder = find_weights(source)
        weights = load_encoder_weights(folder)
    except WeightsError as error:
        raise StartupError(f"{key}: {error}") from error
    if weights.tokenizer is None:
        raise StartupError(f"{key}: {folder} has no tokenizer.json; put the tokenizer it was trained with there")
    initial = config.model.init_from
    if initial is not None and Path(initial).resolve() != folder.resolve():
        raise StartupError(
            f"model.init_from: {initial} is set beside {key} = {source}, which means {folder}; remove one of the two"
        )
    tokenizer = TokenizerSection(path=str(weights.tokenizer))
    _check_tokenizer(config, tokenizer)
    return _bind(config, weights.config, str(folder), init_from=str(folder), tokenizer=tokenizer)


def _choose_source(config: Config) -> str:
    """What `contrastive.pretrained_checkpoint_dir` and `pretrained_checkpoint` mean together."""
    section = config.contrastive
    source = str(section.pretrained_checkpoint_dir)
    if section.pretrained_checkpoint == "latest":
        return source
    folder, step = Path(source), section.pretrained_checkpoint
    for candidate in (folder / "checkpoints" / step, folder / step):
        if candidate.is_dir():
            return str(candidate)
    run = folder.parent if folder.name == "checkpoints" else folder
    there = ", ".join(map(str, checkpoint_steps(run))) or "none"
    raise StartupError(f"contrastive.pretrained_checkpoint: {step} is no checkpoint of {source}; steps there: {there}")


def _bind(
    config: Config, theirs: ModelConfig, source: str, *, init_from: str | None, tokenizer: TokenizerSection
) -> Config:
    """The config with the architecture `theirs`.

    Raises:
        StartupError: a key of `model` is neither at its default nor what the checkpoint has; every one is named.
    """
    shared = {f.name for f in fields(Architecture)} - set(_OF_TRAINING)
    defaults = ModelSection()
    differing, bound = [], dict[str, Any]()
    for name in sorted(shared):
        ours, value = getattr(config.model, name), getattr(theirs, name)
        bound[name] = value
        same_width = name == "intermediate_size" and replace(theirs, intermediate_size=ours).ffn_size == theirs.ffn_size
        if ours not in (value, getattr(defaults, name)) and not same_width:
            differing.append(f"model.{name}: the config has {ours!r}, {source} has {value!r}")
    if differing:
        raise StartupError(
            "\n  ".join([f"contrastive.pretrained_checkpoint_dir: {source} holds another architecture:", *differing])
            + "\nremove these keys: the checkpoint decides"
        )
    return replace(config, model=replace(config.model, **bound, init_from=init_from), tokenizer=tokenizer)


def _check_tokenizer(config: Config, theirs: TokenizerSection) -> None:
    """Raises when the config names another tokenizer than the checkpoint has.

    Raises:
        StartupError: with both.
    """
    section = config.tokenizer
    if section.name is None and section.path is None:
        return
    if not load_tokenizer(section).is_source_of(load_tokenizer(theirs).digest):
        key, value = ("name", section.name) if section.path is None else ("path", section.path)
        raise StartupError(
            f"tokenizer.{key}: {value} is not the tokenizer of the checkpoint ({theirs.path}); remove the key"
        )


def finetune(config: Config) -> RunResult:
    """Trains an encoder on pairs until the budget is spent.

    Raises:
        StartupError: the run cannot start as configured; the message names the key and the remedy.
        DataError: its sets cannot be used.
    """
    check_task(config, "contrastive")
    return train(build_run(config))


def announce(run: Run) -> None:
    """Prints the model, the batch, the budget and the sets; saves the bound config."""
    config, model = run.config, run.model_config
    rows, chunk = run.rows_per_step // run.runtime.world, config.trainer.micro_batch_rows
    cached = f", {chunk} at a time through the encoder" if chunk < rows else ""
    pairs = run.data.num_rows or 0
    lines = [
        f"model     {config.model.name or 'NeoBERT'}: {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"{sum(p.numel() for p in run.module.parameters()):,} parameters, {config.contrastive.pooling} pooling",
        f"compute   {run.runtime.describe_device()}, {describe_precision(config)}, "
        f"attention {run.attention.name} ({run.attention.kernel}), "
        f"{'compiled' if choose_compile(config) else 'not compiled'}, {run.runtime.world} process(es)",
        f"batch     {run.rows_per_step} rows a step, each other's negatives: {rows} a process{cached}",
        f"budget    {run.num_steps:,} steps, {run.num_steps * run.rows_per_step / max(pairs, 1):.2f} times the "
        f"{pairs:,} rows of all sets",
        *(f"data      {note}" for note in run.data.notes),
    ]
    run.reporter.say("\n".join(lines))
    for text in warnings(config, total_steps=run.num_steps):
        run.reporter.warn(text)
    write_config(config, run.runtime, run.output_dir, run.reporter)


def next_commands(run: Run) -> list[str]:
    """What to type after fine-tuning."""
    chosen, folder = run.config.contrastive.pooling, shlex.quote(str(run.output_dir))
    pooling = "" if chosen == "mean" else f" --pooling {chosen}"
    embed = f"neobert embed {folder} texts.jsonl --output vectors.npy --normalize{pooling}"
    return [
        f"neobert evaluate-pairs {folder} pairs.jsonl" if chosen == TOKENS else embed,
        f"neobert export {folder} --output {shlex.quote(f'{run.output_dir}_hf')}",
    ]


FINETUNING = Job(
    bind=bind_checkpoint,
    build_data=build_contrastive_data,
    announce=announce,
    evaluate=evaluate_sets,
    next_commands=next_commands,
)
