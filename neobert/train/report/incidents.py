"""What happened to a run beside training: lines of `events.jsonl`, for people, at their step."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neobert.secrets import scrub
from neobert.train.report.curves import Axes
from neobert.train.report.log_reader import Line, as_number

MOST_INCIDENTS = 500
"""That a page lists of a run."""

_MOST_CHARACTERS = 400

_UNEVENTFUL = {"started", "saved", "environment", "finished"}
"""What happens to every run."""

_FAULTS = {
    "bad_records",
    "health",
    "numbers",
    "out_of_memory",
    "prune_failed",
    "ranks_differ",
    "replay_differs",
    "report_failed",
    "rolled_back",
    "save_failed",
    "skipped_step",
}
"""What went wrong; all else is a note."""

_COMMON = {"event", "step", "time", "processes", "micro_batch_rows"}
"""Fields of every event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    step: int
    tokens: int
    seconds: float | None
    time: float | None
    """Since the epoch."""

    name: str
    details: str
    is_fault: bool


def list_incidents(events: Sequence[Line], axes: Axes) -> tuple[list[Incident], int]:
    """The incidents of a run in the order in which they were noted, and how many more there are than are listed:
    beyond `MOST_INCIDENTS` the first and the last ones stay."""
    found = [(event, name, details) for event in events for name, details in _describe(event)]
    half = MOST_INCIDENTS // 2
    listed = found if len(found) <= MOST_INCIDENTS else [*found[:half], *found[-half:]]
    steps = [event["step"] for event, _, _ in listed]
    tokens, seconds = axes.tokens_at(steps), axes.seconds_at(steps)
    incidents = [
        Incident(
            step=event["step"],
            tokens=tokens[i],
            seconds=None if seconds is None else seconds[i],
            time=as_number(event.get("time")),
            name=name.replace("_", " "),
            details=scrub(details)[:_MOST_CHARACTERS],
            is_fault=name in _FAULTS,
        )
        for i, (event, name, details) in enumerate(listed)
    ]
    return incidents, len(found) - len(listed)


def _describe(event: Line) -> Iterator[tuple[str, str]]:
    """Name and details of the incidents of an event."""
    name = str(event.get("event"))
    if name == "inventory":
        yield from (("bad_records", text) for text in _faulty_files(event))
    elif name not in _UNEVENTFUL:
        details = {key: value for key, value in event.items() if key not in _COMMON and value not in (None, [], "")}
        yield name, ", ".join(f"{key.replace('_', ' ')}: {_show(value)}" for key, value in details.items())


def _faulty_files(event: Line) -> Iterator[str]:
    files = event.get("files")
    for file in files if isinstance(files, list) else ():
        if not isinstance(file, dict):
            continue
        if file.get("is_fault"):
            yield f"{file.get('url')} is not read: {file.get('problem')}"
        elif file.get("num_bad"):
            yield f"{file.get('url')}: {file['num_bad']} of {file.get('num_sampled')} records of a sample are bad"


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
