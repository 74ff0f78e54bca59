"""Everything a run records: console lines, `log.jsonl`, `events.jsonl` and optional trackers.

`log.jsonl` and the console are always on; a tracker such as wandb is a further reader of the same records, and one that
fails is switched off with a warning, since losing a picture must not lose a run.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from neobert.config.schema import Config
from neobert.objectives.mlm import MaskedLM
from neobert.train.console import Reporter
from neobert.train.metrics import EvalMetrics, MetricWindow, perplexity
from neobert.train.runtime import Runtime
from neobert.types import StepMetrics, TrainState

MOST_PENDING = 1000
"""Steps whose figures may wait on the device; more are written between two logging points."""


class Sink(Protocol):
    """An optional tracker."""

    name: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def keep_until(self, step: int) -> None:
        """Drops the lines of later steps, and a line torn by a kill, by writing the file anew and renaming it."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines and flushes them to the disk; a reader never sees half of one after a clean exit.

        Raises:
            OSError: they could not be written; the next call writes them too.
        """
        self._unwritten += [json.dumps(line) + "\n" for line in lines]
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as handle:
                handle.writelines(self._unwritten)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            if self._path.exists():
                os.truncate(self._path, size)  # Half a line would spoil the line after it.
            raise
        self._unwritten.clear()


class Tracker:
    """The run's record. All ranks call it at the same steps; rank 0 writes."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        config: Config,
        output_dir: Path,
        reporter: Reporter,
        module: MaskedLM,
        num_steps: int,
        sinks: list[Sink],
    ) -> None:
        self._runtime, self._config, self._module = runtime, config, module
        self._num_steps = num_steps
        self._reporter, self._sinks = reporter, sinks
        self._log, self._events = JsonLines(output_dir / "log.jsonl"), JsonLines(output_dir / "events.jsonl")
        self._window = MetricWindow(runtime=runtime)
        self._evaluated_step: int | None = None
        self._eval_loss: float | None = None
        self.trained = False
        """Whether this start made any step."""

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self._reporter.warn(text)

    def begin(self, state: TrainState) -> None:
        """Opens the record at `state`: lines of steps after it belong to a run that was killed and are dropped."""
        if self._runtime.is_main:
            self._log.keep_until(state.step if state.step else -1)  # The evaluation of step 0 is made anew too.
        self._reporter.start_progress(done=state.step, total=self._num_steps)
        self._window.restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluation and saving: the steps so far are written first, the time does not count as training."""
        self._write_steps()
        with self._window.paused():
            yield

    def add(self, state: TrainState, metrics: StepMetrics) -> None:
        """Takes one step's figures without waiting for the device."""
        self.trained = True
        self._window.add(state.step, metrics)
        if self._window.num_pending == MOST_PENDING:
            self._write_steps()
        self._reporter.advance(state.step)

    def log(self, state: TrainState) -> None:
        """Ends a logging interval: one console line, one `log` line, one record to every tracker."""
        self._write_steps()
        records, seconds = self._window.restart()
        if not records:
            return
        last = records[-1].metrics
        tokens = sum(r.metrics.num_tokens for r in records)
        targets = max(sum(r.metrics.num_targets for r in records), 1)
        slots = sum(r.metrics.num_slots for r in records)
        loss = sum(r.loss_sum for r in records) / targets
        attended = sum(r.metrics.attended_tokens for r in records) / tokens
        tokens_per_second = tokens / max(seconds, 1e-9)
        mfu = self._mfu(tokens_per_second, attended)
        values: dict[str, float] = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/learning_rate": last.lr,
            "train/tokens_per_sec": tokens_per_second,
            "train/data_wait": sum(r.metrics.data_wait for r in records) / max(seconds, 1e-9),
            "train/packing_fill": tokens / slots,
        }
        if mfu is not None:
            values["train/mfu"] = mfu
        if records[-1].grad_norm is not None and self._config.trainer.log_grad_norm:
            values["train/grad_norm"] = records[-1].grad_norm
        if self._config.trainer.log_weight_norms:
            values["train/weight_norm"] = self._weight_norm()
        if self._config.trainer.log_train_accuracy:
            values["train/accuracy"] = sum(r.num_correct or 0 for r in records) / targets
        peak = max(self._runtime.gather_objects(self._runtime.peak_memory_bytes()))
        line = {
            "kind": "log",
            "step": state.step,
            "loss": loss,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "data_wait": values["train/data_wait"],
            "packing_fill": values["train/packing_fill"],
            "peak_memory_bytes": peak,
            "weight_norm": values.get("train/weight_norm"),
            "accuracy": values.get("train/accuracy"),
            "tokens": state.tokens,
            "seconds": seconds,
        }
        self._append(self._log, [line])
        self._reporter.say(self._describe(state.step, values))
        self._send(values, state.step)

    def log_eval(self, state: TrainState, metrics: EvalMetrics | None) -> None:
        """Records an evaluation; None (no evaluation data) records nothing."""
        self._evaluated_step = state.step
        self._eval_loss = None if metrics is None else metrics.loss
        if metrics is None:
            return
        self._append(self._log, [{"kind": "eval", "step": state.step, **asdict(metrics)}])
        self._reporter.say(
            f"eval  step {state.step:>7,} | loss {metrics.loss:.4f} | ppl {perplexity(metrics.loss):.2f} | "
            f"accuracy {metrics.accuracy:.2%} | {metrics.num_targets:,} masked tokens of "
            f"{metrics.num_documents:,} documents"
        )
        values = {
            "eval/loss": metrics.loss,
            "eval/perplexity": perplexity(metrics.loss),
            "eval/accuracy": metrics.accuracy,
        }
        self._send(values, state.step)

    def evaluated(self, step: int) -> bool:
        """Whether this process evaluated at `step`."""
        return self._evaluated_step == step

    def eval_loss(self, step: int) -> float | None:
        """Evaluation loss at `step`; None when this process did not evaluate there."""
        return self._eval_loss if self.evaluated(step) else None

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Notes an incident in `events.jsonl`."""
        self._append(self._events, [{"event": kind, "step": step, "time": time.time(), **details}])

    def close(self) -> None:
        """Writes what is pending and closes the trackers."""
        self._write_steps()
        for sink in list(self._sinks):
            self._guard(sink, sink.close)
        self._reporter.stop_progress()

    def _write_steps(self) -> None:
        self._append(self._log, [record.as_line() for record in self._window.read()])
        if not self._config.trainer.logging_steps:
            self._window.restart()  # No log line will ask for these records.

    def _append(self, target: JsonLines, lines: list[dict[str, Any]]) -> None:
        if not (self._runtime.is_main and lines):
            return
        try:
            target.append(lines)
        except OSError as error:  # Full for a while: checkpoints decide whether the run can go on, not its record.
            self.warn(f"a record could not be written ({error}); it is kept and written with the next one")

    def _send(self, values: dict[str, float], step: int) -> None:
        for sink in list(self._sinks):
            self._guard(sink, lambda sink=sink: sink.log(values, step))  # type: ignore[misc]

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # A tracker may raise anything: network, disk, its own bugs.
            self.warn(f"{sink.name} failed ({error}) and is switched off; the run and log.jsonl go on")
            if sink in self._sinks:
                self._sinks.remove(sink)

    def _mfu(self, tokens_per_second: float, attended_length: float) -> float | None:
        peak = peak_flops(self._runtime.device)
        if peak is None:
            return None
        flops_per_token = self._module.encoder.flops_per_token(
            attended_length=attended_length, predicted_fraction=self._config.datacollator.mlm_probability
        )
        return tokens_per_second * flops_per_token / (peak * self._runtime.world)

    def _weight_norm(self) -> float:
        norms = torch._foreach_norm([p.detach() for p in self._module.parameters()])
        return torch.linalg.vector_norm(torch.stack(norms)).item()

    def _describe(self, step: int, values: dict[str, float]) -> str:
        parts = [
            f"train step {step:>7,}",
            f"loss {values['train/loss']:.4f}",
            f"ppl {values['train/perplexity']:.2f}",
            f"lr {values['train/learning_rate']:.2e}",
        ]
        if "train/grad_norm" in values:
            parts.append(f"grad {values['train/grad_norm']:.3f}")
        if "train/accuracy" in values:
            parts.append(f"accuracy {values['train/accuracy']:.2%}")
        parts.append(f"{values['train/tokens_per_sec']:,.0f} tokens/s")
        if "train/mfu" in values:
            parts.append(f"mfu {values['train/mfu']:.1%}")
        parts.append(f"data wait {values['train/data_wait']:.1%}")
        return " | ".join(parts)


PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 peak of the vendors' data sheets in FLOP/s, by a word of the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet peak of the device, None where we have no figure: then no utilisation is printed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_BF16_FLOPS.items() if word in name), None)


class WandbSink:
    """Weights & Biases; `wandb.mode: offline` needs no account and no network."""

    name = "wandb"

    def __init__(self, config: Config, output_dir: Path, module: nn.Module) -> None:
        import wandb

        section = config.wandb
        id_file = output_dir / "wandb_id.txt"
        # A continued run keeps its id, so that `wandb.resume: allow` draws one curve.
        run_id = id_file.read_text().strip() if section.resume != "never" and id_file.is_file() else None
        Path(section.dir).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or config.model.name or output_dir.name,
            tags=list(section.tags) or None,
            mode=section.mode,
            dir=section.dir,
            id=run_id,
            resume=section.resume,
            config=asdict(config),
        )
        id_file.write_text(self._run.id + "\n")
        if section.watch != "off":
            self._run.watch(module, log=section.watch, log_freq=config.trainer.logging_steps)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        self._run.finish()
