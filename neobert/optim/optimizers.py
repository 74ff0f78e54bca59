"""Optimizers by name. The learning rate they are built with is the base; the train step sets it anew at every step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neobert.optim.groups import build_parameter_groups

Groups = list[dict[str, Any]]


def build_adamw(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), one fused kernel per step.

    Fused on the CPU too: it is three times faster there, and the other implementations read a scalar at each step.
    """
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def build_optimizer(
    module: nn.Module, *, name: str, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The optimizer called `name` over the parameter groups of `module`. Raises ValueError for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name: {name!r} is unknown; write one of {', '.join(OPTIMIZERS)}")
    groups = build_parameter_groups(module, weight_decay=weight_decay)
    return OPTIMIZERS[name](groups, lr=lr, betas=betas, eps=eps)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": build_adamw}
"""Builders `fn(groups, *, lr, betas, eps)`."""
