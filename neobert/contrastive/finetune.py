"""Contrastive fine-tuning: the training loop of pretraining with pairs, another module and another evaluation."""

import shlex

from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.contrastive.data import build_contrastive_data
from neobert.contrastive.evaluate import evaluate_sets
from neobert.contrastive.module import ContrastiveEncoder, Objective
from neobert.contrastive.start import bind_checkpoint
from neobert.kernels.linear_cross_entropy import KERNELS, choose_kernel
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.train.build import build_encoder, compile_blocks
from neobert.train.loop import Job, RunResult, train
from neobert.train.run import Run, build_run
from neobert.train.runtime import Runtime, StartupError
from neobert.train.start import write_config


def finetune(config: Config) -> RunResult:
    """Trains an encoder on pairs until the budget is spent.

    Raises:
        StartupError: the run cannot start as configured; the message names the key and the remedy.
        DataError: its sets cannot be used.
    """
    if config.task != "contrastive":
        raise StartupError(
            f"task: {config.task} is not contrastive; write task: contrastive, or pretrain with this file"
        )
    run = build_run(
        config, bind=bind_checkpoint, build_data=build_contrastive_data, build_module=build_contrastive_module
    )
    return train(run, CONTRASTIVE)


def build_contrastive_module(
    config: Config, model_config: ModelConfig, attention: AttentionBackend, runtime: Runtime
) -> ContrastiveEncoder:
    """The encoder with its initial weights on the device, compiled if asked for."""
    section = config.contrastive
    objective = Objective(
        pooling=section.pooling,
        temperature=section.temperature,
        learn_temperature=section.learn_temperature,
        hard_negative_weight=section.hard_negative_weight,
        both_directions=section.both_directions,
        false_negative_margin=section.false_negative_margin,
        matryoshka_dims=section.matryoshka_dims,
        trains_head=section.pretraining_prob > 0 and section.pretraining_objective == "mlm",
    )
    if any(dim >= model_config.hidden_size for dim in section.matryoshka_dims):
        raise StartupError(
            f"contrastive.matryoshka_dims: {list(section.matryoshka_dims)} must be less than the width of the model,"
            f" {model_config.hidden_size}, which is always trained"
        )
    module = ContrastiveEncoder(
        build_encoder(config, model_config, attention),
        objective,
        kernel=KERNELS[choose_kernel(config.model.kernel_backend, device=runtime.device)],
        z_loss=config.trainer.z_loss,
    ).to(runtime.device)
    compile_blocks(config, module.encoder)
    return module


def announce(run: Run) -> None:
    """Prints the model, the batch, the budget and the sets; saves the bound config."""
    config, model = run.config, run.model_config
    rows, chunk = run.rows_per_step // run.runtime.world, config.trainer.micro_batch_rows
    cached = f", {chunk} at a time through the encoder" if chunk < rows else ""
    pairs = run.data.num_rows or 0
    lines = [
        f"model     {config.model.name or 'NeoBERT'}: {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"{sum(p.numel() for p in run.module.parameters()):,} parameters, {config.contrastive.pooling} pooling",
        f"compute   {run.runtime.device}, {config.trainer.mixed_precision.replace('no', 'fp32')}, "
        f"attention {run.attention.name} ({run.attention.kernel}), {run.runtime.world} process(es)",
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
    pooling = "" if run.config.contrastive.pooling == "mean" else f" --pooling {run.config.contrastive.pooling}"
    folder = shlex.quote(str(run.output_dir))
    return [
        f"python scripts/embed.py {folder} texts.jsonl --output vectors.npy --normalize{pooling}",
        f"python scripts/export/export_hf.py {folder} --output {shlex.quote(f'{run.output_dir}_hf')}",
    ]


CONTRASTIVE = Job(announce=announce, evaluate=evaluate_sets, next_commands=next_commands)
"""The job that `train` does here."""
