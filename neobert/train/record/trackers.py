"""Trackers that `trainer.report_to` names: further readers of what `log.jsonl` records, each one of accelerate's.

They get every number in the lines of `log.jsonl`, but for those of single steps, as `train/NAME`, `eval/NAME` and so on
with the step of the line, and the config without secrets. A resumed run continues the curve: with the id that the run
folder keeps, or by going back to the step it continues from.
"""

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from torch import nn

from neobert.config.schema import Config
from neobert.key import show_value
from neobert.secrets import scrub, scrub_config
from neobert.train.hardware.machine import is_installed
from neobert.train.record.sinks import TRACKED_SECTIONS


class TrackerSink:
    """One tracker of a run. Nothing is imported and nothing starts before `begin`."""

    name: ClassVar[str]
    """In `trainer.report_to`, and of its package."""

    def __init__(self, config: Config, output_dir: Path, module: nn.Module) -> None:
        self._config, self._output_dir, self._module = config, output_dir, module
        self._tracker: Any = None

    def begin(self, step: int) -> None:
        """Starts. Called again when a run goes back to `step`: what follows replaces what was sent of later steps."""
        if self._tracker is None:
            self._tracker = self._start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends the values that are finite."""
        self._tracker.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Ends the run of the tracker, if it started."""
        if self._tracker is not None:
            self._tracker.finish()

    def _start(self) -> GeneralTracker:
        raise NotImplementedError

    @property
    def _run_name(self) -> str:
        return scrub(self._config.wandb.name or self._config.model.name or self._output_dir.name)

    @property
    def _id_file(self) -> Path:
        return self._output_dir / f"{self.name}_id.txt"

    def _known_id(self) -> str | None:
        """What an earlier start of this run was called."""
        return self._id_file.read_text().strip() if self._id_file.is_file() else None


class WandbSink(TrackerSink):
    """Weights & Biases; `wandb.mode: offline` needs no account and no network."""

    name = "wandb"

    def _start(self) -> GeneralTracker:
        # Without it wandb uploads the diff of the repository and the command line.
        os.environ.setdefault("WANDB_DISABLE_CODE", "true")
        section = self._config.wandb
        Path(section.dir).mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker(
            section.project,
            entity=section.entity,
            name=self._run_name,
            tags=list(section.tags) or None,
            mode=section.mode,
            dir=section.dir,
            # A continued run keeps its id, so that `wandb.resume: allow` draws one curve.
            id=self._known_id() if section.resume != "never" else None,
            resume=section.resume,
            config=tracked_config(self._config),
        )
        tracker.start()
        self._id_file.write_text(tracker.run.id + "\n")
        if section.watch != "off":
            tracker.run.watch(self._module, log=section.watch, log_freq=self._config.trainer.logging_steps)
        return tracker


class TensorboardSink(TrackerSink):
    """TensorBoard's event files, in the run folder."""

    name = "tensorboard"

    def begin(self, step: int) -> None:
        continues = (self._output_dir / self.name).exists()
        super().begin(step)
        if continues:  # The next file says that what was written from this step on does not count.
            self._tracker.writer.close()
            self._tracker.writer.purge_step = step + 1 if step else 0

    def _start(self) -> GeneralTracker:
        is_new = not (self._output_dir / self.name).exists()
        tracker = TensorBoardTracker(self.name, self._output_dir)
        tracker.start()
        if is_new:
            tracker.store_init_configuration(flat_config(self._config))
        return tracker


class TrackioSink(TrackerSink):
    """trackio's local database, or the Space that its own variables name."""

    name = "trackio"

    def _start(self) -> GeneralTracker:
        # trackio continues a run by its name, which another folder's run may have too.
        name = self._known_id() or f"{self._run_name}-{secrets.token_hex(3)}"
        config = flat_config(self._config)
        tracker = TrackioTracker(self._config.wandb.project, name=name, resume="allow", config=config)
        tracker.start()
        self._id_file.write_text(name + "\n")
        return tracker


class MlflowSink(TrackerSink):
    """MLflow, at `MLFLOW_TRACKING_URI` or where it writes by default."""

    name = "mlflow"

    def _start(self) -> GeneralTracker:
        known = self._known_id()
        tracker = MLflowTracker(self._config.wandb.project, run_id=known, run_name=self._run_name)
        tracker.start()
        self._id_file.write_text(tracker.active_run.info.run_id + "\n")
        if known is None:  # Parameters cannot change.
            tracker.store_init_configuration(flat_config(self._config))
        return tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As for all; names have letters that MLflow accepts."""
        super().log({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}, step)


TRACKERS: dict[str, type[TrackerSink]] = {
    sink.name: sink for sink in (WandbSink, TensorboardSink, TrackioSink, MlflowSink)
}
"""What `trainer.report_to` can name, beside none and all."""


class Trackers:
    """The trackers of a run: one that raises anything, for want of network, account or disk or by its own bugs, is left
    out."""

    def __init__(self, sinks: list[TrackerSink], report: Callable[[str, str, str], None]) -> None:
        """`report` gets the name of a tracker that failed, a sentence for people, and the error."""
        self._sinks, self._report = sinks, report

    def begin(self, step: int) -> None:
        self._call(lambda sink: sink.begin(step), "did not start")

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._call(lambda sink: sink.log(values, step), "failed")

    def close(self) -> None:
        self._call(lambda sink: sink.close(), "failed")

    def _call(self, action: Callable[[TrackerSink], None], what: str) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                hint = "; wandb.mode: offline needs no account" if sink.name == "wandb" else ""
                sentence = f"{sink.name} {what} ({error}) and is left out{hint}"
                self._report(sink.name, sentence, f"{type(error).__name__}: {error}")


def choose_trackers(config: Config) -> list[str]:
    """The names of a run's trackers; `all` are those that are installed."""
    if "all" in config.requested_trackers:
        return [name for name in TRACKERS if is_installed(name)]
    return list(config.requested_trackers)


def tracked_config(config: Config) -> dict[str, Any]:
    """The sections that a tracker may know, without secrets."""
    return {name: value for name, value in scrub_config(config).items() if name in TRACKED_SECTIONS}


def flat_config(config: Config) -> dict[str, Any]:
    """`tracked_config` by dotted keys; what is no number and no text is written as in YAML."""
    return dict(_flatten(tracked_config(config)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value if isinstance(value, int | float | str) else show_value(value)))
    return found


def as_metrics(section: str, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `log.jsonl`, as `section/name`; those of a mapping in it as `section/name/key`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= as_metrics(f"{section}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[f"{section}/{name}"] = value
    return found
