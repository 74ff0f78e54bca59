"""A run: every object that training needs, wired once from a frozen config.

`setup.open_run` comes first: everything that can be wrong with machine, folder, checkpoint and tokenizer, before
anything is built.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline, Reader
from neobert.data.rows.lanes import RowOrder, State
from neobert.data.rows.loader import Loader
from neobert.data.source.inventory import Inventory
from neobert.data.tokenizer import Tokenizer
from neobert.inference.model import Model
from neobert.objectives.base import Answer, EvalMetrics, Objective, ObjectiveModule
from neobert.objectives.table import choose_objective, load_part
from neobert.optim.moving_average import WeightAverage
from neobert.optim.qk_clip import QKClip
from neobert.optim.schedule import Schedule, build_schedule
from neobert.train.build import (
    Sized,
    build_average,
    build_clip,
    build_config_data,
    build_model,
    build_module,
    build_run_optimizer,
    build_sinks,
    choose_num_steps,
    computing_module,
    gather_module,
    share_factors,
)
from neobert.train.checkpoint.commit import Committer
from neobert.train.checkpoint.replicas import compare_tensors, list_tensors
from neobert.train.checkpoint.retention import name_test
from neobert.train.hardware.machine import build_runtime
from neobert.train.initial import copy_initial_weights, start_at_frequencies
from neobert.train.numerics import Guard
from neobert.train.probes.hard_tokens import HardTokens, find_token_weights, wait_for_weights
from neobert.train.probes.pinned import Probes, build_probes
from neobert.train.processes.agreement import (
    agree,
    check_equal,
    sharing_errors,
)
from neobert.train.processes.heartbeat import naming_lost_ranks
from neobert.train.processes.launcher import bind_launcher
from neobert.train.processes.parallel import Engine, choose_engine
from neobert.train.record.health.watch import Health, build_health
from neobert.train.record.statistics import Statistics, build_statistics
from neobert.train.record.tracking import Tracker
from neobert.train.setup import RunSetup, open_run


class RunData(Sized, Protocol):
    """What a run reads: `DataPipeline` in pretraining."""

    @property
    def order(self) -> RowOrder: ...

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

    def loader(self, state: State | None = None, skip: Sequence[tuple[int, int]] = (), step: int = 0) -> Loader: ...

    def counters(self, state: State) -> dict[str, int]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run(RunSetup):
    """What `build_run` wired. Training changes the weights, the optimizer, the record and the two that watch it."""

    objective: Objective
    job: "Job"
    data: RunData
    """`data.batch` has the rows of each step."""

    module: ObjectiveModule
    """The plain module: its names are the checkpoint's."""

    model: nn.Module
    """`module` as it is called: under autocast, and wrapped by the engine; a `MasterWeights` with
    `trainer.bf16_residual`."""

    engine: Engine
    optimizer: Optimizer
    clip: QKClip | None
    """Clips attention logits after the optimizer's steps."""

    average: WeightAverage | None
    """The moving average of the weights, with `trainer.ema_decay`."""

    statistics: Statistics | None
    """With `trainer.log_statistics`."""

    hard_tokens: HardTokens | None
    """With `datacollator.mask_weights: adaptive`."""

    probes: Probes | None
    """With `trainer.probe_steps`."""

    schedule: Schedule
    tracker: Tracker
    health: Health | None
    """With `trainer.health_checks`."""

    committer: Committer
    guard: Guard
    num_steps: int

    def as_model(self, *, main_only: bool = False) -> Model:
        """The model as it is now, to be asked about texts; a copy where weights are sharded, with `main_only` on rank 0
        alone. Collective."""
        keep = self.runtime.is_main or not main_only
        parts = self.config, self.model_config, self.attention, self.runtime, self.module
        return Model(
            module=gather_module(*parts, teacher=self.teacher, keep=keep),
            tokenizer=self.tokenizer,
            objective=self.objective,
        )

    def stop_requested(self) -> bool:
        """Whether all ranks have agreed to stop before the budget is spent."""
        return self.stop.reason is not None

    def read_metrics(self) -> dict[str, float]:
        """What clipping and statistics have seen since the last log line; waits for the device."""
        watching = (w for w in (self.clip, self.statistics) if w is not None)
        return {name: value for watcher in watching for name, value in watcher.read().items()}

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What an objective brings to the training loop, beside its module."""

    bind: Callable[[Config], Config] = lambda config: config
    """The config with what it takes from a checkpoint."""

    build_data: Callable[[Config, Tokenizer, Reader], RunData] = build_config_data
    """What this process reads."""

    announce: Callable[[Run], None]
    """Says what the run is and writes its config."""

    evaluate: Callable[[Run], EvalMetrics | None]
    show: Callable[[Run, Model], Sequence[Answer]] = lambda run, model: ()
    """What is shown of the model when the run is over; on rank 0."""

    next_commands: Callable[[Run], list[str]]
    """What to type when the run is over."""

    is_done: Callable[[Run], bool] = lambda run: False
    """Whether the run ends before its budget is spent; asked at the start and after evaluations. Collective, equal on
    all ranks, and a function of `log.jsonl` alone, so that a resumed run ends where the uninterrupted one does."""


def build_run(config: Config) -> Run:
    """Checks the machine, opens the output folder, and builds tokenizer, data, model, optimizer and record.

    Raises:
        StartupError: the run cannot start as configured, or its ranks differ; the message names the key and the
            remedy.
    """
    job: Job = load_part(choose_objective(config).job)
    config, asked = bind_launcher(config)
    runtime = build_runtime(config)
    with naming_lost_ranks(runtime.heartbeat):
        with sharing_errors(runtime):
            setup, initial = open_run(job.bind(config), runtime, asked)
            config, tokenizer, runtime = setup.config, setup.tokenizer, setup.runtime
            objective = choose_objective(config)
            data = job.build_data(config, tokenizer, setup.reader)
            num_steps = choose_num_steps(config, data)
            check_equal(runtime, lambda: describe_data(data, num_steps))
            probes = build_probes(config, objective, data, tokenizer)
            if probes is not None:
                check_equal(runtime, lambda: {"trainer.probe_sets": probes.fingerprint})
                setup.reporter.say("\n".join(f"probe     {one.describe()}" for one in probes.sets))
            module = build_module(config, setup.model_config, setup.attention, runtime, setup.teacher)
            if initial is not None:
                copied = copy_initial_weights(module, objective, initial, tokenizer, tile=config.model.init_tile)
                setup.reporter.say(copied)
            if setup.checkpoint is None and config.model.decoder_bias_init == "log_frequency":
                assert isinstance(data, DataPipeline), "the key is of pretraining"
                setup.reporter.say(start_at_frequencies(module, agree(runtime, lambda: data.token_counts)))
            compare_tensors(runtime, list_tensors(module), "before the first step", setup.reporter.warn)
            model = build_model(config, module)
            computing = computing_module(model)
            engine = choose_engine(config, runtime.world)
        engine.shard(config, runtime, module)  # Has collectives of its own, so no rank may be missing.
        model = engine.wrap(runtime, model)
        with sharing_errors(runtime):
            optimizer = build_run_optimizer(config, module)
            share_factors(optimizer, runtime)
            return _wire(setup, job, data, probes, module, computing, model, engine, optimizer, num_steps)


def describe_data(data: RunData, num_steps: int) -> dict[str, Any]:
    """What has to be equal on all ranks of the data that they found."""
    order = {f"order of the rows: {name}": value for name, value in asdict(data.order).items()}
    return {
        "data fingerprint": data.fingerprint,
        "fingerprint of the evaluation data": data.eval_fingerprint,
        "steps of the run": num_steps,
        **order,
    }


def _wire(
    setup: RunSetup,
    job: Job,
    data: RunData,
    probes: Probes | None,
    module: ObjectiveModule,
    computing: ObjectiveModule,
    model: nn.Module,
    engine: Engine,
    optimizer: Optimizer,
    num_steps: int,
) -> Run:
    """Everything that trains `module` on `data` and records it; `computing` is what of `model` computes."""
    config, runtime, output_dir, reporter = setup.config, setup.runtime, setup.output_dir, setup.reporter
    weights = find_token_weights(data)
    if weights is not None:
        assert isinstance(data, DataPipeline), "what has them"
        data = wait_for_weights(data, weights)
    average = build_average(config, module)
    computing.learn_from_average(None if average is None else average.tensors)
    objective = choose_objective(config)
    schedule = build_schedule(config.scheduler, base_lr=config.optimizer.lr, num_steps=num_steps)
    tracker = Tracker(
        runtime=runtime,
        config=config,
        output_dir=output_dir,
        reporter=reporter,
        module=module,
        num_steps=num_steps,
        source_labels=data.labels,
        sinks=build_sinks(config, runtime, output_dir, computing, reporter),
    )
    return Run(
        **{f.name: getattr(setup, f.name) for f in fields(setup)},
        objective=objective,
        job=job,
        data=data,
        module=module,
        model=model,
        engine=engine,
        optimizer=optimizer,
        clip=build_clip(config, module, computing, optimizer, runtime),
        average=average,
        statistics=build_statistics(config, module, computing),
        hard_tokens=None if weights is None else HardTokens(module, weights, runtime),
        probes=probes,
        schedule=schedule,
        tracker=tracker,
        health=build_health(config, objective, data, schedule, num_steps, tracker, output_dir),
        committer=Committer(runtime, output_dir),
        guard=Guard(runtime, config.trainer),
        num_steps=num_steps,
    )
