"""The axis of losses of a picture, wherever it lies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MARGIN = 0.05
"""On both sides: of the range, or in nats where all losses are equal."""


@dataclass(frozen=True, slots=True)
class LossAxis:
    """Called with a loss, its coordinate between `start` (of `low`) and `end` (of `high`)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, loss: float) -> float:
        return self.start + (self.end - self.start) * (loss - self.low) / (self.high - self.low)

    def ticks(self, count: int = 6) -> Iterator[tuple[float, str]]:
        """Coordinates and labels, evenly from end to end."""
        for number in range(count):
            loss = self.low + (self.high - self.low) * number / (count - 1)
            yield self(loss), f"{loss:.2f}"


def build_axis(losses: Sequence[float], start: float, end: float) -> LossAxis:
    """An axis that holds all `losses` with a margin; `start` above `end` is one that points up."""
    low, high = min(losses), max(losses)
    margin = _MARGIN * (high - low) or _MARGIN
    return LossAxis(low - margin, high + margin, start, end)
