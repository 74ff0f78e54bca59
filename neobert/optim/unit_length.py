"""Matrices that return to the unit sphere after every optimizer step, for the normalised model."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from neobert.model.ngpt import UnitMatrix, normalise_


def keep_unit_length(optimizer: Optimizer, matrices: Sequence[UnitMatrix]) -> None:
    """Has `optimizer.step()` end with `normalise_(matrices)`, on the device, in whatever loop it is called.

    A step that is left out (see `neobert.optim.gating`) leaves the matrices alone too, to the last bit: scaled once
    more they could differ by a rounding error. Without matrices nothing is added to the step.
    """
    if matrices:

        def scale(optimizer: Optimizer, *_: Any) -> None:
            # The flag is there once `step_unless` has made a step.
            normalise_(matrices, unless=getattr(optimizer, "found_inf", None))

        optimizer.register_step_post_hook(scale)
