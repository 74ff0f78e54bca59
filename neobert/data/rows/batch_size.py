"""Rows of every step as a pure function of its number, for a batch that grows in the first steps.

From R0 rows at step 0 the batch grows to R rows at step W, by the greatest common divisor u of the two at a time:

    rows(s) = R0 + u * floor(s * n / W)   s < W, n = (R - R0) / u
    rows(s) = R                           s >= W

Nothing else decides, so micro-batch and processes may change as long as they divide u. Worked example, R0 = 4, R = 16,
W = 6: u = 4, n = 3, rows 4 4 8 8 12 12 | 16 16 ...; before steps 0, 1, 2, ...: 0 4 8 16 24 36 | 48 64 ... rows.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

from neobert.config.schema import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSchedule:
    """Rows of each optimizer step, over all processes and micro-batches."""

    rows: int
    """R, the full batch."""

    start_rows: int
    """R0; at most R."""

    warmup_steps: int
    """W; 0 without a warm-up."""

    @property
    def unit(self) -> int:
        """u: every step has a multiple of so many rows."""
        return math.gcd(self.rows, self.start_rows)

    def __call__(self, step: int) -> int:
        """Rows of step `step`, counted from 0."""
        if step >= self.warmup_steps:
            return self.rows
        return self.start_rows + (self.rows - self.start_rows) * step // self.warmup_steps // self.unit * self.unit

    def rows_before(self, step: int) -> int:
        """Rows of the steps 0 to `step - 1` together."""
        warm = min(step, self.warmup_steps)
        num_raises = (self.rows - self.start_rows) // self.unit
        # The j-th raise comes at the first step s with s * n >= j * W and counts in every step from there on.
        raised = sum(max(0, warm - -(-j * self.warmup_steps // num_raises)) for j in range(1, num_raises + 1))
        return self.start_rows * warm + self.unit * raised + self.rows * (step - warm)

    def steps_for(self, amount: float, *, per_row: int = 1) -> int:
        """The fewest steps that take at least this amount of rows, or of anything of which a row has `per_row`."""
        during = self.rows_before(self.warmup_steps) * per_row
        if amount > during:
            return self.warmup_steps + math.ceil((amount - during) / (self.rows * per_row))
        return bisect_left(range(self.warmup_steps + 1), amount, key=lambda step: self.rows_before(step) * per_row)


def constant_batch(rows: int) -> BatchSchedule:
    """The same number of rows in every step."""
    return BatchSchedule(rows=rows, start_rows=rows, warmup_steps=0)


def build_batch_schedule(config: Config, rows_per_step: int) -> BatchSchedule:
    """The schedule of a run whose full batch has `rows_per_step` rows."""
    start, steps = config.trainer.batch_size_warmup_start, config.trainer.batch_size_warmup_steps
    if start is None or steps is None:
        return constant_batch(rows_per_step)
    return BatchSchedule(rows=rows_per_step, start_rows=start, warmup_steps=steps)
