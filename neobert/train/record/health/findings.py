"""What is odd about a run, from what it has recorded: pure functions over `log.jsonl`.

Each reads the lines so far and what the run is to do, and says in a few words what it found, or None. Thresholds are
far from what healthy runs show, and nothing is said until enough was seen: a false alarm teaches people to overlook the
others. The table of checks is in `checks`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neobert.train.report.log_reader import Line, RunLog, as_number

FEW, MANY = 20, 50
"""Steps whose mean or count says something."""

PLATEAU_STEPS = 300
"""Before so many steps a healthy model may know token frequencies only."""

INTERVALS = 5
"""Log lines that must agree."""

LONG_ENOUGH, LONG = 30.0, 300.0
"""Seconds of training within which a speed says something: that of the loader, that of the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a run is to do, and facts of the host: all that a check knows beside the log."""

    num_steps: int
    first_step: int = 0
    """The step that this start continued from. Speed and learning rate are compared from there on: before it the
    machine or the schedule may have been others."""

    warmup_steps: int = 0
    learning_rate: Callable[[int], float] | None = None
    """Of a step, counted from 0."""

    reads: Literal["documents", "pairs", "labels"] = "documents"
    predicts_tokens: bool = True
    causal_steps: int = 0
    """So many steps at the start predict the next token, which evaluations with masks do not measure."""

    starts_trained: bool = False
    """Whether it started from weights that were trained for what it does."""

    unigram_entropy: Callable[[], float] | None = None
    """Nats; None where the loss is more than the cross entropy of tokens."""

    mask_rates: tuple[float, float] | None = None
    """The lowest and the highest fraction of tokens that the config has predicted."""

    lowest_fill: float | None = None
    """Of the slots; None where the data alone decides it."""

    weighted_sources: bool = False
    """Whether sources come as their weights say, and not as large as they are: a small one may then be a rare one."""

    row_length: int = 0
    clipping_threshold: float = 0.0
    """Of attention logits; 0 without clipping."""

    memory_bytes: int = 0
    swapped_bytes: int = 0
    """Of the process, in memory and in swap."""


def _tail(log: RunLog, name: str, count: int) -> NDArray[np.float64]:
    """The last values of a column; a copy, since the column grows."""
    return np.array(log.steps[name][-count:])


def _head(log: RunLog, name: str, count: int) -> NDArray[np.float64]:
    return np.array(log.steps[name][:count])


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _intervals(log: RunLog, *, after: int = 0) -> list[Line]:
    """The log lines of whole intervals after a step that no profiler slowed."""
    lines = log.lines.get("log", [])
    return [x for x in lines if x.get("first_step", 0) > after and not x.get("profiled_steps") and not x.get("partial")]


def _recent(log: RunLog, name: str, count: int, *, after: int = 0) -> list[float] | None:
    """A number of the last `count` log lines; None where one of them lacks it."""
    values = [as_number(x.get(name)) for x in _intervals(log, after=after)[-count:]]
    return [x for x in values if x is not None] if len(values) == count and None not in values else None


# ---- loss and gradient ----


def find_flat_loss(log: RunLog, expected: Expected) -> str | None:
    learns_words = expected.predicts_tokens and not expected.starts_trained
    earliest = max(200, expected.warmup_steps + 100 if learns_words else expected.num_steps // 2)
    steps = log.steps["step"]
    if log.last_step < earliest or len(steps) < earliest or steps[0] != 1:
        return None
    first, last = _finite_mean(_head(log, "loss", 10)), _finite_mean(_tail(log, "loss", MANY))
    # Trained weights may have little left to learn: for them only a loss that has risen says something.
    factor = 0.98 if learns_words else 1.25 if expected.starts_trained else 1.0
    if not last > factor * first:
        return None
    return f"the loss is {last:.3f} after {log.last_step:,} steps and was {first:.3f} in the first ten"


def find_loss_near_zero(log: RunLog, expected: Expected) -> str | None:
    losses, targets = _tail(log, "loss", FEW), _tail(log, "num_targets", FEW)
    of_tokens = expected.unigram_entropy is not None
    early = of_tokens or log.last_step <= expected.num_steps // 4
    if not early or len(losses) < FEW or not (targets > 0).all():
        return None
    limit, mean = (0.05 if of_tokens else 0.001), _finite_mean(losses)
    return f"the mean loss of {FEW} steps is {mean:.2g}" if mean < limit else None


def find_plateau(log: RunLog, expected: Expected) -> str | None:
    warm = expected.warmup_steps + min(expected.num_steps // 10, 1000)
    earliest = max(PLATEAU_STEPS, min(expected.num_steps // 5, 5000), warm)
    if expected.unigram_entropy is None or expected.starts_trained or log.last_step - expected.causal_steps < earliest:
        return None
    entropy, loss = expected.unigram_entropy(), _finite_mean(_tail(log, "loss", MANY))
    if not loss > 0.98 * entropy:
        return None
    return f"the loss is {loss:.3f}, and {entropy:.3f} nats is that of a model that knows token frequencies only"


def find_zero_gradient(log: RunLog, expected: Expected) -> str | None:
    norms, targets = _tail(log, "grad_norm", FEW), _tail(log, "num_targets", FEW)
    if len(norms) < FEW or not ((norms == 0) & (targets > 0)).all():
        return None
    return f"the gradient norm of the last {FEW} steps is 0"


def find_large_gradient(log: RunLog, expected: Expected) -> str | None:
    num_large = int((_tail(log, "grad_norm", FEW) > 100).sum())
    return f"the gradient norm was above 100 in {num_large} of {FEW} steps" if num_large >= FEW // 4 else None


def find_divergence(log: RunLog, expected: Expected) -> str | None:
    lines = [x for x in log.lines.get("eval", []) if x["step"] >= expected.causal_steps]
    # Evaluations of other documents or masks cannot be compared.
    test = [lines[-1].get(name) for name in ("num_tokens", "num_documents", "num_rows")] if lines else []
    same = [x for x in lines if [x.get(name) for name in ("num_tokens", "num_documents", "num_rows")] == test]
    losses = [as_number(x.get("loss")) for x in same]
    if len(losses) < 4 or None in losses:
        return None
    numbers = [x for x in losses if x is not None]
    best = min(range(len(numbers)), key=numbers.__getitem__)
    scores = [as_number(x.get("criterion", x.get("loss"))) or 0.0 for x in same]
    grows = all(x > 1.05 * numbers[best] for x in numbers[-3:]) and numbers[-1] >= numbers[-2] >= numbers[-3]
    if not grows or best >= len(numbers) - 3 or min(scores[-3:]) <= min(scores[:-3]):
        return None
    here = same[best]["step"]
    before, now = (_loss_until(log, step) for step in (here, log.last_step))
    if before is None or now is None or now >= before:
        return None
    return (
        f"the held-out loss has risen from {numbers[best]:.3f} (step {here:,}) to {numbers[-1]:.3f}, while that of "
        f"training fell from {before:.3f} to {now:.3f}"
    )


def _loss_until(log: RunLog, step: int) -> float | None:
    """The training loss of the interval that ends at a step or before it."""
    losses = [as_number(x.get("loss")) for x in log.lines.get("log", []) if x["step"] <= step]
    return losses[-1] if losses else None


def find_odd_rate(log: RunLog, expected: Expected) -> str | None:
    if expected.learning_rate is None:
        return None
    for step, used in zip(log.steps["step"][-MANY:], log.steps["lr"][-MANY:]):
        planned = expected.learning_rate(int(step) - 1)
        if step > expected.first_step and not math.isclose(used, planned, rel_tol=1e-6, abs_tol=1e-12):
            return f"step {int(step):,} was made with a learning rate of {used:.3e}, its schedule has {planned:.3e}"
    return None


# ---- model ----


def find_large_logits(log: RunLog, expected: Expected) -> str | None:
    attention_limit = max(150.0, 3 * expected.clipping_threshold)
    for name, title, limit in (
        ("max_attention_logit", "the largest attention logit", attention_limit),
        ("logsumexp/max", "the largest logsumexp of the vocabulary's logits", 100.0),
    ):
        values = _recent(log, name, 3)
        if values is not None and min(values) > limit:
            return f"{title} was above {limit:g} in three log lines, and is {values[-1]:.4g}"
    return None


def find_dead_heads(log: RunLog, expected: Expected) -> str | None:
    last = [x.get("dead_heads") for x in log.lines.get("weights", [])[-2:]]
    if len(last) < 2 or not all(last) or last[-1] is None:
        return None
    shown = ", ".join(f"{head} of layer {layer}" for layer, head in last[-1][:4])
    return f"{len(last[-1])} attention heads add nothing: {shown}{', ...' if len(last[-1]) > 4 else ''}"


def find_embedding_drift(log: RunLog, expected: Expected) -> str | None:
    earliest = max(expected.warmup_steps, expected.num_steps // 10, 500)
    norms = [
        (x["step"], norm)
        for x in log.lines.get("weights", [])
        if (norm := as_number(x.get("embedding_norm"))) and x["step"] >= earliest
    ]
    if len(norms) < 2 or 0.25 < norms[-1][1] / norms[0][1] < 4:
        return None
    return f"the norm of the embedding went from {norms[0][1]:.4g} (step {norms[0][0]:,}) to {norms[-1][1]:.4g}"


# ---- data ----


def find_odd_masks(log: RunLog, expected: Expected) -> str | None:
    tokens, targets = _tail(log, "num_tokens", FEW), _tail(log, "num_targets", FEW)
    if expected.mask_rates is None or log.last_step - FEW < expected.causal_steps:
        return None
    if len(tokens) < FEW or not tokens.sum() > 0:
        return None
    rate, (low, high) = float(targets.sum() / tokens.sum()), expected.mask_rates
    # Special tokens are not predicted: in short documents they are a large part.
    if 0.5 * low <= rate <= min(1.0, 1.1 * high):
        return None
    wanted = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    return f"{rate:.1%} of the tokens of {FEW} steps are predicted, the config has {wanted}"


def find_starving_source(log: RunLog, expected: Expected) -> str | None:
    lines = [x["source_tokens"] for x in log.lines.get("log", []) if isinstance(x.get("source_tokens"), Mapping)]
    lines = [x for x in lines if lines and x.keys() == lines[-1].keys()]
    if len(lines) < 2 * INTERVALS:
        return None
    before, now = lines[:-INTERVALS], lines[-INTERVALS:]
    total_before, total = (sum(sum(x.values()) for x in part) for part in (before, now))
    for label in now[-1]:
        fraction = sum(x[label] for x in before) / max(total_before, 1)
        tokens = sum(x[label] for x in now)
        if tokens < 0.1 * fraction * total and fraction * total >= 10 * expected.row_length:
            return f"{label} gave {tokens / total:.2%} of the tokens of {INTERVALS} log lines, before {fraction:.1%}"
        if expected.weighted_sources and not fraction and not tokens and log.last_step >= 500:
            return f"{label} has given no token in {log.last_step:,} steps"
    return None


def find_padding(log: RunLog, expected: Expected) -> str | None:
    fill = _recent(log, "packing_fill", INTERVALS)
    if expected.lowest_fill is None or fill is None or max(fill) >= expected.lowest_fill:
        return None
    return f"{1 - max(fill):.0%} of the slots or more were padding in {INTERVALS} log lines"


# ---- machine ----


def find_falling_speed(log: RunLog, expected: Expected) -> str | None:
    lines = _intervals(log, after=expected.first_step)
    if len(lines) < 3 * INTERVALS:
        return None
    speeds = [as_number(x.get("tokens_per_second")) or 0.0 for x in lines]
    before, now = float(np.median(speeds[:-INTERVALS])), speeds[-INTERVALS:]
    if max(now) > 0.5 * before or sum(as_number(x.get("seconds")) or 0.0 for x in lines[-INTERVALS:]) < LONG:
        return None
    return f"{max(now):,.0f} tokens a second at most in {INTERVALS} log lines, before {before:,.0f}"


def find_data_wait(log: RunLog, expected: Expected) -> str | None:
    waits = _recent(log, "data_wait", 3, after=expected.first_step)
    seconds = _recent(log, "seconds", 3, after=expected.first_step)
    if waits is None or seconds is None or min(waits) <= 0.2 or sum(seconds) < LONG_ENOUGH:
        return None
    return f"{min(waits):.0%} of the time or more was spent waiting for data in three log lines"


def find_swap(log: RunLog, expected: Expected) -> str | None:
    swapped, total = expected.swapped_bytes, expected.swapped_bytes + expected.memory_bytes
    if swapped < 2**28 or swapped < 0.1 * total:
        return None
    return f"{swapped / 2**30:.1f} GiB of this process are in swap, {expected.memory_bytes / 2**30:.1f} GiB in memory"
