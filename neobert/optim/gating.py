"""An optimizer step that the device itself can leave out.

Whether a step counts is known on the device only, and asking would make the host wait. torch's fused optimizers read a
flag, `found_inf`, inside their kernel, as gradient scalers use it: where it is 1, parameters, moments and the count of
steps keep every bit. An optimizer of another kind says that it does the same with `_step_supports_amp_scaling = True`.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


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
