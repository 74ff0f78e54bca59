"""Ways to make chosen rows bad, and to run training in a child process that is there at once."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    """Global numbers of the rows of a step, counted from 1, when none was passed over."""
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
    """Trains in a forked child, which has everything imported already; returns its process id.

    The child ends with the exit code of the script, or 1 after an error, whose traceback is in `log`.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if world > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({k: str(v) for k, v in {**names, "MASTER_PORT": port}.items()})
        before()
        code = EXIT_CODES[pretrain(config).reason]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(process: int, seconds: float = 60) -> int:
    """Exit code of a child, negative for the signal that killed it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError(f"process {process} did not end within {seconds} s")
