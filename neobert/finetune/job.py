"""Fine-tuning on labels: the training loop of pretraining with labelled rows, a head, and another evaluation."""

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from neobert.config.nesting import parse_json
from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.finetune.evaluate_labels import evaluate_labels, load_predictions
from neobert.finetune.example_data import build_finetune_data, describe_labels
from neobert.finetune.labelled_data import bind_labels, read_splits
from neobert.objectives.table import check_task
from neobert.train.bind import bind_own, bind_source
from neobert.train.checkpoint.retention import BEST
from neobert.train.hardware.machine import describe_compute
from neobert.train.loop import train
from neobert.train.processes.agreement import agree
from neobert.train.run import Job, Run, build_run
from neobert.train.start import choose_start, write_config


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinetuneResult:
    """What a run on labels gave."""

    best_step: int | None
    """Step of the best evaluation by `finetune.metric`; None where nothing was evaluated."""

    metrics: dict[str, float]
    """Of that evaluation, `loss` among them."""

    predictions: NDArray[Any] | None
    """Of that evaluation, see `evaluate_labels.choose_predictions`."""

    steps: int
    seconds: float
    """Of this start."""

    output_dir: Path
    reason: str
    """See `RunResult.reason`."""


def finetune(config: Config) -> FinetuneResult:
    """Trains an encoder with a head on labelled rows until the budget is spent.

    Raises:
        StartupError: the run cannot start as configured; the message names the key and the remedy.
        DataError: its data cannot be used.
    """
    check_task(config, "finetune")
    if config.finetune.seeds:
        raise StartupError(
            f"finetune.seeds: {list(config.finetune.seeds)} are several runs; call finetune_seeds, or remove the key"
        )
    start = time.monotonic()
    result = train(build_run(config))
    output_dir = Path(config.trainer.output_dir)
    best = choose_best_line(read_evaluations(output_dir), config.finetune.metric)
    return FinetuneResult(
        best_step=None if best is None else best["step"],
        metrics={} if best is None else {**best["metrics"], "loss": best["loss"]},
        predictions=None if best is None else load_predictions(output_dir, best["step"]),
        steps=result.state.step,
        seconds=time.monotonic() - start,
        output_dir=output_dir,
        reason=result.reason,
    )


def read_evaluations(output_dir: Path) -> list[dict[str, Any]]:
    """Lines of the evaluations of a run, in the order of their steps; one of a step counts, the last."""
    log = output_dir / "log.jsonl"
    lines = [parse_json(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [*{line["step"]: line for line in lines if line["kind"] == "eval"}.values()]


def choose_best_line(lines: Sequence[dict[str, Any]], metric: str | None) -> dict[str, Any] | None:
    """The best evaluation by `finetune.metric`, the earlier one of two; that of the initial weights only where there is
    no other. Lines of a run that had another metric are compared by this one, where they have it."""

    def score(line: dict[str, Any]) -> float:
        value = line["loss"] if metric == "loss" else line["metrics"].get(metric or next(iter(line["metrics"])))
        if value is None:  # It was not finite, or is not there.
            return math.nan
        return -value if metric == "loss" else float(value)

    trained = [line for line in lines if line["step"]]
    known = [line for line in trained or lines if not math.isnan(score(line))]
    return max(known, key=lambda line: (score(line), -line["step"]), default=None)


def is_done(run: Run) -> bool:
    """Whether `finetune.early_stopping` evaluations in a row were no better than the best one."""
    patience = run.config.finetune.early_stopping
    if patience is None:
        return False

    def decide() -> bool:
        lines = [line for line in read_evaluations(run.output_dir) if line["step"]]
        best = choose_best_line(lines, run.config.finetune.metric)
        return best is not None and sum(line["step"] > best["step"] for line in lines) >= patience

    return agree(run.runtime, decide)


def bind_finetune(config: Config) -> Config:
    """The config with the architecture and tokenizer of its checkpoint (the run's own one when it is resumed, else
    `finetune.model`), and with what its data decides: columns, kind, labels and their weights.

    Raises:
        StartupError: the checkpoint cannot be read, or the config says something else than it.
        DataError: the data cannot be learned from as configured.
    """
    own = choose_start(config).path
    config = bind_labels(config, read_splits(config))
    if own is not None:
        return bind_own(config, own)
    if config.finetune.model is None:
        return config
    return bind_source(config, config.finetune.model, "finetune.model", any_encoder=True)


def announce(run: Run) -> None:
    """Prints the model, the batch, the budget and the data; saves the bound config."""
    config, model = run.config, run.model_config
    rows = run.rows_per_step
    trained = sum(p.numel() for p in run.module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.module.parameters())
    lines = [
        f"model     {config.model.name or 'NeoBERT'}: {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"{total:,} parameters, {trained:,} of them trained",
        describe_compute(config, run.runtime, _describe_attention(run)),
        f"labels    {describe_labels(config)}",
        f"batch     {rows} rows a step, {config.trainer.micro_batch_rows} at a time through a process",
        f"budget    {run.num_steps:,} steps, {run.num_steps * rows / max(run.data.num_rows or 0, 1):.2f} epochs of "
        f"{run.data.num_rows:,} rows",
        *(f"data      {note}" for note in run.data.notes),
    ]
    run.reporter.say("\n".join(lines))
    for text in warnings(config, total_steps=run.num_steps):
        run.reporter.warn(text)
    write_config(config, run.runtime, run.output_dir, run.reporter)


def _describe_attention(run: Run) -> str:
    if run.model_config.hub_config is not None:
        return f"{run.model_config.hub_config['model_type']} of transformers, padded"
    return run.attention.describe()


def next_commands(run: Run) -> list[str]:
    """What to type after fine-tuning, with the best checkpoint where one is kept."""
    best = run.output_dir / "checkpoints" / BEST
    folder = run.output_dir
    if run.config.trainer.save_best and best.is_file():
        folder = best.with_name(str(parse_json(best.read_text())["step"]))
    text = "two texts\twith a tab between" if run.config.finetune.pair_column is not None else "a text"
    return [f"neobert predict {shlex.quote(str(folder))} {shlex.quote(text)}"]


FINETUNE = Job(
    bind=bind_finetune,
    build_data=build_finetune_data,
    announce=announce,
    evaluate=evaluate_labels,
    next_commands=next_commands,
    is_done=is_done,
)
