"""Everything a run records: console lines, `log.jsonl`, `events.jsonl` and optional trackers.

`log.jsonl` and the console are always on; a tracker such as wandb is a further reader of the same records, and one that
fails is left out with a warning, since losing a picture must not lose a run.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neobert.config.load import without_secrets
from neobert.config.schema import Config
from neobert.model.peak import peak_flops
from neobert.objectives.base import EvalMetrics, ObjectiveModule
from neobert.objectives.mlm import perplexity
from neobert.objectives.table import choose_objective
from neobert.secrets import scrub_config
from neobert.train.checkpoint.audit import (
    RankLayout,
    ReplayAudit,
    ReplayDiverged,
    is_first_attempt,
    list_last_events,
    read_layout,
)
from neobert.train.hardware.machine import Runtime, compute_dtype
from neobert.train.numerics import SkippedStep, build_skipped_step
from neobert.train.probes.result import ProbeResult
from neobert.train.processes.agreement import broadcast
from neobert.train.processes.parallel import choose_engine
from neobert.train.record.console import Reporter
from neobert.train.record.metrics import (
    Interval,
    IntervalSums,
    MetricWindow,
    StepRecord,
    describe_notes,
    describe_values,
    summarise,
)
from neobert.train.record.sinks import LineFile, drop_later
from neobert.train.record.statistics import norm_of
from neobert.train.record.trackers import Trackers, TrackerSink, as_metrics
from neobert.train.report.log_reader import RunLog
from neobert.train.report.page import RunReport, write_report
from neobert.train.report.run_summary import describe_learning
from neobert.train.step import StepMetrics
from neobert.types import TrainState

MOST_PENDING = 1000
"""Steps whose metrics may wait on the device; more are written between two logging points."""


class Tracker:
    """The run's record. All ranks call it at the same steps; rank 0 writes."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        config: Config,
        output_dir: Path,
        reporter: Reporter,
        module: ObjectiveModule,
        num_steps: int,
        source_labels: Sequence[str],
        sinks: list[TrackerSink],
    ) -> None:
        self._runtime, self._config, self._module = runtime, config, module
        self._num_steps, self._labels = num_steps, source_labels
        self._reporter, self._trackers = reporter, Trackers(sinks, self._note_failed_tracker)
        self._log, self._events = LineFile(output_dir / "log.jsonl"), LineFile(output_dir / "events.jsonl")
        self._report = RunReport(output_dir, without_secrets(config))
        self._window = MetricWindow(runtime, source_labels)
        self._is_partial = False
        engine, rows = choose_engine(config, runtime.world).name, config.trainer.micro_batch_rows
        self._layout = RankLayout(processes=runtime.world, micro_batch_rows=rows, engine=engine)
        self._layout_before = self._layout
        if runtime.is_main:
            self._events.cut_torn()
            self._layout_before = read_layout(list_last_events(self._events.newest_first())) or self._layout
        self._audit: ReplayAudit | None = None
        self._evaluated_step: int | None = None
        self._probed_step: int | None = None
        self._eval: EvalMetrics | None = None
        self.step = 0
        """The last step that was added."""

        self.skipped: list[SkippedStep] = []
        """The last skipped steps of this start."""

        self.trained = False
        """Whether this start made any step."""

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self._reporter.warn(text)

    def begin(self, state: TrainState) -> None:
        """Opens the record at `state`: lines of steps after it belong to a run that was killed. They are dropped, and
        the steps made again are compared with them. Collective."""
        found: tuple[list[dict[str, Any]], RankLayout, set[str]] = ([], self._layout, set())
        if self._runtime.is_main:
            later, here = drop_later(self._log, state.step)
            found = (
                later if is_first_attempt(list_last_events(self._events.newest_first())) else [],
                self._layout_before,
                here,
            )
        old_steps, before, here = broadcast(self._runtime, found)
        # What it has read may be among the dropped.
        self._report = RunReport(self._report.folder, without_secrets(self._config))
        self._audit = ReplayAudit(old_steps, before=before, now=self._layout) if old_steps else None
        self._evaluated_step = state.step if "eval" in here else None
        self._probed_step = state.step if "probe" in here else None
        self.step = state.step
        if state.step == 0:
            self.event("started", 0)
        self._trackers.begin(state.step)
        self._reporter.start_progress(done=state.step, total=self._num_steps)
        self._window.restore(IntervalSums(**state.interval))
        # Earlier versions saved no sums: what came before, since the last log line, is not known.
        self._is_partial = state.step > 0 and not state.interval

    def forget_replay(self) -> None:
        """Compares no further steps with those before the last `begin`."""
        self._audit = None

    def flush(self) -> None:
        """Writes the lines of all steps so far. Collective, and waits for the device."""
        self._write_steps()

    def add_interval(self, state: TrainState) -> TrainState:
        """`state` with what must be saved of the logging interval; after `flush` or inside `paused`."""
        return replace(state, interval=asdict(self._window.sums))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluation and saving: the steps so far are written first, the time does not count as training."""
        self._write_steps()
        with self._window.paused():
            yield

    def add(self, state: TrainState, metrics: StepMetrics) -> None:
        """Takes one step's metrics without waiting for the device."""
        self.trained, self.step = True, state.step
        self._window.add(state.step, metrics)
        if self._window.num_pending == MOST_PENDING:
            self._write_steps()
        self._reporter.advance(state.step)

    def note_profiled_step(self) -> None:
        """The step that comes next was profiled: the log line of its interval says so, since it was slowed."""
        self._window.note_profiled_step()

    def log(self, state: TrainState, statistics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ends a logging interval: one console line, one `log` line, one record to every tracker. `statistics` go into
        the two latter."""
        self._write_steps()
        sums = self._window.restart()
        if not sums.num_steps:
            return
        interval, incomplete = summarise(sums), {"partial": True} if self._is_partial else {}
        values = self._choose_values(interval, sums)
        self._is_partial = False
        peak = max(self._runtime.gather_to_main(self._runtime.peak_memory_bytes()) or [0])
        by_source = None if len(self._labels) < 2 else sums.source_tokens
        line = {
            "kind": "log",
            "step": state.step,
            "first_step": sums.first_step,
            "loss": interval.loss,
            "skipped": interval.num_skipped,
            "tokens_per_second": interval.tokens_per_second,
            "mfu": values.get("train/mfu"),
            "data_wait": interval.data_wait,
            "packing_fill": interval.packing_fill,
            "peak_memory_bytes": peak,
            "weight_norm": values.get("train/weight_norm"),
            "accuracy": values.get("train/accuracy"),
            "tokens": state.tokens,
            "source_tokens": by_source,
            "seconds": sums.seconds,
            **statistics,
        }
        profiled = {"profiled_steps": sums.num_profiled} if sums.num_profiled else {}
        line |= profiled | incomplete
        self._append(self._log, [line])
        self._reporter.say(describe_values(state.step, values))
        self._reporter.note(*describe_notes(values))
        if by_source is not None:
            fractions = ", ".join(f"{count / interval.num_tokens:.1%} {label}" for label, count in by_source.items())
            self._reporter.say(f"      tokens by source: {fractions}")
        self._trackers.send(as_metrics("train", line) | values, state.step)

    def _choose_values(self, interval: Interval, sums: IntervalSums) -> dict[str, float]:
        """What console and trackers show of an interval: the metrics that this run has, by the trackers' names."""
        trainer, predicts_tokens = self._config.trainer, choose_objective(self._config).predicts_tokens
        values: dict[str, float] = {
            "train/loss": interval.loss,
            "train/learning_rate": interval.lr,
            "train/tokens_per_sec": interval.tokens_per_second,
            "train/data_wait": interval.data_wait,
            "train/packing_fill": interval.packing_fill,
        }
        if predicts_tokens:
            values["train/perplexity"] = perplexity(interval.loss - interval.z_loss)
            if trainer.z_loss:
                values["train/z_loss"] = interval.z_loss
        # What is no token costs no projection onto the vocabulary.
        predicted = interval.predicted_fraction if predicts_tokens else 0.0
        mfu = self._mfu(interval.tokens_per_second, interval.attended_length, predicted)
        if mfu is not None:
            values["train/mfu"] = mfu
        if interval.grad_norm is not None and trainer.log_grad_norm:
            values["train/grad_norm"] = interval.grad_norm
        if interval.num_skipped:
            values["train/skipped_steps"] = interval.num_skipped
        if sums.num_profiled:
            values["train/profiled_steps"] = sums.num_profiled
        if self._is_partial:
            values["train/partial_interval_steps"] = sums.num_steps
        if trainer.log_weight_norms:
            values["train/weight_norm"] = norm_of([p.detach() for p in self._module.parameters()]).item()
        if trainer.log_train_accuracy:
            values["train/accuracy"] = interval.accuracy
        return values

    def log_eval(self, state: TrainState, metrics: EvalMetrics | None, averaged: EvalMetrics | None = None) -> None:
        """Records an evaluation of the weights and of their moving average, if there is one, in lines of kind `eval`
        and `eval_ema`; None (no evaluation data) records nothing."""
        self._evaluated_step = state.step
        self._eval = metrics
        if metrics is None:
            return
        found = {"eval": metrics} if averaged is None else {"eval": metrics, "eval_ema": averaged}
        lines = {kind: m.as_line() for kind, m in found.items()}
        # Both lines in one write: an evaluation that is in the file is not made again.
        self._append(self._log, [{"kind": kind, "step": state.step, **line} for kind, line in lines.items()])
        for label, (kind, m) in zip(("eval ", "ema  "), found.items()):
            self._reporter.say(f"{label} step {state.step:>7,} | {m.describe()}")
            mark = kind.removeprefix("eval")
            values = {name.replace("/", f"{mark}/", 1): x for name, x in m.as_values().items()}
            self._trackers.send(as_metrics(kind, lines[kind]) | values, state.step)
        self.write_report()

    def log_probes(
        self,
        state: TrainState,
        found: Mapping[str, ProbeResult],
        *,
        seconds: Mapping[str, float],
        fractions: Mapping[str, float],
        fingerprints: Mapping[str, str],
    ) -> None:
        """Records probes in lines of their kinds: `probe`, and `probe_ema` of the moving average.

        Args:
            seconds: of each probe, for all kinds together.
            fractions: of each probe, of the time of this start of the run.
        """
        self._probed_step = state.step
        cost = {"seconds": dict(seconds), "fractions": dict(fractions), "fingerprints": dict(fingerprints)}
        lines = {kind: {"kind": kind, "step": state.step, **x.as_line(), **cost} for kind, x in found.items()}
        self._append(self._log, list(lines.values()))
        total = f"{sum(seconds.values()):.2f} s"
        total += f", {sum(fractions.values()):.2%} of the time" if fractions else ""
        values = {f"probe/seconds/{name}": x for name, x in seconds.items()}
        for kind, result in found.items():
            self._reporter.say(f"{kind.replace('_', ' ')} step {state.step:>7,} | {result.describe()} | {total}")
            named = {name.replace("probe/", f"{kind}/", 1): x for name, x in result.as_values().items()}
            values |= as_metrics(kind, lines[kind]) | named
        self._trackers.send(values, state.step)

    def probed(self, step: int) -> bool:
        """Whether this run probed at `step`."""
        return self._probed_step == step

    def evaluated(self, step: int) -> bool:
        """Whether this process evaluated at `step`."""
        return self._evaluated_step == step

    def evaluation(self, step: int) -> EvalMetrics | None:
        """The evaluation at `step`; None when this process did not evaluate there."""
        return self._eval if self.evaluated(step) else None

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Notes an incident in `events.jsonl`, without secrets."""
        line = {"event": kind, "step": step, "time": time.time(), **asdict(self._layout), **scrub_config(details)}
        self._append(self._events, [line])

    def note_once(self, kind: str, step: int, **details: Any) -> None:
        """Notes what a start has found, JSON-ready, unless the last event of its kind says the same."""
        if not self._runtime.is_main:
            return
        known = next((event for event in self._events.newest_first() if event["event"] == kind), None)
        if known is None or not scrub_config(details).items() <= known.items():
            self.event(kind, step, **details)

    def note_weights(self, step: int, measured: Mapping[str, Any]) -> None:
        """Records what was measured of the weights, in a line of kind `weights`."""
        self._append(self._log, [{"kind": "weights", "step": step, **measured}])

    def read_log(self) -> RunLog:
        """The lines so far, of which only new ones are read; for rank 0. Raises OSError where there is no log."""
        self._report.log.update()
        return self._report.log

    def write_report(self) -> None:
        """Brings the page of the run up to date; where it cannot be written, the run continues without."""
        if not self._runtime.is_main:
            return
        try:
            with self._window.paused():
                write_report([self._report], self._report.path)
        except Exception as error:  # A full disk, a damaged log: what shows a run must not end it.
            self.warn(f"{self._report.path} could not be written ({error}); the run continues without it")
            self.event("report_failed", self.step, problem=f"{type(error).__name__}: {error}")

    def describe_learning(self) -> str:
        """What `log.jsonl` says was learned, over all starts; empty where it has no loss."""
        with suppress(OSError):  # Of the log: what it has not is not said.
            self._report.log.update()
        return describe_learning(self._report.log)

    def close(self) -> None:
        """Writes what is pending and closes the trackers."""
        self._write_steps()
        self._end_audit()
        self.write_report()
        self._trackers.close()
        self._reporter.stop_progress()

    def _write_steps(self) -> None:
        records = self._window.read()
        lines = [record.as_line() for record in records]
        self._append(self._log, lines)
        for record in records:
            if record.skipped:
                self._note_skipped(record)
        self._compare_with_first_attempt(lines)

    def _note_skipped(self, record: StepRecord) -> None:
        step = build_skipped_step(
            self._runtime, step=record.step, loss=record.loss, grad_norm=record.grad_norm, metrics=record.metrics
        )
        self.skipped = [*self.skipped, step][-MOST_PENDING:]
        self.warn(step.describe())
        # As texts, in which a NaN and an infinity differ.
        numbers = {"loss": str(step.loss), "grad_norm": str(step.grad_norm)}
        self.event("skipped_step", step.step, **numbers, rows=step.rows, suspects=step.suspects)

    def _compare_with_first_attempt(self, lines: list[dict[str, Any]]) -> None:
        if self._audit is None:
            return
        difference = self._audit.compare(lines)
        if difference is not None:
            self.warn(difference)
            self.event("replay_differs", self.step, difference=difference)
            if self._config.trainer.replay_audit == "strict":
                raise ReplayDiverged(f"{difference}; trainer.replay_audit: strict stops the run")
        if self._audit.done:
            self._end_audit()

    def _end_audit(self) -> None:
        if self._audit is not None:
            self.say(self._audit.verdict())
            self.event("replay_audit", self.step, verdict=self._audit.verdict(), differ=self._audit.num_different)
            self._audit = None

    def _append(self, target: LineFile, lines: list[dict[str, Any]]) -> None:
        if not (self._runtime.is_main and lines):
            return
        try:
            target.append(lines)
        except OSError as error:  # Full for a while: checkpoints decide whether the run can continue, not its record.
            self.warn(f"a record could not be written ({error}); it is kept and written with the next one")

    def _note_failed_tracker(self, name: str, sentence: str, problem: str) -> None:
        self.warn(f"{sentence}; the run and log.jsonl continue")
        self.event("tracker_failed", self.step, tracker=name, problem=problem)

    def _mfu(self, tokens_per_second: float, attended_length: float, predicted_fraction: float) -> float | None:
        peak = peak_flops(self._runtime.device, compute_dtype(self._config))
        if peak is None:
            return None
        flops_per_token = self._module.encoder.flops_per_token(
            attended_length=attended_length, predicted_fraction=predicted_fraction
        )
        return tokens_per_second * flops_per_token / (peak * self._runtime.world)
