"""Ways to make chosen rows bad, and to run training in a child process that is there at once."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import fork

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.objectives.mlm import MaskedLM
from neobert.train.loop import pretrain
from neobert.types import LossSum, PackedBatch


class _BadGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.inf


HARM: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "loss": lambda loss: loss * torch.nan,
    "detached loss": lambda loss: loss + torch.full_like(loss, torch.inf),
    "gradient": _BadGradient.apply,
    "spike": lambda loss: loss * 100,
    "loss spike": lambda loss: loss + 10_000,
}
"""What a bad row does to the loss of its micro-batch. `detached loss` and `loss spike` leave the gradient alone."""


def poison(patch: pytest.MonkeyPatch, rows: Iterable[int], kind: str = "loss") -> None:
    """From here on, training on a micro-batch that holds one of the rows gives a bad number."""
    bad, forward = frozenset(rows), MaskedLM.forward

    def poisoned(self: MaskedLM, batch: PackedBatch) -> LossSum:
        loss = forward(self, batch)
        if not (self.training and bad & set(batch.row_keys.tolist())):
            return loss
        return LossSum(loss_sum=HARM[kind](loss.loss_sum), num_correct=loss.num_correct)

    patch.setattr(MaskedLM, "forward", poisoned)


def rows_of_step(step: int, rows_per_step: int = 4) -> range:
    """Global numbers of the rows of a step, counted from 1, when none was skipped."""
    return range((step - 1) * rows_per_step, step * rows_per_step)


def fork_run(
    config: Config,
    log: Path,
    before: Callable[[], None] = lambda: None,
    *,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
) -> int:
    """Trains in a forked child, after `before` was called there; returns its process id, see `fork`."""

    def work() -> int:
        before()
        return EXIT_CODES[pretrain(config).reason]

    return fork(work, log, rank=rank, world=world, port=port)
