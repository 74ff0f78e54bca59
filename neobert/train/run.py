"""A run: every object that training needs, wired once from a frozen config."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from neobert.config.schema import Config
from neobert.data.batch_size import BatchSchedule
from neobert.data.inventory import Inventory
from neobert.data.lanes import State
from neobert.data.loader import Loader, OrderIdentity
from neobert.data.reader import Reader
from neobert.data.tokenizer import Tokenizer
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.objectives.mlm import MaskedLM
from neobert.optim.averaging import WeightAverage
from neobert.optim.qk_clip import QKClip
from neobert.optim.schedule import Schedule
from neobert.train.agreement import check_equal, sharing_errors
from neobert.train.build import (
    build_average,
    build_clip,
    build_config_data,
    build_module,
    build_run_optimizer,
    build_run_schedule,
    build_sinks,
    choose_num_steps,
)
from neobert.train.commit import Committer
from neobert.train.console import Reporter
from neobert.train.identity import describe_order
from neobert.train.initial import copy_initial_weights
from neobert.train.launcher import check_launcher
from neobert.train.numerics import Guard
from neobert.train.opening import Opened, open_run
from neobert.train.preempt import StopRequest
from neobert.train.replicas import compare_tensors, list_tensors
from neobert.train.retention import name_test
from neobert.train.runtime import Runtime, build_runtime
from neobert.train.statistics import Statistics
from neobert.train.tracking import Tracker


class RunData(Protocol):
    """What a run reads: `DataPipeline` in pretraining."""

    @property
    def identity(self) -> OrderIdentity: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def eval_fingerprint(self) -> str | None: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def inventory(self) -> Inventory: ...

    @property
    def batch(self) -> BatchSchedule: ...

    @property
    def num_rows(self) -> int | None: ...

    @property
    def num_tokens(self) -> int | None: ...

    def loader(self, state: State | None = None, skip: Sequence[tuple[int, int]] = (), step: int = 0) -> Loader: ...

    def counters(self, state: State) -> dict[str, int]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """What `build_run` wired. Training changes the weights, the optimizer, the record and the two that watch it."""

    config: Config
    """As it was given, with what was chosen in the place of `auto`."""

    runtime: Runtime
    output_dir: Path
    checkpoint: Path | None
    """Where this start continues from; None for a fresh start."""

    checkpoint_config: Config | None
    saved: dict[str, Any] | None
    """The checkpoint's `train_state.json`."""

    tokenizer: Tokenizer
    data: RunData
    model_config: ModelConfig
    attention: AttentionBackend
    module: MaskedLM
    """The plain module: its names are the checkpoint's."""

    model: nn.Module
    """`module` as it is called: under autocast, and wrapped when there are several processes."""

    optimizer: Optimizer
    clip: QKClip | None
    """Clips attention logits after the optimizer's steps."""

    average: WeightAverage | None
    """The moving average of the weights, with `trainer.ema_decay`."""

    statistics: Statistics | None
    """With `trainer.log_statistics`."""

    schedule: Schedule
    tracker: Tracker
    reporter: Reporter
    committer: Committer
    guard: Guard
    stop: StopRequest
    rows_per_step: int
    """Global batch: rows over micro-batches and ranks, after a warm-up of the batch; `data.batch` has those of each
    step."""

    num_steps: int

    def stop_requested(self) -> bool:
        """Whether all ranks have agreed to stop before the budget is spent."""
        return self.stop.reason is not None

    def read_figures(self) -> dict[str, float]:
        """What clipping and statistics have seen since the last log line; waits for the device."""
        watching = (w for w in (self.clip, self.statistics) if w is not None)
        return {name: figure for watcher in watching for name, figure in watcher.read().items()}

    @property
    def eval_test(self) -> str | None:
        """Names what is evaluated and how: losses of the same name can be compared. None without evaluation data."""
        return name_test(self.config, self.data.eval_fingerprint)

    @property
    def logging_steps(self) -> int:
        return self.config.trainer.logging_steps

    @property
    def eval_steps(self) -> int:
        return 0 if self.config.trainer.eval_strategy == "no" else self.config.trainer.eval_steps

    @property
    def save_steps(self) -> int:
        return 0 if self.config.trainer.save_strategy == "no" else self.config.trainer.save_steps


