"""What a checkpoint costs: seconds and GB/s of saving (blocking, and in the background) and of resuming.

A model of the asked size makes a step, so that the optimizer has its state. Then, a few times each: a blocking save; a
save in the background, with the time the training thread is paused and the time until the checkpoint is there, while
training continues; and what a resume reads (the full check of every file, then weights and optimizer). Shown are
medians. Reads come from the page cache, since the files were just written.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from neobert.config.load import parse_config
from neobert.config.schema import Config
from neobert.train.checkpoint.resume import load_optimizer, load_weights, resume_or_start
from neobert.train.checkpoint.save import complete_save, save_checkpoint
from neobert.train.finish import finish
from neobert.train.loop import training_steps
from neobert.train.run import Run, build_run
from neobert.types import TrainState
from neobert.weights.folder import check_contents


@dataclass(kw_only=True, slots=True)
class SaveCost:
    """Seconds of every repetition."""

    num_parameters: int = 0
    num_bytes: int = 0
    step: list[float] = field(default_factory=list)
    """A training step while nothing else runs."""

    blocking: list[float] = field(default_factory=list)
    stopped: list[float] = field(default_factory=list)
    """How long a save in the background keeps the training thread."""

    background: list[float] = field(default_factory=list)
    """From the call to the rename: the copy, then what the thread took beside the training steps."""

    step_while_saving: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    def table(self) -> str:
        """The medians as text."""
        gigabytes = self.num_bytes / 1e9
        rows = [
            ("blocking save", self.blocking, True),
            ("background save: training is paused", self.stopped, False),
            ("background save: until it is there", self.background, True),
            ("training step alone", self.step, False),
            ("training step while saving", self.step_while_saving, False),
            ("resume: check every file", self.verify, True),
            ("resume: load weights and optimizer", self.load, True),
        ]
        lines = [f"{self.num_parameters:,} parameters, checkpoint of {gigabytes:.3f} GB, medians"]
        for name, seconds, has_rate in rows:
            if seconds:
                rate = f"{gigabytes / median(seconds):8.2f} GB/s" if has_rate else ""
                lines.append(f"{name:<42}{median(seconds):9.3f} s{rate}".rstrip())
        return "\n".join(lines)


def build_config(folder: Path, *, hidden_size: int, num_layers: int, vocab_size: int) -> Config:
    """A run of that model on a few made-up sentences, with rows so short that a step is cheap beside a save."""
    rng = random.Random(0)
    texts = (" ".join(rng.choices(["one", "two", "three", "four"], k=40)) for _ in range(200))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = [
        f"dataset.path={folder / 'text.jsonl'}",
        "dataset.max_seq_length=64",
        "dataset.eval_samples=1",
        "tokenizer.train=true",
        "tokenizer.vocab_size=300",
        f"model.vocab_size={vocab_size}",
        f"model.hidden_size={hidden_size}",
        f"model.num_hidden_layers={num_layers}",
        f"model.num_attention_heads={max(1, hidden_size // 64)}",
        f"model.intermediate_size={4 * hidden_size}",
        "trainer.max_steps=1000000",
        "trainer.per_device_train_batch_size=1",
        "trainer.eval_steps=0",
        "trainer.save_total_limit=1",
        f"trainer.output_dir={folder / 'run'}",
    ]
    return parse_config("", settings)


def measure(config: Config, repeats: int) -> SaveCost:
    """Trains a little, saves and loads."""
    run = build_run(config)
    run.job.announce(run)
    cost = SaveCost(num_parameters=sum(p.numel() for p in run.module.parameters()))
    steps = (state for state, _ in training_steps(run, resume_or_start(run)))
    state = next(steps)
    for _ in range(repeats):
        cost.step.append(_time_step(steps)[1])
    for _ in range(repeats):
        state = next(steps)
        start = time.perf_counter()
        path = save_checkpoint(run, state)
        cost.blocking.append(time.perf_counter() - start)
    assert path is not None, "the save failed; training.log says why"
    cost.num_bytes = check_contents(path).num_bytes
    trainer = replace(config.trainer, async_save=True)
    in_background = replace(run, config=replace(config, trainer=trainer))
    for _ in range(repeats):
        state = _measure_background(in_background, steps, cost)
    _measure_resume(run, path.with_name(str(state.step)), cost, repeats)
    finish(run, state)
    return cost


def _time_step(steps: Iterator[TrainState]) -> tuple[TrainState, float]:
    start = time.perf_counter()
    return next(steps), time.perf_counter() - start


def _measure_background(run: Run, steps: Iterator[TrainState], cost: SaveCost) -> TrainState:
    saved = next(steps)
    start = time.perf_counter()
    save_checkpoint(run, saved)
    stopped = time.perf_counter() - start
    while True:
        _, seconds = _time_step(steps)
        before = time.perf_counter()
        path = complete_save(run)
        if path is not None:
            break
        cost.step_while_saving.append(seconds)
    cost.stopped.append(stopped + time.perf_counter() - before)
    # By the run's own record: this loop sees the checkpoint only after a step, which may be longer than the save.
    event = json.loads((run.output_dir / "events.jsonl").read_text().splitlines()[-1])
    cost.background.append(stopped + event["seconds"])
    return saved


def _measure_resume(run: Run, checkpoint: Path, cost: SaveCost, repeats: int) -> None:
    for _ in range(repeats):
        start = time.perf_counter()
        check_contents(checkpoint)
        checked = time.perf_counter()
        load_weights(run, checkpoint)
        load_optimizer(run, checkpoint)
        cost.verify.append(checked - start)
        cost.load.append(time.perf_counter() - checked)
