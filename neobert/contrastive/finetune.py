"""Contrastive fine-tuning: the training loop of pretraining with pairs, another module and another evaluation.

The user's config says little about the model: `neobert.train.bind` gives the config of the run.
"""

import shlex
from pathlib import Path

from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.contrastive.evaluate import evaluate_sets
from neobert.contrastive.pair_data import build_contrastive_data
from neobert.contrastive.set_folder import sets_folder
from neobert.errors import StartupError
from neobert.objectives.late_interaction import TOKENS
from neobert.objectives.table import check_task
from neobert.train.bind import bind_own, bind_source
from neobert.train.hardware.machine import describe_compute
from neobert.train.loop import RunResult, train
from neobert.train.run import Job, Run, build_run
from neobert.train.start import choose_start, write_config
from neobert.weights.folder import checkpoint_steps


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
        return bind_own(config, own)
    if config.contrastive.pretrained_checkpoint_dir is None:
        return config
    return bind_source(config, _choose_source(config), "contrastive.pretrained_checkpoint_dir")


def _check_output_dir(config: Config) -> None:
    """Raises when the run would write among the prepared sets, which `preprocess.py` removes to make them again."""
    sets, output_dir = sets_folder(str(config.dataset.path)), Path(config.trainer.output_dir)
    if output_dir.resolve().is_relative_to(sets.resolve()):
        raise StartupError(
            f"trainer.output_dir: {output_dir} is in {sets}, where the prepared sets of dataset.path are; choose a "
            "folder outside of it"
        )


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
        describe_compute(config, run.runtime, run.attention.describe()),
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
