"""`trainer.bf16_residual`: weights and residual stream in bf16, with fp32 masters in the optimizer and no autocast.

The plain module of a run holds the masters: checkpoints, optimizer, moving average and clipping know no other weights.
Beside it a module of the same kind computes. Its linear layers and embeddings are copies in bf16, so the stream that
leaves the embedding is bf16, and what every operation reads and writes of it is half as large as under autocast, where
each sum is fp32. All other weights (gains of norms, learned scales, a bias over the vocabulary) are the masters
themselves.

What stays fp32: the inside of every norm, of the rotation, of the softmax of attention and loss; the normalised model's
steps on the sphere; sums of the loss; poolings and losses of fine-tuning; gradients once they have left a layer, their
sums over micro-batches and over processes, their norm and clipping; the optimizer. What is rounded to bf16 and was fp32
under autocast: the stream after each sum, what a norm returns, and the gradient of a weight in one micro-batch.

Masters are copied when a forward pass finds no gradient in them: before the first micro-batch of each step, and in each
batch of an evaluation. So nothing that changes weights has to say so: an optimizer, a clip, a checkpoint, an average.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neobert.objectives.base import ObjectiveModule


class MasterWeights(nn.Module):
    """Computes what `module` does, in bf16, and leaves the gradients in the fp32 weights of `module`.

    Its parameters are those of `module`; several processes have to reduce the gradients themselves.
    """

    module: ObjectiveModule

    def __init__(self, module: ObjectiveModule) -> None:
        super().__init__()
        self.module = module
        replaced: dict[int, Any] = {id(p): p for p in module.parameters()}
        masters = [p for part in bf16_parts(module) for p in part.parameters(recurse=False)]
        replaced |= {id(p): nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad) for p in masters}
        # Beside the registered modules: it has no weights of its own that anything else may see.
        self._computing: tuple[ObjectiveModule] = (copy.deepcopy(module, replaced),)
        self._masters: list[Tensor] = list(dict.fromkeys(masters))
        self._copies: list[Tensor] = [replaced[id(p)] for p in self._masters]
        self._trained = next(p for p in self._masters if p.requires_grad)
        for master, own in zip(self._masters, self._copies):
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_hand_to(master))

    @property
    def computing(self) -> ObjectiveModule:
        """The module that computes: `module` with weights in bf16."""
        return self._computing[0]

    def forward(self, batch: Any) -> Any:
        if self._trained.grad is None:
            self._copy_masters()
        return self.computing(batch)

    def train(self, mode: bool = True) -> "MasterWeights":
        self.computing.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def _copy_masters(self) -> None:
        torch._foreach_copy_(self._copies, self._masters)


def bf16_parts(module: nn.Module) -> list[nn.Module]:
    """The layers whose weights are bf16."""
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Embedding)]


def _hand_to(master: Tensor) -> Callable[[Tensor], None]:
    """Adds the gradient of a copy to that of its master, in fp32, as soon as it is complete."""

    def add(own: Tensor) -> None:
        assert own.grad is not None, "called when it is there"
        if master.grad is None:
            master.grad = own.grad.to(master.dtype)
        else:
            master.grad.add_(own.grad)
        own.grad = None

    return add
