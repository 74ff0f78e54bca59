"""Figures of the steps since the last log: kept on the device, read back in one transfer.

Per-step losses and norms stay device tensors until a logging point; then one stacked tensor crosses to the host and one
all-reduce sums it over ranks, so that training never waits for a scalar.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from neobert.train.interval import IntervalSums, StepRecord
from neobert.train.runtime import Runtime
from neobert.types import StepMetrics


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinity where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


class Evaluation(Protocol):
    """The figures of one evaluation."""

    @property
    def loss(self) -> float:
        """What `trainer.save_best` compares: the lower the better."""

    def as_line(self) -> dict[str, Any]:
        """Its fields in `log.jsonl`."""

    def as_values(self) -> dict[str, float]:
        """What trackers get, by names with a section in front, such as `eval/loss`."""

    def describe(self) -> str:
        """One line for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalMetrics:
    """Figures over every masked token of the evaluation documents."""

    loss: float
    """Mean cross entropy in nats per masked token."""

    accuracy: float
    num_targets: int
    num_tokens: int
    num_documents: int

    def as_line(self) -> dict[str, Any]:
        return asdict(self)

    def as_values(self) -> dict[str, float]:
        return {
            "eval/loss": self.loss,
            "eval/perplexity": perplexity(self.loss),
            "eval/accuracy": self.accuracy,
        }

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f} | ppl {perplexity(self.loss):.2f} | accuracy {self.accuracy:.2%} | "
            f"{self.num_targets:,} masked tokens of {self.num_documents:,} documents"
        )


class MetricWindow:
    """Collects steps; `read` turns those not yet read into records, `restart` begins the next logging interval."""

    def __init__(self, runtime: Runtime, labels: Sequence[str]) -> None:
        self._runtime, self._labels = runtime, labels
        self._pending: list[tuple[int, StepMetrics]] = []
        self._paused_at: float | None = None
        self.restore(IntervalSums())

    def restore(self, sums: IntervalSums) -> None:
        """Continues with sums that were saved; what was added since the last `read` is forgotten."""
        self._pending.clear()
        self._sums, self._started, self._paused_at = sums, time.perf_counter(), None

    @property
    def num_pending(self) -> int:
        """Steps whose figures were not read yet."""
        return len(self._pending)

    @property
    def sums(self) -> IntervalSums:
        """Of the interval up to the last `read`."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return replace(self._sums, seconds=self._sums.seconds + now - self._started)

    def add(self, step: int, metrics: StepMetrics) -> None:
        self._pending.append((step, metrics))

    def note_profiled_step(self) -> None:
        """One of the steps of the interval was slowed by the profiler."""
        self._sums = replace(self._sums, num_profiled=self._sums.num_profiled + 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps evaluation and saving out of tokens per second."""
        if self._paused_at is not None:  # Inside another pause.
            yield
            return
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - self._paused_at
            self._paused_at = None

    def read(self) -> list[StepRecord]:
        """Records of the steps added since the last read. Collective: every rank calls it at the same step."""
        if not self._pending:
            return []
        steps, metrics = zip(*self._pending)
        self._pending.clear()
        device = self._runtime.device
        losses = self._runtime.sum_on_device(torch.stack([m.loss_sum for m in metrics])).tolist()
        norms = torch.stack([m.grad_norm for m in metrics]).tolist()
        skipped = torch.stack([m.skipped for m in metrics]).tolist()
        has_counts = metrics[0].num_correct is not None
        correct: list[Any] = [None] * len(metrics)
        if has_counts:
            correct = self._runtime.sum_on_device(torch.stack([m.num_correct for m in metrics]).to(device)).tolist()
        # int64 sums wrap around like the digest itself does, so the signed view loses nothing.
        digests = [m.digest - 2**64 if m.digest >= 2**63 else m.digest for m in metrics]
        counts = self._runtime.sum_on_host([*digests, *(n for m in metrics for n in m.source_tokens)])
        width = len(metrics[0].source_tokens)
        records = [
            StepRecord(
                step=step,
                loss_sum=losses[n],
                num_correct=correct[n],
                grad_norm=norms[n],
                skipped=skipped[n],
                digest=counts[n] % 2**64,
                source_tokens=tuple(counts[len(steps) + n * width : len(steps) + (n + 1) * width]),
                metrics=metrics[n],
            )
            for n, step in enumerate(steps)
        ]
        for record in records:
            self._sums = self._sums.add(record, self._labels)
        return records

    def restart(self) -> IntervalSums:
        """The interval's sums, then a new interval. Call after `read`."""
        sums = self.sums
        self.restore(IntervalSums())
        return sums
