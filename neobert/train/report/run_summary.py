"""What a report says of a run in tables: how far it is, what it was configured to do, and what it runs on."""

import dataclasses
import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError, load_saved_config
from neobert.config.schema import Config
from neobert.objectives.table import choose_objective
from neobert.secrets import is_secret_name, scrub
from neobert.train.report.curves import Axes
from neobert.train.report.log_reader import Line, RunLog, as_number

Table = dict[str, str]
"""Name -> value, both as text."""

_RUNNING, _OVER = ("started", "resumed"), ("finished", "stopped", "numbers")


@dataclass(frozen=True, slots=True)
class SavedConfig:
    """The `config.yaml` of a run."""

    config: Config | None
    """None where it cannot be read."""

    values: Table = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    """Keys whose value is not the default."""

    problem: str | None = None


def read_config(path: Path) -> SavedConfig:
    """The values of a saved config, without secrets."""
    try:
        config = load_saved_config(path)
    except (ConfigError, OSError, ValueError) as error:
        return SavedConfig(None, problem=scrub(str(error)))
    return describe_config(config)


def describe_config(config: Config) -> SavedConfig:
    """As `read_config`, of the config that was saved."""
    found = {key: entry.value_in(config) for key, entry in FIELDS.items() if not is_secret_name(key)}
    changed = tuple(key for key, value in found.items() if value != FIELDS[key].default)
    return SavedConfig(config, {key: scrub(_show(value)) for key, value in found.items()}, changed)


@functools.cache
def list_defaults() -> Table:
    """The default of every key, as text."""
    return {key: _show(entry.default) for key, entry in FIELDS.items()}


def _show(value: Any) -> str:
    """A value about as it is written in a config."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return "{" + ", ".join(f"{name}: {_show(x)}" for name, x in items.items() if x is not None) + "}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, list | tuple) else str(value)


def summarise_run(log: RunLog, events: Sequence[Line], axes: Axes) -> Table:
    """How a run is doing, with the numbers of its last lines."""
    logged, last = log.lines.get("log", []), log.last_step
    seconds = axes.seconds_at([last])
    found = {"state": describe_state(events), "steps": f"{last:,}", "tokens": f"{axes.tokens_at([last])[0]:,}"}
    if seconds is not None and logged:
        found["training time, without evaluations and saves"] = show_seconds(seconds[0])
        spans = [(as_number(x.get("seconds")) or 0.0, as_number(x.get("tokens_per_second")) or 0.0) for x in logged]
        total, trained = sum(span for span, _ in spans), sum(span * rate for span, rate in spans)
        found["tokens a second, mean"] = f"{trained / max(total, 1e-9):,.0f}"
        found["peak memory"] = f"{max(as_number(x.get('peak_memory_bytes')) or 0 for x in logged) / 2**30:.2f} GiB"
        found["train loss, last interval"] = _show_number(logged[-1].get("loss"))
    for kind, label in (("eval", "held-out"), ("eval_ema", "held-out, averaged weights")):
        found |= _summarise_evaluations(label, log.lines.get(kind, []))
    saves = [event for event in events if event.get("event") == "saved"]
    if saves:
        found["checkpoints written"] = f"{len(saves):,}, the last at step {saves[-1]['step']:,}"
    return found


def _summarise_evaluations(label: str, lines: Sequence[Line]) -> Table:
    losses = [(loss, x["step"]) for x in lines if (loss := as_number(x.get("loss"))) is not None]
    found = {}
    if losses:
        best = min(losses)
        found[f"{label} loss, last"] = f"{losses[-1][0]:.4f} at step {losses[-1][1]:,}"
        found[f"{label} loss, lowest"] = f"{best[0]:.4f} at step {best[1]:,}"
    for name in ("accuracy", "score"):
        value = as_number(lines[-1].get(name)) if lines else None
        if value is not None:
            found[f"{label} {name}, last"] = f"{value:.4f}"
    return found


def describe_state(events: Sequence[Line]) -> str:
    """Whether a run is over, from what its last start noted."""
    turns = [event for event in events if event.get("event") in (*_RUNNING, *_OVER)]
    if not turns:
        return "unknown: no event says that it started"
    last = turns[-1]
    name, step = last["event"], f"{last['step']:,}"
    if name == "finished":
        return f"finished at step {step}" + ("" if last.get("saved") else ", without a last checkpoint")
    if name == "stopped":
        return scrub(f"stopped at step {step} by {last.get('cause')}")
    if name == "numbers":
        return scrub(f"stopped at step {step}: {last.get('verdict')}")
    return f"{name} at step {step}, and running when this page was written, or killed"


def read_environment(events: Sequence[Line]) -> tuple[Table, Table]:
    """What the run runs on, and its model, as its last start noted them; empty for runs that noted nothing."""
    noted = next((event for event in reversed(events) if event.get("event") == "environment"), {})
    return _as_table(noted.get("machine")), _as_table(noted.get("model"))


def _as_table(found: Any) -> Table:
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(name).replace("_", " "): scrub(f"{x:,}" if isinstance(x, int) else _show(x)) for name, x in items}


def list_commands(folder: Path, config: Config | None, events: Sequence[Line]) -> list[str]:
    """What to type next: what the run said when it finished, or else how to continue it."""
    turns = [event for event in events if event.get("event") in (*_RUNNING, *_OVER)]
    run = shlex.quote(str(folder))
    commands = []
    if turns and turns[-1]["event"] == "finished" and isinstance(turns[-1].get("next"), list) and turns[-1]["next"]:
        commands = [scrub(str(command)) for command in turns[-1]["next"]]
    elif config is not None:
        name = choose_objective(config).command
        path = shlex.quote(str(folder / "config.yaml"))
        commands = [f"neobert {name} {path} --trainer.resume_from_checkpoint latest"]
    return [*commands, f"neobert report {run} ANOTHER_RUN --output comparison.html"]


def _show_number(value: Any) -> str:
    number = as_number(value)
    return "not finite" if number is None else f"{number:.4f}"


def describe_learning(log: RunLog) -> str:
    """What the lines of a log say was learned: the first and the last number of each kind."""
    parts = []
    for kind, label in (("log", "training loss"), ("eval", "held-out loss")):
        losses = [x for line in log.lines.get(kind, []) if (x := as_number(line.get("loss"))) is not None]
        ends = [f"{loss:.4f}" for loss in (*losses[:1], *losses[1:][-1:])]
        parts += [f"{label} {' -> '.join(ends)}"] if ends else []
    last = (log.lines.get("eval") or [{}])[-1]
    parts += [f"{name} {x:.4f}" for name in ("accuracy", "score") if (x := as_number(last.get(name))) is not None]
    return ", ".join(parts)


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
