"""Initial weights of the matrices. Gains start at 1, biases at 0.

L is the number of blocks, H the hidden size, e `embedding_init_range`, d `decoder_init_range`, s `init_std` or else
0.02; `out` and `down` are the linear layers that write into the residual stream.

| `init` | embeddings | linear layers | `out` and `down` | source |
|---|---|---|---|---|
| `uniform` | U(-e, e) | U(-d, d) | the same | NeoBERT, arXiv 2502.19587 and its code |
| `truncated_normal` | N(0, s^2) within 2 s | the same | the same | BERT, arXiv 1810.04805 |
| `megatron` | N(0, s^2) | the same | N(0, s^2 / 2L) | Megatron-LM, arXiv 1909.08053, section 4.1 |
| `small` | N(0, 2 / 5H) | the same | N(0, 4 / (L^2 H)) | arXiv 1910.05895 and GPT-NeoX, arXiv 2204.06745 |

A uniform draw from (-d, d) has the standard deviation d / sqrt(3), a normal one that is cut at 2 s has 0.88 s. The sum
of 2L outputs of variance s^2 / 2L has the variance s^2, so the residual stream does not grow with the depth. With
`init_zero_residual` `out` and `down` start at 0, and so every block as the identity (Fixup, arXiv 1901.09321).

The normalised model draws N(0, 1), whose directions are uniform, and then scales to length 1; see `ngpt.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from neobert.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Init:
    """One way of drawing initial weights."""

    draw: Callable[[Tensor, ModelConfig, bool], Tensor]
    """Fills a matrix; the last argument says whether it is an embedding."""

    residual_factor: Callable[[ModelConfig], float] | None = None
    """What `out` and `down` are multiplied with after the draw; None leaves them alone."""


def initialise(module: nn.Module, config: ModelConfig) -> None:
    """Initial weights of one embedding or linear layer, for `nn.Module.apply`; other modules keep theirs."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return
    if config.ngpt:
        nn.init.normal_(module.weight)
    else:
        INITS[config.init].draw(module.weight, config, isinstance(module, nn.Embedding))


def scale_residual_output(weight: Tensor, config: ModelConfig) -> None:
    """Brings `out` or `down`, drawn like any linear layer, to its column of the table."""
    factor = INITS[config.init].residual_factor
    if config.init_zero_residual:
        nn.init.zeros_(weight)
    elif factor is not None:
        weight.detach().mul_(factor(config))


def _std(config: ModelConfig) -> float:
    return 0.02 if config.init_std is None else config.init_std


def _draw_uniform(weight: Tensor, config: ModelConfig, is_embedding: bool) -> Tensor:
    limit = config.embedding_init_range if is_embedding else config.decoder_init_range
    return nn.init.uniform_(weight, -limit, limit)


def _draw_truncated(weight: Tensor, config: ModelConfig, is_embedding: bool) -> Tensor:
    std = _std(config)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _draw_small(weight: Tensor, config: ModelConfig, is_embedding: bool) -> Tensor:
    return nn.init.normal_(weight, std=math.sqrt(2 / (5 * config.hidden_size)))


INITS: dict[str, Init] = {
    "uniform": Init(draw=_draw_uniform),
    "truncated_normal": Init(draw=_draw_truncated),
    "megatron": Init(
        draw=lambda weight, config, is_embedding: nn.init.normal_(weight, std=_std(config)),
        residual_factor=lambda config: 1 / math.sqrt(2 * config.num_hidden_layers),
    ),
    # 2 / (L sqrt(H)) by sqrt(2 / 5H), the standard deviation of the other layers.
    "small": Init(draw=_draw_small, residual_factor=lambda config: math.sqrt(10) / config.num_hidden_layers),
}
"""All initialisations."""
