"""Rotary positions (RoPE, Su et al., arXiv 2104.09864), half-split layout.

Coordinate i of a head's first half and coordinate i of its second half form one plane, which is rotated by
position * theta^(-2i / head_dim). A rotation by one angle of a query and by another of a key leaves their product a
function of the difference, so positions may be counted within each document or along the row: the result is the same.

The table is computed from the positions of each batch instead of being kept as a buffer. A buffer would be cast with
the module, and one that is not saved is left uninitialised by loaders that build modules without memory; a function
of the config cannot go wrong, and costs one cosine per token and plane and forward pass, whatever the number of layers.

Legend: T tokens of the flat stream, N heads, D head size.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rotary_table(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, fp32 `[T, 1, D / 2]`."""
    planes = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device)
    angles = positions_T[:, None, None].float() * theta ** (-planes / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `[T, N, D]` by a table of `rotary_table`; computed in fp32, returned in the dtype of `x_TND`."""
    return _Rotate.apply(x_TND, cos, sin)


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation by the opposite angle: nothing but the table is kept.

    Where it is compiled, what leaves a Function is always new: by torch 2.11, a tensor that an operation handed back
    (one that was changed in place, or cast to the dtype it had) has wrong gradients.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_TND, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TND: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _rotate(grad_TND, cos, -sin), None, None


_TILE = 256
"""Tokens that a CPU rotates together: what is computed on the way stays in its cache."""


def _rotate(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x_TND.device.type != "cpu" or torch.compiler.is_compiling():
        return _rotate_together(x_TND, cos, sin)
    out_TND = x_TND.new_empty(x_TND.shape)
    for out, *part in zip(*(x.split(_TILE) for x in (out_TND, x_TND, cos, sin))):
        out.copy_(_rotate_together(*part))
    return out_TND


def _rotate_together(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Both halves at once where that can be: on a CPU half the time of eight operations on halves.
    halves = x_TND.to(torch.promote_types(x_TND.dtype, cos.dtype)).unflatten(-1, (2, -1))
    first, second = halves.unbind(-2)
    out = halves * cos[..., None, :]
    out.select(-2, 0).addcmul_(second, sin, value=-1)
    out.select(-2, 1).addcmul_(first, sin)
    return out.flatten(-2).to(x_TND.dtype, copy=torch.compiler.is_compiling())  # A copy in fp32 too: see _Rotate.
