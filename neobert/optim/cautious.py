"""Cautious weight decay: a weight decays where that agrees with its update (arXiv 2510.12402).

    w <- w - lr * (u + decay * [u w >= 0] w)

with the update u of the optimizer, so that decay never works against it: where the update moves a weight away from
zero, the weight is left alone. Muon does so where it has its update (`muon`). Here are the weights that AdamW updates,
under every optimizer: u has the sign of the running mean of the gradient, which is known before the step, so that the
decay comes first, as in AdamW, and torch's fused kernel does the rest without one.

All of it is elementwise: of sharded weights every rank computes its part. Nothing waits for a device, and where a step
is left out (see `optimizers`) every bit stays.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neobert.optim.sharded_weights import local

DECAY = "cautious_decay"
"""Of a parameter group: its decay, beside `weight_decay` 0, which the fused kernels read."""

_PIECE = 2**17
"""Weights that are looked at together on a CPU: what is computed of them stays in its cache."""


def set_aside_decay(groups: Sequence[dict[str, Any]]) -> None:
    """Has the groups decay cautiously."""
    for group in groups:
        group[DECAY], group["weight_decay"] = group["weight_decay"], 0.0


def decay_cautiously_before(optimizer: Optimizer, *, but: Sequence[str] = ()) -> None:
    """Has `optimizer.step()` begin with the decay of its groups, but for those of the roles `but`."""

    @torch.no_grad()
    def decay(optimizer: Optimizer, *_: Any) -> None:
        # The flag is there once `step_unless` has made a step.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            if group[DECAY] and group["roles"] != list(but):
                for p in group["params"]:
                    if p.grad is not None:
                        _decay(p, optimizer.state[p].get("exp_avg"), group, found_inf)

    optimizer.register_step_pre_hook(decay)


def _decay(p: Tensor, mean: Tensor | None, group: dict[str, Any], found_inf: Tensor | None) -> None:
    assert p.grad is not None, "asked before"
    weight = local(p).view(-1)
    size = _PIECE if weight.device.type == "cpu" else max(1, weight.numel())
    parts = [local(x).flatten().split(size) for x in (p.grad, p.grad if mean is None else mean)]
    for own, grad, old in zip(weight.split(size), *parts):
        update = torch.lerp(old, grad, 1 - group["betas"][0])
        decay_agreeing_(own, update.mul_(own), group["lr"] * group[DECAY], found_inf)


def decay_agreeing_(weight: Tensor, product: Tensor, decay: float, found_inf: Tensor | None) -> None:
    """Takes `decay` of each weight off where the update does not move it away from zero; nothing where the step is left
    out.

    Args:
        product: of update and weight; overwritten.
    """
    product.ge_(0)
    if found_inf is not None:
        product.mul_(found_inf == 0)
    weight.addcmul_(weight, product, value=-decay)
