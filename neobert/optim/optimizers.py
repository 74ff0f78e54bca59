"""Optimizers by name. The learning rate they are built with is the peak; the train step sets it again at every step.

The device itself can leave out a step: whether it counts is known on the device only, and asking would make the host
wait. torch's fused optimizers read a flag, `found_inf`, inside their kernel, as gradient scalers use it: where it is 1,
parameters, moments and the count of steps keep every bit. An optimizer of another kind says that it does the same with
`_step_supports_amp_scaling = True`.

Matrices that return to the unit sphere after every optimizer step, for the normalised model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.config.schema_optimizer import OptimizerSection
from neobert.model.ngpt import UnitMatrix, normalise_
from neobert.optim.cautious import decay_cautiously_before, set_aside_decay
from neobert.optim.groups import build_parameter_groups, split_by_depth
from neobert.optim.muon import Muon
from neobert.optim.stable_adamw import StableAdamW


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """`optimizer.step()`, without any effect where `skip` (bool scalar on the device) is true; no host sync.

    Raises:
        TypeError: the optimizer does not read the flag.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(
            f"{type(optimizer).__name__} cannot leave out a step on the device: build it with fused=True, or let its "
            "step read `found_inf` and set `_step_supports_amp_scaling`"
        )
    # Written here and by gradient scalers only; the optimizer reads it with getattr.
    setattr(optimizer, "found_inf", skip.to(torch.float32))  # noqa: B010
    optimizer.step()


def keep_unit_length(optimizer: Optimizer, matrices: Sequence[UnitMatrix]) -> None:
    """Has `optimizer.step()` end with `normalise_(matrices)`, on the device, in whatever loop it is called.

    A step that is left out (see `neobert.optim.optimizers`) leaves the matrices alone too, to the last bit: scaled once
    more they could differ by a rounding error. Without matrices nothing is added to the step.
    """
    if matrices:

        def scale(optimizer: Optimizer, *_: Any) -> None:
            # The flag is there once `step_unless` has made a step.
            normalise_(matrices, unless=getattr(optimizer, "found_inf", None))

        optimizer.register_step_post_hook(scale)


Groups = list[dict[str, Any]]


def build_adamw(groups: Groups, section: OptimizerSection, dtype: torch.dtype) -> Optimizer:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), one fused kernel per step.

    Fused on the CPU too: it is three times faster there, and the other implementations read a scalar at each step.
    """
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def build_adam(groups: Groups, section: OptimizerSection, dtype: torch.dtype) -> Optimizer:
    """Adam (Kingma & Ba, arXiv 1412.6980); weight decay is added to the gradient, as the gradient of an L2 penalty."""
    return torch.optim.Adam(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def build_stable_adamw(groups: Groups, section: OptimizerSection, dtype: torch.dtype) -> Optimizer:
    """AdamW with update clipping."""
    return StableAdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def build_muon(groups: Groups, section: OptimizerSection, dtype: torch.dtype) -> Optimizer:
    """Muon on the matrices of the blocks and AdamW on the rest."""
    return _build_muon(groups, section, dtype, equal_rows=False)


def build_normuon(groups: Groups, section: OptimizerSection, dtype: torch.dtype) -> Optimizer:
    """NorMuon on the matrices of the blocks and AdamW on the rest."""
    return _build_muon(groups, section, dtype, equal_rows=True)


def _build_muon(groups: Groups, section: OptimizerSection, dtype: torch.dtype, *, equal_rows: bool) -> Muon:
    return Muon(
        groups,
        section.muon_config,
        dtype=dtype,
        equal_rows=equal_rows,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
    )


def build_optimizer(
    module: nn.Module,
    section: OptimizerSection,
    *,
    dtype: torch.dtype = torch.float32,
    layer_decay: float | None = None,
    num_layers: int = 0,
    num_heads: int = 1,
) -> Optimizer:
    """The optimizer over the parameter groups of `module`; `dtype` is the type of its matrix products, if it has any.
    With `layer_decay` the groups are split by the depth of `num_layers` blocks, see `split_by_depth`. `num_heads`: of
    the attention of a block, for Muon with `split_heads`.

    Raises ValueError for an unknown name.
    """
    if section.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name: {section.name!r} is unknown; write one of {', '.join(OPTIMIZERS)}")
    groups = build_parameter_groups(module, section)
    groups = split_by_depth(groups, layer_decay, num_layers, decoupled=section.decoupled_weight_decay)
    if section.cautious_weight_decay:
        set_aside_decay(groups)
    optimizer = OPTIMIZERS[section.name](groups, section, dtype)
    if section.cautious_weight_decay:
        decay_cautiously_before(optimizer, but=("matrices",) if isinstance(optimizer, Muon) else ())
    if isinstance(optimizer, Muon) and section.muon_config.split_heads:
        optimizer.split_heads(num_heads)
    return optimizer


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerSection, torch.dtype], Optimizer]] = {
    "adamw": build_adamw,
    "adam": build_adam,
    "stable_adamw": build_stable_adamw,
    "muonclip": build_muon,
    "normuon": build_normuon,
}
"""Builders `fn(groups, section, dtype of matrix products)`; every optimizer here can leave out a step on the device."""
