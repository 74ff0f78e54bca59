"""StableAdamW: AdamW with shorter steps where gradients outgrow their running squares.

Per tensor, with the debiased means m and v of AdamW (Wortsman et al., arXiv 2304.13013, algorithm 2):

    lr_t = lr / max(1, RMS),    RMS^2 = mean(g^2 / max(v, eps^2))
    w <- (1 - lr_t * decay) w - lr_t * m / (sqrt(v) + eps)

RMS is about 1 while gradients are as large as they used to be, and large when v lags behind a sudden growth. It makes
clipping of the gradient norm superfluous; both together are allowed.

Nothing waits for the device. Where `found_inf` is set, weights, means and counts keep every bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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
        skip = None if found_inf is None else found_inf != 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, skip)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], skip: Tensor | None) -> None:
        state, (beta1, beta2), eps = self.state[p], group["betas"], group["eps"]
        if not state:
            # "fused" in the groups has a loaded count stay on the device, in fp32.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        step = state["step"] + 1
        mean = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        debiased = square / (1 - beta2**step)
        rms = (grad.square() / debiased.clamp_min(eps**2)).mean().sqrt()
        lr = group["lr"] / rms.clamp_min(1.0)
        update = (mean / debiased.sqrt_().add_(eps)).mul_(lr / (1 - beta1**step))
        new = p * (1 - lr * group["weight_decay"]) - update
        for old, value in ((state["step"], step), (state["exp_avg"], mean), (state["exp_avg_sq"], square), (p, new)):
            if skip is None:
                old.copy_(value)
            else:
                torch.where(skip, old, value, out=old)
