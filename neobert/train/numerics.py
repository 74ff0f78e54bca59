"""Steps that are skipped, and when there are too many of them.

Whether a step is skipped is decided on the device (`Guard.judge`): its gradient is not finite or, with
`trainer.skip_spikes`, its loss or gradient norm is far above those of the last steps that counted. The values compared
with never hold those of a skipped step, so that one spike is one skipped step and not a long series.

The host learns of it one step late (`Guard.add`): the flag of a step is copied while the next one runs, and nothing
waits. All ranks see the same flags at the same steps, so whatever follows from them needs no agreement.
"""

import math
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neobert.config.schema_trainer import TrainerSection
from neobert.train.hardware.machine import Runtime
from neobert.train.processes.agreement import describe_ranges, join_ranges
from neobert.train.step import StepMetrics, not_finite
from neobert.types import TrainState

SPIKE_WINDOW = 128
"""Steps whose mean and deviation a step is compared with; before that many, nothing is a spike."""

RECENT_STEPS = 1000
RECENT_FRACTION = 0.01
"""More than this fraction of the recent steps skipped stops the run, even when never many in a row."""


class LateFlag:
    """A bool scalar on its way from the device to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = flag
        if flag.device.type == "cuda":
            self._host = torch.empty_like(flag, device="cpu", pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """The value; waits until the device has come to it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.item())


class Guard:
    """Decides about skipping, and counts."""

    def __init__(self, runtime: Runtime, section: TrainerSection) -> None:
        self._runtime, self._section = runtime, section
        self.begin(TrainState())

    def begin(self, state: TrainState) -> None:
        """Continues from what was saved with `state`."""
        self._known_step = state.step
        self._skipped = list(state.skipped_steps)
        self._pending: deque[tuple[int, LateFlag]] = deque()
        # Entries that were not filled yet are NaN, and no comparison with their mean is true.
        values = [[math.nan, math.nan]] * SPIKE_WINDOW + state.spike_window
        window_N2 = torch.tensor(values[-SPIKE_WINDOW:], dtype=torch.float32)
        self._window_2N = window_N2.T.contiguous().to(self._runtime.device)

    def judge(self, loss_sum: Tensor, grad_norm: Tensor, *, num_targets: int) -> Tensor:
        """Whether to skip a step, as a bool scalar on the device, equal on all ranks.

        Args:
            loss_sum: of this rank.
            grad_norm: of the reduced gradient.
            num_targets: over all ranks.
        """
        bad = not_finite(loss_sum, grad_norm)
        if self._section.skip_spikes is None or num_targets == 0:
            return bad
        # The norm is the same on all ranks, and yet summed with the loss: one rounding apart would be two decisions.
        local_2 = torch.stack([loss_sum / num_targets, grad_norm / self._runtime.world])
        values_2 = self._runtime.sum_on_device(local_2)
        limits_2 = self._window_2N.mean(dim=1) + self._section.skip_spikes * self._window_2N.std(dim=1)
        skip = bad | (values_2 > limits_2).any()
        moved_2N = torch.cat([self._window_2N[:, 1:], values_2[:, None]], dim=1)
        self._window_2N = torch.where(skip, self._window_2N, moved_2N)
        return skip

    def add(self, step: int, skipped: Tensor) -> None:
        """Takes the flag of a step, and reads the flags of those before it."""
        self._pending.append((step, LateFlag(skipped)))
        self._read(leave=1)

    def flush(self) -> None:
        """Reads all flags; waits for the device."""
        self._read(leave=0)

    def add_skipped(self, state: TrainState) -> TrainState:
        """`state` with what must be saved of the skipped steps; waits for the device."""
        self.flush()
        window = [values for values in self._window_2N.T.tolist() if not math.isnan(values[0])]
        return replace(state, skipped_steps=list(self._skipped), spike_window=window)

    @property
    def num_in_row(self) -> int:
        """Skipped steps in a row up to the last one that was read."""
        skipped, count = set(self._skipped), 0
        while self._known_step - count in skipped:
            count += 1
        return count

    @property
    def first_skipped(self) -> int | None:
        """The step with which the skipped ones in a row started, else the first of the recent ones."""
        if in_row := self.num_in_row:
            return self._known_step - in_row + 1
        return self._skipped[0] if self._skipped else None

    @property
    def verdict(self) -> str | None:
        """Why the run cannot continue, None when it can."""
        if (in_row := self.num_in_row) >= self._section.max_bad_steps:
            return f"trainer.max_bad_steps: {in_row} steps in a row were skipped, the last is {self._known_step}"
        if len(self._skipped) > RECENT_FRACTION * RECENT_STEPS:
            return (
                f"trainer.max_bad_steps: {len(self._skipped)} of the last {RECENT_STEPS} steps were skipped, more than "
                f"{RECENT_FRACTION:.0%}"
            )
        return None

    def _read(self, *, leave: int) -> None:
        while len(self._pending) > leave:
            self._known_step, flag = self._pending.popleft()
            if flag.read():
                self._skipped.append(self._known_step)
        self._skipped = [step for step in self._skipped if step > self._known_step - RECENT_STEPS]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedStep:
    """A step that was skipped, for the record."""

    step: int
    loss: float
    grad_norm: float
    rows: list[tuple[int, int]]
    """Half-open ranges of the global row numbers of the step."""

    suspects: list[tuple[int, int]]
    """Those of the micro-batches whose loss is not finite."""

    def describe(self) -> str:
        """One line for people."""
        text = f"step {self.step} skipped: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}"
        text += f", rows {describe_ranges(self.rows)}"
        return text + (f"; the loss of rows {describe_ranges(self.suspects)} is not finite" if self.suspects else "")


def build_skipped_step(
    runtime: Runtime, *, step: int, loss: float, grad_norm: float, metrics: StepMetrics
) -> SkippedStep:
    """Collective: rank 0, which records it, gathers the step's rows from all ranks."""
    finite = torch.isfinite(metrics.result.micro_losses).tolist()
    keys = [micro.tolist() for micro in metrics.row_keys]
    gathered = runtime.gather_to_main([(key, good) for row, good in zip(keys, finite) for key in row])
    rows = [item for rank in gathered or () for item in rank]
    return SkippedStep(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        rows=join_ranges(key for key, _ in rows),
        suspects=join_ranges(key for key, good in rows if not good),
    )
