"""From the hidden states of a text to one vector.

Each function takes fp32 hidden states `[T, H]` of texts side by side and the lengths `[N]` of the texts, none of them
0, and returns `[N, H]`. [CLS] and [SEP] count like every other token, as in the mean pooling of sentence-transformers.
The lengths are not checked (`unsafe`): a check would wait for the device in training.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Pool = Callable[[Tensor, Tensor], Tensor]


def pool_mean(hidden_TH: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean over the tokens of each text."""
    return torch.segment_reduce(hidden_TH, "mean", lengths=lengths_N, unsafe=True)


def pool_max(hidden_TH: Tensor, lengths_N: Tensor) -> Tensor:
    """Maximum over the tokens of each text, coordinate by coordinate."""
    return torch.segment_reduce(hidden_TH, "max", lengths=lengths_N, unsafe=True)


def pool_cls(hidden_TH: Tensor, lengths_N: Tensor) -> Tensor:
    """The first token of each text."""
    return hidden_TH[lengths_N.cumsum(0) - lengths_N]


def choose_pooling(name: str) -> Pool:
    """The pooling called `name`. Raises ValueError for an unknown one."""
    if name not in POOLING:
        raise ValueError(f"pooling: {name!r} is unknown; write one of {', '.join(POOLING)}")
    return POOLING[name]


POOLING: dict[str, Pool] = {"mean": pool_mean, "cls": pool_cls, "max": pool_max}
