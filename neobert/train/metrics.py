"""Figures of the steps since the last log: kept on the device, read back in one transfer.

Per-step losses and norms stay device tensors until a logging point; then one stacked tensor crosses to the host and one
all-reduce sums it over ranks, so that training never waits for a scalar.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step as numbers, summed over ranks."""

    step: int
    loss_sum: float
    num_correct: int | None
    grad_norm: float
    skipped: bool
    digest: int
    metrics: StepMetrics

    @property
    def loss(self) -> float:
        """Mean in nats per masked token; 0 for a step without any."""
        return float(np.float32(self.loss_sum) / np.float32(max(self.metrics.num_targets, 1)))

    def as_line(self) -> dict[str, Any]:
        """The step's line of `log.jsonl`; `*_hex` are exact, for comparing runs bit for bit."""
        line = {
            "kind": "step",
            "step": self.step,
            "loss": self.loss,
            "loss_hex": self.loss.hex(),
            "grad_norm": self.grad_norm,
            "grad_norm_hex": self.grad_norm.hex(),
            "lr": self.metrics.lr,
            "num_tokens": self.metrics.num_tokens,
            "num_targets": self.metrics.num_targets,
            "batch_digest": f"{self.digest:016x}",
        }
        return {**line, "skipped": True} if self.skipped else line


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What the steps of a logging interval come to; those that were skipped count in time and tokens only."""

    loss: float
    """Mean in nats per predicted token, over all ranks; NaN where every step was skipped."""

    accuracy: float
    """Share of the predictions that are right; meant only where they were counted."""

    grad_norm: float | None
    """Of the last step that was not skipped."""

    lr: float
    num_tokens: int
    num_skipped: int
    tokens_per_second: float
    data_wait: float
    """Share of the time."""

    packing_fill: float
    """Share of the slots that hold real tokens."""

    attended_length: float
    """Mean length of the document of a token."""

    predicted_fraction: float
    """Predicted tokens to all."""


def summarise(records: list[StepRecord], seconds: float) -> Interval:
    """The figures of at least one step and its seconds of training."""
    tokens = sum(r.metrics.num_tokens for r in records)
    counted = [r for r in records if not r.skipped]
    targets = max(sum(r.metrics.num_targets for r in counted), 1)
    return Interval(
        loss=sum(r.loss_sum for r in counted) / targets if counted else math.nan,
        accuracy=sum(r.num_correct or 0 for r in counted) / targets,
        grad_norm=counted[-1].grad_norm if counted else None,
        lr=records[-1].metrics.lr,
        num_tokens=tokens,
        num_skipped=len(records) - len(counted),
        tokens_per_second=tokens / max(seconds, 1e-9),
        data_wait=sum(r.metrics.data_wait for r in records) / max(seconds, 1e-9),
        packing_fill=tokens / sum(r.metrics.num_slots for r in records),
        attended_length=sum(r.metrics.attended_tokens for r in records) / tokens,
        predicted_fraction=sum(r.metrics.num_targets for r in records) / tokens,
    )


@dataclass(kw_only=True, slots=True)
class MetricWindow:
    """Collects steps; `read` turns those not yet read into records, `restart` begins the next logging interval."""

    runtime: Runtime
    pending: list[tuple[int, StepMetrics]] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    """Steps of the interval that were read already."""

    _started: float = field(default_factory=time.perf_counter)
    _paused_seconds: float = 0.0

    @property
    def num_pending(self) -> int:
        """Steps whose figures were not read yet."""
        return len(self.pending)

    def add(self, step: int, metrics: StepMetrics) -> None:
        self.pending.append((step, metrics))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps evaluation and saving out of tokens per second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - start

    def read(self) -> list[StepRecord]:
        """Records of the steps added since the last read. Collective: every rank calls it at the same step."""
        if not self.pending:
            return []
        steps, metrics = zip(*self.pending)
        self.pending.clear()
        device = self.runtime.device
        losses = self.runtime.sum_on_device(torch.stack([m.loss_sum for m in metrics])).tolist()
        norms = torch.stack([m.grad_norm for m in metrics]).tolist()
        skipped = torch.stack([m.skipped for m in metrics]).tolist()
        has_counts = metrics[0].num_correct is not None
        correct: list[Any] = [None] * len(metrics)
        if has_counts:
            correct = self.runtime.sum_on_device(torch.stack([m.num_correct for m in metrics]).to(device)).tolist()
        # int64 sums wrap around like the digest itself does, so the signed view loses nothing.
        digests = self.runtime.sum_on_host([m.digest - 2**64 if m.digest >= 2**63 else m.digest for m in metrics])
        new = [
            StepRecord(
                step=step,
                loss_sum=loss,
                num_correct=count,
                grad_norm=norm,
                skipped=skip,
                digest=digest % 2**64,
                metrics=metric,
            )
            for step, metric, loss, norm, skip, count, digest in zip(
                steps, metrics, losses, norms, skipped, correct, digests
            )
        ]
        self.records.extend(new)
        return new

    def restart(self) -> tuple[list[StepRecord], float]:
        """The interval's records and its seconds of training, then a new interval. Call after `read`."""
        now = time.perf_counter()
        seconds = now - self._started - self._paused_seconds
        records, self.records = self.records, []
        self._started, self._paused_seconds = now, 0.0
        return records, seconds
