"""Which steps of a run are made again, and with what probability a planted change is found: pure functions.

A **segment** is what lies between two checkpoints that are kept. It is made again from the first of the two, and its
end is compared with the second, so every step in it counts, not only those that were drawn.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, order=True, slots=True)
class Segment:
    """The steps after `start` up to `end`, both of checkpoints; `start` may be 0."""

    start: int
    end: int

    @property
    def num_steps(self) -> int:
        return self.end - self.start


def list_segments(kept: Sequence[int], *, from_start: bool) -> list[Segment]:
    """The segments between the steps of checkpoints, ascending; with `from_start` the one before the first too."""
    steps = [0, *kept] if from_start and 0 not in kept else list(kept)
    return [Segment(start, end) for start, end in pairwise(steps)]


def choose_segments(segments: Sequence[Segment], num_samples: int, seed: int) -> list[Segment]:
    """The segments in which `num_samples` random steps are; all of them where there are no more than that."""
    if len(segments) <= num_samples:
        return list(segments)
    total = sum(x.num_steps for x in segments)
    drawn = random.Random(seed).sample(range(total), min(num_samples, total))
    chosen, before = [], 0
    for segment in segments:
        if any(before <= step < before + segment.num_steps for step in drawn):
            chosen.append(segment)
        before += segment.num_steps
    return chosen


def find_probabilities(
    segments: Sequence[Segment],
    chosen: Sequence[Segment],
    limit: int | None,
    *,
    noted: int,
    unclear: Sequence[Segment] = (),
) -> dict[str, float]:
    """How probably one change, at a random step or checkpoint of `segments`, is found.

    Args:
        chosen: segments that were made again and compared bit for bit.
        limit: most steps that are made again of each; None for all.
        noted: of the checkpoints, how many have a digest in `events.jsonl`.
        unclear: segments besides, of which nothing can be said.

    Returns:
        By what was changed: `step` (a step computed otherwise, its line in the log), `batch`, `rate`, `weight` (of a
        checkpoint, its manifest written to fit), `weight_and_events` (and the events to fit).
    """
    clear = sum(x.num_steps for x in segments)
    covered = clear + sum(x.num_steps for x in unclear)
    if not covered:
        return dict.fromkeys(("step", "batch", "rate", "weight", "weight_and_events"), 0.0)
    made = sum(min(x.num_steps, limit or x.num_steps) for x in chosen)
    checkpoints = {step for x in [*segments, *unclear] for step in (x.start, x.end) if step}
    # A segment that starts at a changed weight computes other losses; one that ends there has other weights.
    compared = {x.end for x in chosen if limit is None or limit >= x.num_steps} | {x.start for x in chosen}
    by_replay = len(checkpoints & compared) / len(checkpoints)
    return {
        "step": made / covered,
        "batch": clear / covered,
        "rate": clear / covered,
        "weight": 1.0 if noted >= len(checkpoints) else by_replay,
        "weight_and_events": by_replay,
    }
