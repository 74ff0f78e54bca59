"""The fused linear cross entropy of liger-kernel (LinkedIn, arXiv 2410.10989) behind the signature of KERNELS.

It goes through the rows in chunks, writes the logits of a chunk, turns them into their gradient in place and multiplies
at once, as the torch version does, with the softmax of a chunk in one Triton kernel.
"""

import torch
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from torch import Tensor


def liger_linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    count_correct: bool = False,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See LinearCrossEntropy. The gradient of the weight is summed over chunks in fp32."""
    device_type = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_MD.dtype
    with torch.autocast(device_type, enabled=False):
        # Positional, as autograd functions are: after the three tensors come bias, class weights, ignore_index, z-loss,
        # label smoothing, reduction, softcap, return_z_loss, accumulation dtype, token scaling, and what to return.
        loss_sum, z_sum, _, predicted_M = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_MD.to(dtype),
            weight_VD.to(dtype),
            targets_M,
            None,
            None,
            ignore_index,
            z_loss,
            0.0,
            "sum",
            None,
            z_loss != 0.0,
            torch.float32,
            False,
            False,
            count_correct,
        )
    num_correct = ((predicted_M == targets_M) & (targets_M != ignore_index)).sum() if count_correct else None
    return loss_sum.float(), num_correct, None if z_sum is None else z_sum.detach().float()
