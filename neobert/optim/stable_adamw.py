"""StableAdamW: AdamW with shorter steps where gradients outgrow their running squares.

Per tensor, with the debiased means m and v of AdamW (Wortsman et al., arXiv 2304.13013, algorithm 2):

    lr_t = lr / max(1, RMS),    RMS^2 = mean(g^2 / max(v, eps^2))
    w <- (1 - lr_t * decay) w - lr_t * m / (sqrt(v) + eps)

RMS is about 1 while gradients are as large as they used to be, and large when v lags behind a sudden growth. It makes
clipping of the gradient norm superfluous; both together are allowed.

The update itself is torch's fused AdamW with that learning rate. Nothing waits for the device. Where `found_inf` is
set, weights, means and counts keep every bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from neobert.optim.sharded_weights import is_sharded, local_parts, sum_over_shards

_PIECE = 2**17
"""Weights that are looked at together on a CPU: what is computed of them stays in its cache."""


class StableAdamW(Optimizer):
    """AdamW with update clipping; the formulas are at the head of this module."""

    _step_supports_amp_scaling = True

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "fused": True})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; none where `found_inf` is set."""
        # Written by `step_unless` and by gradient scalers; a plain call has none.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self._start(p)
            grads = [p.grad for p in params if p.grad is not None]
            squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg_sq", "step"))
            settings = {"beta2": group["betas"][1], "eps": group["eps"]}
            excesses: Iterable[Tensor]
            if params and (params[0].device.type != "cpu" or is_sharded(params[0])):
                excesses = relative_sizes(grads, squares, [step + 1 for step in steps], **settings)
            else:  # One after the other: what is computed of a weight is in the cache still when it is updated.
                excesses = (relative_size(*x[:2], x[2] + 1, **settings) for x in zip(grads, squares, steps))
            for p, grad, excess in zip(params, grads, excesses):
                self._update(p, grad, excess, group, found_inf)

    def _start(self, p: Tensor) -> None:
        state = self.state[p]
        if not state:
            # "fused" in the groups has a loaded count stay on the device, in fp32.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    def _update(self, p: Tensor, grad: Tensor, excess: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        adamw(
            [p],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] / excess.clamp_min(1.0),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def relative_size(grad: Tensor, old_square: Tensor, step: Tensor, *, beta2: float, eps: float) -> Tensor:
    """RMS as above, a scalar: v is made of `old_square`, the mean before this step, and the gradient."""
    debias = 1 - beta2**step
    total = torch.zeros_like(debias)
    size = _PIECE if grad.device.type == "cpu" else grad.numel()
    for g, old in zip(grad.flatten().split(size), old_square.flatten().split(size)):
        ratio = g.square()
        total += ratio.div_(torch.lerp(old, ratio, 1 - beta2).clamp_min_(eps**2 * debias)).sum()
    return (total * debias / grad.numel()).sqrt()


def relative_sizes(
    grads: list[Tensor], old_squares: list[Tensor], steps: list[Tensor], *, beta2: float, eps: float
) -> list[Tensor]:
    """`relative_size` of many weights, a GPU's way: a kernel goes through all of them, and little is launched for each.
    Takes two tensors of the size of the weights. What is sharded is summed over its ranks, all weights at once."""
    debias = 1 - beta2 ** torch.stack(steps)
    own = local_parts(grads)
    squares = torch._foreach_mul(own, own)
    means = torch._foreach_lerp(local_parts(old_squares), squares, 1 - beta2)
    for mean, least in zip(means, (eps**2 * debias).unbind()):
        mean.clamp_min_(least)
    torch._foreach_div_(squares, means)
    sums = sum_over_shards(list(torch._foreach_norm(squares, 1)), grads[0])
    means = torch._foreach_div(sums, [float(grad.numel()) for grad in grads])
    return list((torch.stack(means) * debias).sqrt().unbind())
