"""Metrics of the steps since the last log: kept on the device, read back in one transfer.

Per-step losses and norms stay device tensors until a logging point; then one stacked tensor crosses to the host and one
all-reduce sums it over ranks, so that training never waits for a scalar.

The metrics of a logging interval: sums over the steps since the last log line, and what they come to.

The sums are a part of the saved state. They grow by one step at a time, so a run that resumes from saved sums adds the
same numbers in the same order as one that was never stopped, and its next log line is the same bit for bit (all but
what is measured with a clock).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from neobert.train.hardware.machine import Runtime
from neobert.train.step import StepMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step as numbers, summed over ranks."""

    step: int
    loss_sum: float
    z_sum: float
    """The part of `loss_sum` that is z-loss."""

    num_correct: int | None
    grad_norm: float
    skipped: bool
    digest: int
    source_tokens: tuple[int, ...]
    """Real tokens of each source."""

    metrics: StepMetrics

    @property
    def loss(self) -> float:
        """Mean in nats per masked token; 0 for a step without any."""
        return float(np.float32(self.loss_sum) / np.float32(max(self.metrics.counts.num_targets, 1)))

    def as_line(self) -> dict[str, object]:
        """The step's line of `log.jsonl`; `*_hex` are exact, for comparing runs bit for bit."""
        line = {
            "kind": "step",
            "step": self.step,
            "loss": self.loss,
            "loss_hex": self.loss.hex(),
            "grad_norm": self.grad_norm,
            "grad_norm_hex": self.grad_norm.hex(),
            "lr": self.metrics.lr,
            "num_tokens": self.metrics.counts.num_tokens,
            "num_targets": self.metrics.counts.num_targets,
            "batch_digest": f"{self.digest:016x}",
        }
        return {**line, "skipped": True} if self.skipped else line


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalSums:
    """Sums over the steps since the last log line and over all ranks; the times are this rank's."""

    first_step: int = 0
    """The first step in the sums; 0 without any."""

    num_steps: int = 0
    num_skipped: int = 0
    num_profiled: int = 0
    num_tokens: int = 0
    num_slots: int = 0
    num_targets: int = 0
    attended_tokens: int = 0
    loss_sum: float = 0.0
    """Of the steps that were not skipped, like the next four."""

    z_sum: float = 0.0
    num_counted_targets: int = 0
    num_correct: int = 0
    grad_norm: float | None = None
    """Of the last step that was not skipped."""

    lr: float = 0.0
    """Of the last step."""

    data_wait: float = 0.0
    """Seconds."""

    seconds: float = 0.0
    """Of training, without evaluations and saves."""

    source_tokens: dict[str, int] = field(default_factory=dict)
    """By the label of the source."""

    def add(self, record: StepRecord, labels: Sequence[str]) -> "IntervalSums":
        """The sums with one more step; `labels` are those of the sources."""
        metrics, counts, counted = record.metrics, record.metrics.counts, not record.skipped
        tokens = dict(self.source_tokens)
        for label, count in zip(labels, record.source_tokens):
            tokens[label] = tokens.get(label, 0) + count
        return replace(
            self,
            first_step=self.first_step or record.step,
            num_steps=self.num_steps + 1,
            num_skipped=self.num_skipped + record.skipped,
            num_tokens=self.num_tokens + counts.num_tokens,
            num_slots=self.num_slots + counts.num_slots,
            num_targets=self.num_targets + counts.num_targets,
            attended_tokens=self.attended_tokens + counts.attended_tokens,
            loss_sum=self.loss_sum + record.loss_sum if counted else self.loss_sum,
            z_sum=self.z_sum + record.z_sum if counted else self.z_sum,
            num_counted_targets=self.num_counted_targets + counted * counts.num_targets,
            num_correct=self.num_correct + counted * (record.num_correct or 0),
            grad_norm=record.grad_norm if counted else self.grad_norm,
            lr=metrics.lr,
            data_wait=self.data_wait + metrics.data_wait,
            source_tokens=tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What the steps of a logging interval come to; those that were skipped count in time and tokens only."""

    loss: float
    """Mean in nats per predicted token, over all ranks; NaN where every step was skipped."""

    z_loss: float
    """The part of `loss` that is z-loss."""

    accuracy: float
    """Fraction of the predictions that are right; meant only where they were counted."""

    grad_norm: float | None
    """Of the last step that was not skipped."""

    lr: float
    num_tokens: int
    num_skipped: int
    tokens_per_second: float
    data_wait: float
    """Fraction of the time."""

    packing_fill: float
    """Fraction of the slots that hold real tokens."""

    attended_length: float
    """Mean length of the document of a token."""

    predicted_fraction: float
    """Predicted tokens to all."""


def summarise(sums: IntervalSums) -> Interval:
    """The metrics of at least one step."""
    targets, seconds = max(sums.num_counted_targets, 1), max(sums.seconds, 1e-9)
    return Interval(
        loss=sums.loss_sum / targets if sums.num_steps > sums.num_skipped else math.nan,
        z_loss=sums.z_sum / targets,
        accuracy=sums.num_correct / targets,
        grad_norm=sums.grad_norm,
        lr=sums.lr,
        num_tokens=sums.num_tokens,
        num_skipped=sums.num_skipped,
        tokens_per_second=sums.num_tokens / seconds,
        data_wait=sums.data_wait / seconds,
        packing_fill=sums.num_tokens / sums.num_slots,
        attended_length=sums.attended_tokens / sums.num_tokens,
        predicted_fraction=sums.num_targets / sums.num_tokens,
    )


class MetricWindow:
    """Collects steps; `read` turns those not yet read into records, `restart` starts the next logging interval."""

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
        """Steps whose metrics were not read yet."""
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
        results = [m.result for m in metrics]
        losses = self._runtime.sum_on_device(torch.stack([r.loss_sum for r in results])).tolist()
        norms = torch.stack([r.grad_norm for r in results]).tolist()
        skipped = torch.stack([r.skipped for r in results]).tolist()
        has_counts = results[0].num_correct is not None
        z_sums = [0.0] * len(metrics)
        if results[0].z_sum is not None:
            z_sums = self._runtime.sum_on_device(torch.stack([r.z_sum for r in results])).tolist()
        correct: list[Any] = [None] * len(metrics)
        if has_counts:
            correct = self._runtime.sum_on_device(torch.stack([r.num_correct for r in results]).to(device)).tolist()
        # int64 sums wrap around like the digest itself does, so the signed view loses nothing.
        digests = [m.digest - 2**64 if m.digest >= 2**63 else m.digest for m in metrics]
        counts = self._runtime.sum_on_host([*digests, *(n for m in metrics for n in m.source_tokens)])
        width = len(metrics[0].source_tokens)
        records = [
            StepRecord(
                step=step,
                loss_sum=losses[n],
                z_sum=z_sums[n],
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


def describe_notes(values: Mapping[str, float]) -> list[str]:
    """What is beside the progress bar of a logging interval."""
    found = [f"loss {values['train/loss']:.4f}"]
    if "train/perplexity" in values:
        found.append(f"ppl {values['train/perplexity']:.2f}")
    return [*found, f"{values['train/tokens_per_sec']:,.0f} tok/s"]


def describe_values(step: int, values: Mapping[str, float]) -> str:
    """The line of a logging interval on the console."""
    parts = [f"train step {step:>7,}", f"loss {values['train/loss']:.4f}"]
    if "train/perplexity" in values:
        parts.append(f"ppl {values['train/perplexity']:.2f}")
    parts.append(f"lr {values['train/learning_rate']:.2e}")
    if "train/grad_norm" in values:
        parts.append(f"grad {values['train/grad_norm']:.3f}")
    if "train/accuracy" in values:
        parts.append(f"accuracy {values['train/accuracy']:.2%}")
    if "train/skipped_steps" in values:
        parts.append(f"skipped {values['train/skipped_steps']}")
    slowed = f" (slowed: {values['train/profiled_steps']} steps profiled)" if "train/profiled_steps" in values else ""
    parts.append(f"{values['train/tokens_per_sec']:,.0f} tokens/s{slowed}")
    if "train/mfu" in values:
        parts.append(f"mfu {values['train/mfu']:.1%}")
    parts.append(f"data wait {values['train/data_wait']:.1%}")
    if "train/partial_interval_steps" in values:
        parts.append(f"of the last {values['train/partial_interval_steps']} steps only (resumed in between)")
    return " | ".join(parts)
