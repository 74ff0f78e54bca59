"""Looks at a run when something was logged, and says what is odd: once when it begins, and once when it is over.

Rank 0 looks, at the lines of `log.jsonl` that are there anyway, so a resumed run sees what one that was never stopped
sees. What was said before is known from `events.jsonl`. Nothing here stops a run: a check that fails is switched off.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline
from neobert.model.layers import EncoderBlock
from neobert.objectives.base import Objective, ObjectiveModule
from neobert.optim.schedule import Schedule
from neobert.optim.sharded_weights import whole
from neobert.train.hardware.memory import current_bytes, swapped_bytes
from neobert.train.record.health.checks import CHECKS
from neobert.train.record.health.findings import Expected
from neobert.train.report.log_reader import read_events

if TYPE_CHECKING:
    from neobert.train.record.tracking import Tracker
    from neobert.train.run import RunData

FOUND, OVER = "health", "health_over"
"""Events."""

CLEAN_LOOKS = 3
"""In a row, before a finding is over: a value at its threshold is said once, not at every second look."""


class Health:
    """What watches one run, on rank 0."""

    def __init__(self, expected: Expected, tracker: "Tracker", events: Path) -> None:
        self.expected, self._tracker, self._events = expected, tracker, events
        self._clean: dict[str, int] = {}
        """Of each finding that is not over, how many looks in a row did not see it."""

        self._failed: set[str] = set()

    def begin(self, step: int) -> None:
        """Continues after `step`, with what earlier starts have said."""
        self.expected = replace(self.expected, first_step=step)
        self._clean = {}
        events: list[dict[str, Any]] = []
        with suppress(OSError):  # Then what was said is said again.
            events = list(read_events(self._events)) if step else []
        for event in events:
            if event.get("event") == FOUND and event.get("check") in CHECKS:
                self._clean[event["check"]] = 0
            elif event.get("event") == OVER:
                self._clean.pop(str(event.get("check")), None)

    def look(self, step: int) -> None:
        """Says what has begun and what is over."""
        try:
            log, expected = self._tracker.read_log(), self._with_memory()
        except OSError:
            return  # A log that cannot be read for now is read at the next look.
        for name, check in CHECKS.items():
            if name in self._failed:
                continue
            try:
                found = check.find(log, expected)
            except Exception as error:  # A line of another version, a damaged log: what watches a run must not end it.
                self._failed.add(name)
                self._tracker.warn(f"health: {name} could not be looked at ({error}) and is switched off")
                continue
            self._note(name, step, found)

    def _note(self, name: str, step: int, found: str | None) -> None:
        check = CHECKS[name]
        if found is not None:
            if name not in self._clean:
                self._tracker.warn(f"health: {name} at step {step:,}: {found}; {check.advice} (docs/{check.page})")
                self._tracker.event(FOUND, step, check=name, found=found, advice=check.advice)
            self._clean[name] = 0
        elif name in self._clean:
            self._clean[name] += 1
            if self._clean[name] == CLEAN_LOOKS:
                del self._clean[name]
                self._tracker.say(f"health: {name} is over at step {step:,}")
                self._tracker.event(OVER, step, check=name)

    def _with_memory(self) -> Expected:
        try:
            return replace(self.expected, memory_bytes=current_bytes(), swapped_bytes=swapped_bytes())
        except OSError:  # Not Linux.
            return self.expected


def build_health(
    config: Config,
    objective: Objective,
    data: "RunData",
    schedule: Schedule,
    num_steps: int,
    tracker: "Tracker",
    output_dir: Path,
) -> Health | None:
    """What watches a run; None with `trainer.health_checks: false`."""
    if not config.trainer.health_checks:
        return None
    entropy = data.unigram_entropy if isinstance(data, DataPipeline) else None
    return Health(build_expected(config, objective, schedule, num_steps, entropy), tracker, output_dir / "events.jsonl")


def build_expected(
    config: Config, objective: Objective, schedule: Schedule, num_steps: int, entropy: Callable[[], float] | None
) -> Expected:
    """What a run with this config is to do; `entropy` computes that of single tokens."""
    masks, trainer, muon = config.datacollator, config.trainer, config.optimizer.muon_config
    rates = masks.mlm_rate_range
    if masks.mlm_rate == "fixed":
        rates = (masks.mlm_probability, masks.mlm_probability_final or masks.mlm_probability)
    of_documents = objective.reads == "documents"
    # A head that only training has makes a loss of its own, beside that of tokens.
    tokens_alone = objective.predicts_tokens and not objective.training_only
    full_rows = masks.pack_sequences and trainer.enforce_full_packed_batches
    return Expected(
        num_steps=num_steps,
        warmup_steps=schedule.warmup_steps,
        learning_rate=schedule,
        reads=objective.reads,
        predicts_tokens=objective.predicts_tokens,
        starts_trained=config.model.init_from is not None if of_documents else objective.reads == "pairs",
        causal_steps=masks.clm_steps or 0,
        unigram_entropy=entropy if tokens_alone else None,
        mask_rates=(min(rates), max(rates)) if of_documents and objective.fills_masks else None,
        lowest_fill=(0.85 if full_rows else 0.5) if of_documents else None,
        weighted_sources=any(source.weight is not None for source in config.dataset.mixture),
        row_length=config.dataset.max_seq_length,
        clipping_threshold=muon.clipping_threshold if muon.enable_clipping else 0.0,
    )


# ---- weights, measured at evaluations ----

DEAD = 0.02
"""Of the mean strength of the heads of a layer."""


@torch.no_grad()
def measure_weights(module: ObjectiveModule) -> dict[str, Any]:
    """Norms that checks look at, in one pass over attention and embedding. Of sharded weights, collective.

    Returns:
        `embedding_norm`, and `dead_heads`: [layer, head] from 0. A head is as strong as the product of the norms of
        its values and of its part of the output; an encoder of transformers has none that are looked at.
    """
    norm = whole(torch.linalg.vector_norm(module.encoder.embedding.weight)).item()
    strengths = [_head_strengths(block) for block in module.encoder.layers if isinstance(block, EncoderBlock)]
    if not strengths:
        return {"embedding_norm": norm, "dead_heads": []}
    strengths_LN = torch.stack(strengths)
    dead_LN = strengths_LN < DEAD * strengths_LN.mean(dim=1, keepdim=True)
    return {"embedding_norm": norm, "dead_heads": dead_LN.nonzero().tolist()}


def _head_strengths(block: EncoderBlock) -> Tensor:
    """`[N]` in fp32."""
    heads, size = block.num_heads, block.head_dim
    values_NX = whole(block.qkv.weight)[2 * heads * size :].float().view(heads, -1)
    out_NX = whole(block.out.weight).float().view(-1, heads, size).transpose(0, 1).flatten(1)
    return values_NX.norm(dim=1) * out_NX.norm(dim=1)
