"""The vocabulary projection as one product: a bias is one more column of the weight.

Legend: M rows, V vocabulary, H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_COLUMNS = 8
"""Columns that a bias adds, all but the first of them zeros: kernels need the width in multiples of 16 bytes."""


def append_bias(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states `[M, H + 8]` and a weight `[V, H + 8]` whose product is hidden @ weight.T + bias.

    So every loss kernel takes a bias. The price is a copy of the weight, and one of its gradient.
    """
    ones_M1 = hidden_MH.new_ones(len(hidden_MH), 1)
    hidden = torch.cat((hidden_MH, F.pad(ones_M1, (0, BIAS_COLUMNS - 1))), dim=1)
    columns_V8 = F.pad(bias_V[:, None].to(weight_VH.dtype), (0, BIAS_COLUMNS - 1))
    return hidden, torch.cat((weight_VH, columns_V8), dim=1)
