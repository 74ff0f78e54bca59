"""The normalised model, nGPT (Loshchilov et al., arXiv 2410.01131, sections 2.2 to 2.6), with attention to both sides.

Everything lives on the unit sphere: with u(x) = x / |x|,

    q, k = u(rotate(q)) s_qk, u(rotate(k)) s_qk           for each head; softmax scale sqrt(head size)
    h    = u(h + a_A (u(out(attention(q, k, v))) - h))    no norms, no residual sum: a step on the sphere
    h    = u(h + a_M (u(down(silu(gate s_g sqrt(H)) up s_u)) - h))
    z    = s_z (W h)                                      logits: s_z times the cosines of h and the rows of W

Every matrix has vectors of length 1 along the hidden size: rows of the embedding, of W, `qkv` and `gate_up`, columns of
`out` and `down`. They are scaled to it at the start and after every optimizer step (`normalise_`).

The learned scales are vectors: the rates a_A and a_M of the hidden size, s_qk one number for each coordinate of each
head, s_g and s_u of the feed-forward size, s_z one for each token. What is stored is parameter = value * base / initial
value, so that Adam, whose steps are about as long for every weight, moves a value at the pace of initial value / base:

| value | initial value | base |
|---|---|---|
| a_A, a_M (their absolute value counts) | 0.05 | `base_scale`, by default 1 / sqrt(H) |
| s_qk | 1 | `base_scale` |
| s_g, s_u | 1 | 1 |
| s_z | 1 | `base_scale` |

Here `up` has the factor sqrt(H) of the gate too, as in the authors' code; u() removes it. A weight decay would only
change the length of the step, and a warm-up is not needed: the paper uses neither.

Legend: T tokens of the flat stream, H hidden size, F feed-forward size, N heads, D head size.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.model.rotary import apply_rotary

INITIAL_RATE = 0.05
"""Initial value of a_A and a_M."""

UnitMatrix = tuple[Tensor, int]
"""A matrix and the dimension along which its vectors have length 1."""


class NormalizedBlock(nn.Module):
    """One block; see the head of this module for the formulas. Its linear layers are those of EncoderBlock."""

    def __init__(self, config: ModelConfig, attention: AttentionBackend) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.base = config.scale_base
        self.attend = attention.attend
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.attention_rate = nn.Parameter(torch.full((hidden,), self.base))
        self.ffn_rate = nn.Parameter(torch.full((hidden,), self.base))
        self.qk_scale = nn.Parameter(torch.full((hidden,), self.base))
        self.gate_up_scale = nn.Parameter(torch.ones(2 * ffn))

    def forward(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor] | None, prepared: Any) -> Tensor:
        """Hidden states of length 1 to hidden states of length 1; the arguments are those of EncoderBlock."""
        x_TH = self._towards(x_TH, self._attention(x_TH, rotation, prepared), self.attention_rate)
        return self._towards(x_TH, self._feed_forward(x_TH), self.ffn_rate)

    def _towards(self, x_TH: Tensor, target_TH: Tensor, rate_H: Tensor) -> Tensor:
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        rate_H = (rate_H * (INITIAL_RATE / self.base)).abs().to(wide)
        return unit(torch.lerp(x_TH.to(wide), unit(target_TH.to(wide)), rate_H)).to(x_TH.dtype)

    def _attention(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor] | None, prepared: Any) -> Tensor:
        assert rotation is not None, "the config refuses learned positions"
        qkv = self.qkv(x_TH).view(-1, 3 * self.num_heads, self.head_dim)
        qk, v_TND = qkv.split((2 * self.num_heads, self.num_heads), dim=1)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        scale_ND = (self.qk_scale / self.base).to(wide).view(self.num_heads, self.head_dim)
        qk = unit(apply_rotary(qk.to(wide), *rotation)).unflatten(1, (2, self.num_heads)) * scale_ND
        q_TND, k_TND = qk.to(qkv.dtype).unbind(1)
        return self.out(self.attend(q_TND, k_TND, v_TND, prepared, scale=self.head_dim**0.5).flatten(1))

    def _feed_forward(self, x_TH: Tensor) -> Tensor:
        scale = self.gate_up_scale * math.sqrt(x_TH.shape[-1])
        gate_up = self.gate_up(x_TH)
        gate_TF, up_TF = (gate_up * scale.to(gate_up.dtype)).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; a vector of zeros stays one."""
    return F.normalize(x, dim=-1)


def unit_matrices(blocks: Iterable[nn.Module]) -> list[UnitMatrix]:
    """The matrices of the NormalizedBlocks among `blocks`."""
    found: list[UnitMatrix] = []
    for block in blocks:
        if isinstance(block, NormalizedBlock):
            rows, columns = (block.qkv, block.gate_up), (block.out, block.down)
            found += [*((layer.weight, 1) for layer in rows), *((layer.weight, 0) for layer in columns)]
    return found


@torch.no_grad()
def normalise_(matrices: Iterable[UnitMatrix], *, unless: Tensor | None = None) -> None:
    """Scales the vectors of each matrix to length 1, in place and without a host sync.

    Args:
        matrices: Each with the dimension of its vectors.
        unless: Scalar on the device; where it is not 0, every bit stays.
    """
    for matrix, dim in matrices:
        length = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
        if unless is not None:
            length = torch.where(unless.bool(), torch.ones_like(length), length)
        matrix.div_(length)
