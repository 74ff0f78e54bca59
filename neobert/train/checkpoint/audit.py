"""Steps that are made again after a crash, compared with what the first attempt wrote.

A run that was killed leaves lines in `log.jsonl` for steps after its last checkpoint. The next start makes those steps
again. If it continues exactly, every one of them has the same batch, the same learning rate, the same loss and the
same gradient norm, to the last bit; if not, the first step that differs says where to look. The comparison costs
nothing: both lines are there anyway.

With another number of processes or another micro-batch, sums are added in another order: then batches are compared and
the largest difference of a loss is reported.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neobert.errors import UserError

Line = dict[str, Any]

TURNS = ("saved", "rolled_back", "source_switched", "order_restarted")
"""Events that say which attempt the last steps belong to."""

EXACT = ("batch_digest", "lr", "loss_hex", "grad_norm_hex")
"""What must repeat, in the order in which a difference is looked for: the cause before its effects."""


class ReplayDiverged(UserError):
    """`trainer.replay_audit: strict` and a repeated step differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """How a process splits a batch; another one rounds differently."""

    processes: int
    micro_batch_rows: int
    engine: str = "ddp"
    """Of `neobert.train.processes.parallel.ENGINES`."""

    def __str__(self) -> str:
        sharded = "" if self.engine == "ddp" else f" by {self.engine}"
        return f"{self.processes} process(es) x {self.micro_batch_rows} rows{sharded}"


def read_layout(events: Sequence[Line]) -> RankLayout | None:
    """The layout of the process that wrote the last event; None when there is no such event."""
    if not events or "micro_batch_rows" not in events[-1]:
        return None
    last = events[-1]
    return RankLayout(
        processes=last["processes"], micro_batch_rows=last["micro_batch_rows"], engine=last.get("engine", "ddp")
    )


def is_first_attempt(events: Sequence[Line]) -> bool:
    """Whether steps after the last checkpoint will be made again with the same rows.

    Not when this start reads another source. Not when the run went back to a checkpoint and was killed before the next
    save either: the rows that it then skipped are known to no checkpoint, so the next start meets the bad rows once
    more and goes back again.
    """
    turns = [event["event"] for event in events if event["event"] in TURNS]
    return turns[-1:] in ([], ["saved"])


def list_last_events(newest_first: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last event that says which attempt the last steps belong to, and the last one of all."""
    last: list[dict[str, Any]] = []
    for event in newest_first:
        if not last or event["event"] in TURNS:
            last.insert(0, event)
        if event["event"] in TURNS:
            break
    return last


class ReplayAudit:
    """Waits for the steps of `old_lines` to be made again."""

    def __init__(self, old_lines: Iterable[Line], *, before: RankLayout, now: RankLayout) -> None:
        self._old = {line["step"]: line for line in old_lines}
        self._before, self._now = before, now
        self._fields = EXACT if before == now else EXACT[:1]
        self._num_repeated = 0
        self._largest_difference = 0.0
        self.num_different = 0
        self.first_difference: str | None = None

    @property
    def done(self) -> bool:
        """Whether every old step was made again."""
        return self._num_repeated == len(self._old)

    def compare(self, lines: Iterable[Line]) -> str | None:
        """Takes step lines as they are written; the first difference of all, as text, when it is among them."""
        known = self.first_difference
        for line in lines:
            old = self._old.get(line["step"])
            if old is None:
                continue
            self._num_repeated += 1
            self._largest_difference = max(self._largest_difference, _loss_difference(old, line))
            changed = [name for name in self._fields if old.get(name) != line[name]]
            self.num_different += bool(changed)
            if changed and self.first_difference is None:
                name = changed[0]
                self.first_difference = (
                    f"replay audit: step {line['step']} differs from its first attempt: {name} was {old.get(name)!r} "
                    f"and is {line[name]!r}{_READABLE.get(name, lambda *_: '')(old, line)}"
                )
        return self.first_difference if known is None else None

    def verdict(self) -> str:
        """One line about all steps compared so far."""
        compared = f"{self._num_repeated - self.num_different}/{self._num_repeated}"
        rest = "" if self.done else f" (of {len(self._old)} in the log)"
        if self._before == self._now:
            return f"replay audit: {compared} steps bit-identical{rest}"
        return (
            f"replay audit: {compared} batches identical{rest}; the layout changed from {self._before} to {self._now}, "
            f"so losses may differ in rounding: by at most {self._largest_difference:.1e}"
        )


def _loss_difference(old: Line, new: Line) -> float:
    difference = float.fromhex(old.get("loss_hex", "nan")) - float.fromhex(new["loss_hex"])
    return abs(difference) if math.isfinite(difference) else 0.0


_READABLE = {
    "batch_digest": lambda old, new: " (other rows or masks)",
    "lr": lambda old, new: " (the schedule changed)",
    "loss_hex": lambda old, new: f" ({old.get('loss')} and {new['loss']})",
    "grad_norm_hex": lambda old, new: f" ({old.get('grad_norm')} and {new['grad_norm']})",
}
"""The same as text, by the field that differs."""
