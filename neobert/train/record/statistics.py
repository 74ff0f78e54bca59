"""How large gradients, weights and logits are, by kind of weight, at logging points (`trainer.log_statistics`).

A step that ends a logging interval is watched: gradient norms are measured before clipping, and the logits of
up to 256 of its predicted tokens are computed again, from the hidden states that the step has anyway. All of it
stays on the device until the log line is written, and no weight, gradient or random number is touched.

The logsumexp of the logits is what a z-loss keeps small: where it drifts, the vocabulary projection is about to become
unstable (PaLM, arXiv 2204.02311, section 5). It is measured over the tokens of this process; gradients and weights are
equal on all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.table import choose_objective
from neobert.optim.sharded_weights import whole
from neobert.train.processes.parallel import gathered
from neobert.types import IGNORE_INDEX, MicroBatch, PackedBatch

MOST_TOKENS = 256
"""Predicted tokens whose logits are looked at."""


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The kind of a weight: `vectors`, or the last part of a matrix's name (`embedding`, `qkv`, `down`, ...)."""
    return "vectors" if parameter.ndim < 2 else name.removesuffix(".weight").rsplit(".", 1)[-1]


class Statistics:
    """Watches steps of one model."""

    def __init__(
        self, module: ObjectiveModule, computing: ObjectiveModule | None = None, *, predicts_tokens: bool = True
    ) -> None:
        """`computing` makes the hidden states, where that is not `module`. `predicts_tokens`: whether targets are
        tokens, so that there are logits to look at."""
        self._computing, self._predicts_tokens = computing or module, predicts_tokens
        self._groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            self._groups.setdefault(group_of(name, parameter), []).append(parameter)
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, batch: MicroBatch) -> Iterator[Callable[[], None]]:
        """Gives the function to call when the gradients of a step are complete, whose last micro-batch is `batch`."""
        assert isinstance(batch, PackedBatch), "the config refuses statistics of another task"
        hidden: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if module.training:  # Else a pass of a teacher.
                hidden[:] = [output.detach()]

        def observe() -> None:
            self._found = self._gradient_norms()
            if self._predicts_tokens:
                with gathered(self._computing):
                    self._found |= self._logits(hidden[0], batch)
            hidden.clear()

        handle = self._computing.encoder.register_forward_hook(keep)
        try:
            yield observe
        finally:
            handle.remove()

    def read(self) -> dict[str, float]:
        """Metrics of the step that was watched last, and of the weights as they are now; empty when none was watched
        since the last call. Waits for the device."""
        if not self._found:
            return {}
        found = self._found | {
            f"weight_norm/{group}": norm_of([p.detach() for p in members]) for group, members in self._groups.items()
        }
        self._found = {}
        return dict(zip(found, torch.stack(list(found.values())).tolist()))

    def _gradient_norms(self) -> dict[str, Tensor]:
        gradients = {group: [p.grad for p in members if p.grad is not None] for group, members in self._groups.items()}
        return {f"grad_norm/{group}": norm_of(members) for group, members in gradients.items() if members}

    @torch.no_grad()
    def _logits(self, hidden_TH: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        stride = -(-len(batch.targets) // MOST_TOKENS)
        index, targets = (x[::stride].to(hidden_TH.device) for x in (batch.masked_index, batch.targets))
        counted = targets != IGNORE_INDEX
        logits_MV = self._computing.logits(hidden_TH.index_select(0, index)).float()
        logsumexp_M = logits_MV.logsumexp(dim=-1)
        lowest = -torch.inf
        return {
            "logsumexp/mean": torch.where(counted, logsumexp_M, 0).sum() / counted.sum().clamp(min=1),
            "logsumexp/max": torch.where(counted, logsumexp_M, lowest).max(),
            "logit/max": torch.where(counted, logits_MV.amax(dim=-1), lowest).max(),
        }


def norm_of(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all of them, of whole tensors where they are sharded."""
    return whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))))


def build_statistics(config: Config, module: ObjectiveModule, computing: ObjectiveModule) -> Statistics | None:
    """What watches the steps of a run, None where nothing does."""
    if not config.trainer.log_statistics:
        return None
    return Statistics(module, computing, predicts_tokens=choose_objective(config).predicts_tokens)
