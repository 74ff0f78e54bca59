"""An exponential moving average of the weights, beside the weights that are trained.

    average_n = average_(n-1) + (1 - d_n) (weights_n - average_(n-1)),     d_n = min(decay, n / (n + 9))

n counts the steps since the average started; it starts as a copy of the weights. A constant decay would carry the first
weights along for 1 / (1 - decay) steps; with d_n the average looks back over about a ninth of the steps so far until
that is longer than `decay` says (the idea is that of tf.train.ExponentialMovingAverage with `num_updates`). For
decay = 0.9: d = 0.1, 0.18, 0.25, 0.31, ... and 0.9 from n = 81 on.

d_n depends on the number of the step alone and the average itself is saved, so a resumed run continues it bit for bit.
A step that was skipped on the device leaves the average as it is; nothing waits for the device. On several processes
every one keeps the average of what it has of the weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neobert.optim.sharded_weights import local_parts, shard_like

_LAG = 9
"""While the average is young it looks back over 1 / (1 - d_n) = (n + 9) / 9 steps."""


def effective_decay(num_steps: int, decay: float) -> float:
    """d_n of the formula above, `num_steps` steps after the average started."""
    return min(decay, num_steps / (num_steps + _LAG))


class WeightAverage:
    """The average of the parameters of one module."""

    def __init__(self, module: nn.Module, *, decay: float, start_step: int = 0) -> None:
        """`start_step`: after this optimizer step the average starts, as a copy of the weights of that moment."""
        self._parameters = dict(module.named_parameters())
        self.decay, self.start_step = decay, start_step
        self._average: dict[str, Tensor] | None = None

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        return self._average is not None

    def begin(self, step: int, saved: Mapping[str, Tensor] | None = None) -> None:
        """Continues at `step` with the average that was saved there; without one, it starts with the weights as they
        are, or later if `start_step` says so.

        Raises:
            KeyError: `saved` lacks a parameter.
        """
        self._average = None
        if step >= self.start_step:
            self._average = {
                name: (p if saved is None else shard_like(saved[name], p)).detach().to(p.dtype, copy=True)
                for name, p in self._parameters.items()
            }

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Takes the weights after optimizer step `step`, unless `skipped` (bool scalar on the device) is true."""
        if self._average is None:
            self.begin(step)
            return
        fraction = 1 - effective_decay(step - self.start_step, self.decay)
        moved = torch.where(skipped, 0.0, fraction).to(torch.float32)
        averages, weights = local_parts(self._average.values()), local_parts(self._parameters.values())
        torch._foreach_lerp_(averages, weights, [moved] * len(averages))

    def tensors(self) -> dict[str, Tensor]:
        """The average under the names of `named_parameters`; later updates change these tensors.

        Raises:
            RuntimeError: it has not started.
        """
        if self._average is None:
            raise RuntimeError(f"the average starts at step {self.start_step}; there is none yet")
        return self._average

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module computes with the average; afterwards with its weights again."""
        average = self.tensors()
        self._exchange(average)
        try:
            yield
        finally:
            self._exchange(average)

    @torch.no_grad()
    def _exchange(self, average: dict[str, Tensor]) -> None:
        # Values and not memory: what is sharded is gathered from where it was when it was sharded.
        for weight, other in zip(local_parts(self._parameters.values()), local_parts(average.values())):
            held = weight.clone()
            weight.copy_(other)
            other.copy_(held)
