"""Norms, feed-forward layers and the pre-norm encoder block.

    x = x + dropout(out(attention(rotate(qkv(attention_norm(x))))))
    x = x + dropout(down(act(gate_up(ffn_norm(x)))))

With `qk_norm` the queries and keys of each head go through an RMSNorm before the rotation, with one gain of D numbers
for the queries and one for the keys of all heads of a block (Dehghani et al., arXiv 2302.05442, section 2; with RMSNorm
as in Gemma 3, arXiv 2503.19786).

No layer has a bias. The fused `qkv` weight is `[3H, H]`: rows of the queries, then of the keys, then of the values,
each head by head. The fused `gate_up` weight of SwiGLU and GeGLU is `[2F, H]`: rows of the gate, then of what it
multiplies. GELU has `up` and `down`. The residual stream keeps the dtype it comes in: fp32 under autocast.

Blocks read no integer that differs between layers, so `torch.compile` compiles one block for all of them.

Legend: T tokens of the flat stream, H hidden size, F feed-forward size, N heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.model.rotary import apply_rotary


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467), in fp32, returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_TH: Tensor) -> Tensor:
        # Both operands in one dtype: torch's norm warns about a mixture and leaves its fused path.
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        x, weight = x_TH.to(wide), self.weight.to(wide)
        if x.is_cuda or torch.compiler.is_compiling():  # The compiler fuses the plain formula.
            return F.rms_norm(x, weight.shape, weight, self.eps).to(x_TH.dtype)
        return _RMSNormCPU.apply(x, weight, self.eps).to(x_TH.dtype)


class _RMSNormCPU(torch.autograd.Function):
    """On a CPU torch composes the norm from simple operators; with the backward written out it takes half the time."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True)
        inverse_T1 = torch.rsqrt(norm * norm / x_TH.shape[-1] + eps)
        ctx.save_for_backward(x_TH, weight_H, inverse_T1)
        return (x_TH * inverse_T1).mul_(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        """With u = x * inverse: the gradient of the weight is the sum over tokens of grad * u, that of x is
        inverse * (grad * weight - u * mean(grad * weight * u)). One product serves both, and its memory the result."""
        x_TH, weight_H, inverse_T1 = ctx.saved_tensors  # type: ignore[attr-defined]
        product_TH = grad_TH * x_TH
        grad_weight_H = inverse_T1[:, 0] @ product_TH
        along_T1 = (product_TH @ weight_H)[:, None] * inverse_T1.pow(3) / x_TH.shape[-1]
        grad_x_TH = torch.mul(grad_TH, weight_H, out=product_TH).mul_(inverse_T1)
        return grad_x_TH.addcmul_(x_TH, along_T1, value=-1), grad_weight_H, None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight, in fp32, returned in the dtype of x; no bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_TH: Tensor) -> Tensor:
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        weight = self.weight.to(wide)
        return F.layer_norm(x_TH.to(wide), weight.shape, weight, None, self.eps).to(x_TH.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config names, over the residual stream."""
    return (RMSNorm if config.rms_norm else LayerNorm)(config.hidden_size, config.norm_eps)


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up of fused `[T, 2F]`, to `[T, F]` (Shazeer, arXiv 2002.05202)."""
    if gate_up_TF.is_cuda or torch.compiler.is_compiling():
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF
    return _SwiGLUCPU.apply(gate_up_TF)


def geglu(gate_up_TF: Tensor) -> Tensor:
    """gelu(gate) * up of fused `[T, 2F]`, to `[T, F]`, with the exact GELU (Shazeer, arXiv 2002.05202)."""
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.gelu(gate_TF) * up_TF


class _SwiGLUCPU(torch.autograd.Function):
    """Keeps nothing but its input; the backward puts both halves of the gradient where the fused product reads them."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TF: Tensor) -> Tensor:
        (gate_up_TF,) = ctx.saved_tensors  # type: ignore[attr-defined]
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        out = torch.empty_like(gate_up_TF)
        grad_gate_TF, grad_up_TF = out.chunk(2, dim=-1)
        torch.mul(grad_TF, up_TF, out=grad_up_TF)  # What belongs there comes last.
        torch.ops.aten.silu_backward.grad_input(grad_up_TF, gate_TF, grad_input=grad_gate_TF)
        torch.ops.aten.silu.out(gate_TF, out=grad_up_TF).mul_(grad_TF)
        return out


class PredictionHead(nn.Module):
    """norm(gelu(dense(x))): what is before the vocabulary projection in BERT (arXiv 1810.04805, its code) and
    ModernBERT."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = build_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[..., H]`, in the same shape."""
        normed: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return normed


class EncoderBlock(nn.Module):
    """One pre-norm block; see the head of this module for the formula and the layout of the weights."""

    def __init__(self, config: ModelConfig, attention: AttentionBackend, *, attention_norm: bool = True) -> None:
        """Without `attention_norm` the attention reads its input as it is."""
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.dropout_prob = config.dropout_prob
        self.is_gated = config.is_gated
        self.activate = ACTIVATIONS[config.hidden_act]
        self.attend = attention.attend
        self.attention_norm = build_norm(config) if attention_norm else nn.Identity()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = build_norm(config)
        if self.is_gated:
            self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        else:
            self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor] | None, prepared: Any) -> Tensor:
        """`rotation` is the table of `rotary_table`, None without rotary positions; `prepared` is the backend's."""
        x_TH = x_TH + self._drop(self._attention(self.attention_norm(x_TH), rotation, prepared))
        return x_TH + self._drop(self._feed_forward(self.ffn_norm(x_TH)))

    def project(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[T, N, D]` of the normalised input, as the attention takes them."""
        qkv = self.qkv(x_TH).view(-1, 3 * self.num_heads, self.head_dim)
        qk, v_TND = qkv.split((2 * self.num_heads, self.num_heads), dim=1)
        if self.qk_norm:
            qk = self._norm_heads(qk)
        if rotation is not None:
            qk = apply_rotary(qk, *rotation)
        q_TND, k_TND = qk.chunk(2, dim=1)
        # The backward keeps the values: as a view they would keep the queries and keys before the rotation too.
        return q_TND, k_TND, v_TND if v_TND.is_cuda or torch.compiler.is_compiling() else v_TND.contiguous()

    def _attention(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor] | None, prepared: Any) -> Tensor:
        q_TND, k_TND, v_TND = self.project(x_TH, rotation)
        return self.out(self.attend(q_TND, k_TND, v_TND, prepared, scale=self.scale).flatten(1))

    def _norm_heads(self, qk: Tensor) -> Tensor:
        """Queries and keys `[T, 2N, D]`, each head normalised."""
        q_TND, k_TND = qk.chunk(2, dim=1)
        q, k = self.q_norm(q_TND.flatten(0, 1)), self.k_norm(k_TND.flatten(0, 1))
        return torch.cat((q.view(q_TND.shape), k.view(k_TND.shape)), dim=1)

    def _feed_forward(self, x_TH: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x_TH) if self.is_gated else self.up(x_TH)))

    def _drop(self, x_TH: Tensor) -> Tensor:
        return F.dropout(x_TH, self.dropout_prob, self.training) if self.dropout_prob else x_TH


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu, "gelu": F.gelu}
"""Values of `model.hidden_act`: what is between the projections of the feed-forward layer."""
