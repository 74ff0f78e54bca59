"""Linear layers whose three products run in fp8, with a scale for each row (`trainer.fp8`).

    y   = x W^T         [T, O]    rows of x and of W are scaled, over I
    d x = d y W         [T, I]    rows of d y and columns of W, over O
    d W = d y^T x       [O, I]    columns of d y and of x, over T

Each vector along the dimension that is summed over is divided by its largest magnitude / 448 and rounded to e4m3: 448
is the largest number of that type, which has 3 bits of fraction. The product is multiplied by both scales. As every
vector has its own scale, gradients fit into e4m3 too: the wider range of e5m2, with 2 bits of fraction, is not needed
(`python -m neobert.benchmark.fp8_error` compares them). Scales and sums are fp32; inputs and results are bf16, and what
waits for the backward is the bf16 input.

`torch._scaled_mm` has these products on CUDA from compute capability 8.9 on. `emulate` rounds the operands in the same
way and multiplies in fp32, on any device: it shows what the rounding does, and is slow.

Legend: T tokens, I inputs, O outputs of a layer, M, N, K sizes of a product.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neobert.model.config import FP8_MULTIPLE
from neobert.model.encoder import Encoder

LAYERS = ("qkv", "gate_up", "up", "down")
"""Of a block. `out` is the smallest and stays bf16."""

CAPABILITY = (8, 9)
"""From which compute capability on they exist: Ada and Hopper."""

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`fn(a_MK, scale_M1, b_NK, scale_N1)` to bf16 `[M, N]`: the product of a and the transpose of b, both in fp8."""


def quantise(x_RK: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Rows in fp8, contiguous, and the fp32 scales `[R, 1]` that they are multiplied with to have them back."""
    largest = torch.finfo(dtype).max
    x = x_RK.float()
    scale_R1 = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / largest
    return (x / scale_R1).clamp(-largest, largest).to(dtype).contiguous(), scale_R1


def scaled_product(a_MK: Tensor, scale_M1: Tensor, b_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """In fp8, see `Multiply`."""
    return torch._scaled_mm(a_MK, b_NK.T, scale_a=scale_M1, scale_b=scale_N1.T, out_dtype=torch.bfloat16)


def emulate(a_MK: Tensor, scale_M1: Tensor, b_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """What it computes, in fp32, see `Multiply`."""
    return ((a_MK.float() @ b_NK.float().T) * scale_M1 * scale_N1.T).to(torch.bfloat16)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, multiply: Multiply, gradients: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.multiply, ctx.gradients = multiply, gradients
        return multiply(*quantise(x_TI), *quantise(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        grad_x_TI = ctx.multiply(*quantise(grad_TO, ctx.gradients), *quantise(weight_OI.T))
        grad_OT, x_IT = (_filled_up(tensor.T) for tensor in (grad_TO, x_TI))
        return grad_x_TI, ctx.multiply(*quantise(grad_OT, ctx.gradients), *quantise(x_IT)), None, None


def _filled_up(x_RT: Tensor) -> Tensor:
    """With columns of zeros up to a multiple of FP8_MULTIPLE: they add nothing to a product over tokens."""
    missing = -x_RT.shape[1] % FP8_MULTIPLE
    return F.pad(x_RT, (0, missing)) if missing else x_RT


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, multiply: Multiply, gradients: torch.dtype = torch.float8_e4m3fn
) -> Tensor:
    """x W^T, rounded to bf16, in the dtype that a linear layer gives; gradients have the dtypes of the inputs.

    Args:
        gradients: the type that d y is rounded to.
    """
    kind = x_TI.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TI.dtype
    out: Tensor = _Fp8Product.apply(x_TI.bfloat16(), weight_OI.bfloat16(), multiply, gradients)
    return out.to(dtype)


class Fp8Linear(nn.Linear):
    """A linear layer without bias whose products are in fp8; its weight has the dtype and the name that it had."""

    def __init__(self, layer: nn.Linear, multiply: Multiply) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.multiply = layer.weight, multiply

    def forward(self, x_TI: Tensor) -> Tensor:
        return fp8_linear(x_TI, self.weight, self.multiply)


def use_fp8(encoder: Encoder, multiply: Multiply) -> None:
    """Puts an Fp8Linear around the weight of each of LAYERS in every block."""
    for block in encoder.layers:
        for name, layer in list(block.named_children()):
            if name in LAYERS:
                assert isinstance(layer, nn.Linear), name
                setattr(block, name, Fp8Linear(layer, multiply))


def fp8_problem(device: torch.device) -> str | None:
    """Why products in fp8 cannot run on a device; None where they can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, and this run computes on {device.type}"
    if torch.version.hip is not None:
        return "needs a GPU of NVIDIA, and this is a ROCm build of torch"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return (
            f"needs compute capability 8.9 or later, and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )
    return None


FP8_PRODUCTS: dict[str, Multiply] = {"rowwise": scaled_product, "emulated": emulate}
"""By the value of `trainer.fp8`."""
