"""One lookup of embeddings for all chunks of a step, with one gradient.

The gradient of a lookup has the size of the whole table, however few rows were read. Chunk by chunk that would be a
table of zeros for each chunk, filled in a few rows and added up: here every chunk adds its rows to one table.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Lookup = Callable[[Tensor], Tensor]
"""`fn(ids [T]) -> [T, H]`."""


def share_lookup(weight_VH: Tensor) -> Lookup:
    """Rows of `weight_VH` for ids, as `F.embedding`; all calls have one gradient, equal to rounding."""
    tables: list[Tensor] = []
    shared_VH = _Collect.apply(weight_VH, tables)
    return lambda ids_T: _Rows.apply(ids_T, shared_VH, tables)


class _Collect(torch.autograd.Function):
    """Autograd comes here when all calls have added their rows."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, tables: list[Tensor]) -> Tensor:
        ctx.tables = tables
        ctx.set_materialize_grads(False)  # Calls give it nothing: no table of zeros for that.
        return weight_VH.view_as(weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *nothing: Tensor | None) -> tuple[Tensor | None, None]:
        return (ctx.tables.pop() if ctx.tables else None), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, shared_VH: Tensor, tables: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.tables, ctx.shape = tables, shared_VH.shape
        return F.embedding(ids_T, shared_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[None, None, None]:
        (ids_T,) = ctx.saved_tensors
        if not ctx.tables:
            ctx.tables.append(grad_TH.new_zeros(ctx.shape))
        # On a GPU this one sorts: the same bits every time, as the gradient of `F.embedding`.
        if grad_TH.is_cuda:
            ctx.tables[0].index_put_((ids_T.long(),), grad_TH, accumulate=True)
        else:
            ctx.tables[0].index_add_(0, ids_T, grad_TH)
        return None, None, None