def build_run(
    config: Config,
    *,
    bind: Callable[[Config], Config] = lambda config: config,
    build_data: Callable[[Config, Tokenizer, Reader], RunData] = build_config_data,
    build_module: Callable[..., MaskedLM] = build_module,
) -> Run:
    """Checks the machine, opens the output folder, and builds tokenizer, data, model, optimizer and record.

    Args:
        bind: the config with what it takes from a checkpoint.
        build_data: what this process reads.
        build_module: takes the arguments of `neobert.train.build.build_module`; its weights are those of a `MaskedLM`
            and more.

    Raises:
        StartupError: the run cannot start as configured, or its ranks differ; the message names the key and the
            remedy.
    """
    check_launcher(config)
    runtime = build_runtime(config)
    with sharing_errors(runtime):
        opened = open_run(bind(config), runtime)
        config, tokenizer, runtime = opened.config, opened.tokenizer, opened.runtime
        data = build_data(config, tokenizer, opened.reader)
        num_steps = choose_num_steps(config, data)
        check_equal(runtime, lambda: describe_data(data, num_steps))
        module = build_module(config, opened.model_config, opened.attention, runtime)
        if opened.initial is not None:
            opened.reporter.say(copy_initial_weights(module, opened.initial, tokenizer, tile=config.model.init_tile))
        optimizer = build_run_optimizer(config, module)
        compare_tensors(runtime, list_tensors(module, optimizer), "before the first step", opened.reporter.warn)
    model = runtime.prepare_model(module)  # Has collectives of its own, so no rank may be missing.
    with sharing_errors(runtime):
        return _wire(opened, data, module, model, optimizer, num_steps)


def describe_data(data: RunData, num_steps: int) -> dict[str, Any]:
    """What has to be equal on all ranks of the data that they found."""
    order = {f"order of the rows: {name}": value for name, value in describe_order(data.identity).items()}
    return {
        "data fingerprint": data.fingerprint,
        "fingerprint of the evaluation data": data.eval_fingerprint,
        "steps of the run": num_steps,
        **order,
    }


def _wire(
    opened: Opened, data: RunData, module: MaskedLM, model: nn.Module, optimizer: Optimizer, num_steps: int
) -> Run:
    """Everything that trains `module` on `data` and records it."""
    config, runtime, output_dir, reporter = opened.config, opened.runtime, opened.output_dir, opened.reporter
    return Run(
        config=config,
        runtime=runtime,
        output_dir=output_dir,
        checkpoint=opened.checkpoint,
        checkpoint_config=opened.checkpoint_config,
        saved=opened.saved,
        tokenizer=opened.tokenizer,
        data=data,
        model_config=opened.model_config,
        attention=opened.attention,
        module=module,
        model=model,
        optimizer=optimizer,
        clip=build_clip(config, module, optimizer, runtime),
        average=build_average(config, module),
        statistics=Statistics(module) if config.trainer.log_statistics else None,
        schedule=build_run_schedule(config, num_steps),
        tracker=Tracker(
            runtime=runtime,
            config=config,
            output_dir=output_dir,
            reporter=reporter,
            module=module,
            num_steps=num_steps,
            source_labels=data.labels,
            sinks=build_sinks(config, runtime, output_dir, module, reporter),
        ),
        reporter=reporter,
        committer=Committer(runtime, output_dir),
        guard=Guard(runtime, max_bad_steps=config.trainer.max_bad_steps, skip_spikes=config.trainer.skip_spikes),
        stop=opened.stop,
        rows_per_step=opened.rows_per_step,
        num_steps=num_steps,
    )
