"""The fused kernel of linear_cross_entropy for CUDA devices, written in Triton.

    loss_sum = sum over counted m of lse_m - logit[m, target_m] + z * lse_m^2
    lse_m    = logsumexp over v of logit[m, v]

Forward: a program takes a block of rows and a part of the vocabulary. It computes logits tile by tile, keeps a running
maximum and a running sum of exponentials (online softmax, Milakov & Gimelshein, arXiv 1805.02867), and writes one
partial lse per row. Partial values of all parts are merged by one more logsumexp. No logit leaves the chip.

Backward: with lse known the gradient of a logit needs nothing but the logit,

    d loss / d logit[m, v] = softmax[m, v] * (1 + 2 z lse_m) - [v == target_m]     (zero where the target is ignored)

so logits are computed a second time, for a chunk of the vocabulary after another, and their gradients `[M, C]` are
written in the dtype of the products. Two library products make d hidden (summed over chunks in fp32) and the chunk's
rows of d weight, which are final: the vocabulary, not the rows, is what is cut.

Why again in the backward, and not gradients in the forward as the torch version: an online logsumexp is known after the
last tile, so gradients need the logits a second time in any case. In the backward the factor that comes from above is
applied on the way, an evaluation pays for one product only, nothing of the size of the weight is kept between forward
and backward, and a second backward is allowed. The price is 8 instead of 6 M D V of multiply-adds.

The kernels also run in Triton's interpreter on a CPU (TRITON_INTERPRET=1 before triton is imported): that is how they
are tested without a GPU. They are not autotuned, which the interpreter cannot do; the tiles are in TILES.

Legend: M rows, D hidden size, V vocabulary, C vocabulary rows of a chunk, S parts of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in the interpreter, whose products take bf16 for integers: there operands are widened first."""

CHUNK_BYTES = 512 * 2**20
"""Gradients of one chunk of logits, `[M, C]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Sizes of the block that one program multiplies at a time, and how it is scheduled."""

    rows: int
    columns: int
    depth: int
    """Slice of the hidden size per product."""

    part: int
    """Tiles of columns that one program of the forward goes through."""

    num_warps: int
    num_stages: int


TILES = {
    2: Tile(rows=128, columns=128, depth=64, part=8, num_warps=8, num_stages=3),
    4: Tile(rows=64, columns=64, depth=32, part=16, num_warps=4, num_stages=3),
}
"""By bytes of an element of the products: bf16 and fp16, and fp32."""


def triton_linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    count_correct: bool = False,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See LinearCrossEntropy. bf16, fp16 and fp32; logits and sums are fp32 whatever the dtype of the products."""
    device_type = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_MD.dtype
    loss_sum, num_correct, z_sum = _TritonLinearCrossEntropy.apply(
        hidden_MD, weight_VD, targets_M, ignore_index, count_correct, z_loss, dtype
    )
    return loss_sum, num_correct, z_sum


class _TritonLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        ignore_index: int,
        count_correct: bool,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Ignored rows become zero rows with target -1: whatever is in them cannot reach a gradient.
        counted_M = targets_M != ignore_index
        targets = torch.where(counted_M, targets_M, -1).int()
        hidden = torch.where(counted_M[:, None], hidden_MD, 0).to(dtype).contiguous()
        weight = weight_VD.to(dtype).contiguous()
        lse_M, target_logit_M, best_M = _reduce_logits(hidden, weight, targets, count_correct)
        losses_M = torch.where(counted_M, lse_M - target_logit_M + z_loss * lse_M.square(), 0)
        ctx.save_for_backward(hidden, weight, targets, lse_M)
        ctx.z_loss, ctx.dtypes = z_loss, (hidden_MD.dtype, weight_VD.dtype)
        num_correct = None
        if best_M is not None:
            num_correct = (best_M == targets).sum()
            ctx.mark_non_differentiable(num_correct)
        z_sum = torch.where(counted_M, z_loss * lse_M.square(), 0).sum() if z_loss else None
        if z_sum is not None:
            ctx.mark_non_differentiable(z_sum)
        return losses_M.sum(), num_correct, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse_M = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        (rows, size), vocabulary = hidden.shape, weight.shape[0]
        tile = TILES[hidden.element_size()]
        grad_hidden = torch.zeros((rows, size), dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty((vocabulary, size), dtype=weight_dtype, device=hidden.device)
        chunk = max(1, CHUNK_BYTES // (max(rows, 1) * hidden.element_size() * tile.columns)) * tile.columns
        buffer = torch.empty(rows * min(chunk, vocabulary), dtype=hidden.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, vocabulary if rows else 0, chunk):
                weight_CD = weight[first : first + chunk]
                grad_MC = buffer[: rows * len(weight_CD)].view(rows, len(weight_CD))
                _write_gradients(grad_MC, hidden, weight, targets, lse_M, grad_loss, first, ctx.z_loss, tile)
                grad_hidden += _product(grad_MC, weight_CD)
                grad_weight[first : first + chunk] = _product(grad_MC.T, hidden)
        if not rows:
            grad_weight.zero_()
        return grad_hidden.to(hidden_dtype), grad_weight, None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, whatever the dtype of the operands."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _reduce_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, count_correct: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of every row: logsumexp and the target's logit, fp32 `[M]`, and the column of the largest logit if asked for."""
    (rows, size), vocabulary, device = hidden.shape, weight.shape[0], hidden.device
    tile = TILES[hidden.element_size()]
    parts = triton.cdiv(vocabulary, tile.columns * tile.part)
    lse_SM = torch.empty((parts, rows), dtype=torch.float32, device=device)
    target_logit_M = torch.zeros(rows, dtype=torch.float32, device=device)
    max_SM = torch.empty((parts if count_correct else 0, rows), dtype=torch.float32, device=device)
    best_SM = torch.empty((parts if count_correct else 0, rows), dtype=torch.int32, device=device)
    if rows:
        _reduce_kernel[(triton.cdiv(rows, tile.rows), parts)](
            hidden,
            weight,
            targets,
            lse_SM,
            target_logit_M,
            max_SM,
            best_SM,
            rows,
            vocabulary,
            size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            PART=tile.part,
            EVEN=size % tile.depth == 0,
            COUNT=count_correct,
            PRECISION=_precision(),
            WIDEN=INTERPRETED,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    lse_M = torch.logsumexp(lse_SM, dim=0)
    if not count_correct:
        return lse_M, target_logit_M, None
    return lse_M, target_logit_M, best_SM.gather(0, max_SM.argmax(dim=0, keepdim=True))[0]


def _write_gradients(
    grad_MC: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse_M: Tensor,
    grad_loss: Tensor,
    first: int,
    z_loss: float,
    tile: Tile,
) -> None:
    """Fills `grad_MC` with the gradients of the logits of vocabulary rows `first`, `first + 1`, ..."""
    (rows, columns), size = grad_MC.shape, hidden.shape[1]
    _gradient_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
        grad_MC,
        hidden,
        weight,
        targets,
        lse_M,
        grad_loss,
        z_loss,
        first,
        columns,
        rows,
        size,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        EVEN=size % tile.depth == 0,
        PRECISION=_precision(),
        WIDEN=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _precision() -> str:
    """How fp32 operands are multiplied: as torch's own products. Products in bf16 do not depend on it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    row,
    column,
    num_rows,
    end,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of logits, fp32. Rows and columns beyond the end repeat the last one: the caller leaves them out."""
    hidden_at = hidden_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * size
    weight_at = weight_ptr + tl.minimum(column, end - 1).to(tl.int64)[:, None] * size
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, size, DEPTH):
        depth = start + tl.arange(0, DEPTH)[None, :]
        if EVEN:
            hidden = tl.load(hidden_at + depth)
            weight = tl.load(weight_at + depth)
        else:
            hidden = tl.load(hidden_at + depth, mask=depth < size, other=0.0)
            weight = tl.load(weight_at + depth, mask=depth < size, other=0.0)
        if WIDEN:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(hidden, tl.trans(weight), total, input_precision=PRECISION)
    return total


@triton.jit
def _reduce_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    lse_ptr,
    target_logit_ptr,
    max_ptr,
    best_ptr,
    num_rows,
    vocabulary,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Neighbouring programs differ in their rows and read the same part of the weight, which stays in the cache.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    first = part * COLUMNS * PART
    last = tl.minimum(first + COLUMNS * PART, vocabulary)
    target = tl.load(targets_ptr + row, mask=row < num_rows, other=-1)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    target_logit = tl.zeros((ROWS,), dtype=tl.float32)
    best = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logits = _logits(
            hidden_ptr,
            weight_ptr,
            row,
            column,
            num_rows,
            vocabulary,
            size,
            ROWS,
            COLUMNS,
            DEPTH,
            EVEN,
            PRECISION,
            WIDEN,
        )
        logits = tl.where(column[None, :] < vocabulary, logits, float("-inf"))
        target_logit += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
        tile_max = tl.max(logits, axis=1)
        if COUNT:
            # The first column of the largest logit, as argmax: equal logits are no hit for all of them.
            at_max = tl.where(logits == tile_max[:, None], column[None, :], vocabulary)
            best = tl.where(tile_max > largest, tl.min(at_max, axis=1), best)
        new_max = tl.maximum(largest, tile_max)
        total = total * tl.exp(largest - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), axis=1)
        largest = new_max
    inside = row < num_rows
    tl.store(lse_ptr + part * num_rows + row, largest + tl.log(total), mask=inside)
    tl.store(target_logit_ptr + row, target_logit, mask=inside & (target >= first) & (target < last))
    if COUNT:
        tl.store(max_ptr + part * num_rows + row, largest, mask=inside)
        tl.store(best_ptr + part * num_rows + row, best, mask=inside)


@triton.jit
def _gradient_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    lse_ptr,
    scale_ptr,
    z_loss,
    first,
    num_columns,
    num_rows,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = first + offset
    logits = _logits(
        hidden_ptr,
        weight_ptr,
        row,
        column,
        num_rows,
        first + num_columns,
        size,
        ROWS,
        COLUMNS,
        DEPTH,
        EVEN,
        PRECISION,
        WIDEN,
    )
    target = tl.load(targets_ptr + row, mask=row < num_rows, other=-1)
    lse = tl.load(lse_ptr + row, mask=row < num_rows, other=0.0)
    scale = tl.where(target >= 0, tl.load(scale_ptr), 0.0)
    grad = tl.exp(logits - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None]
    grad = (grad - tl.where(column[None, :] == target[:, None], 1.0, 0.0)) * scale[:, None]
    at = grad_ptr + row.to(tl.int64)[:, None] * num_columns + offset[None, :]
    inside = (row < num_rows)[:, None] & (offset < num_columns)[None, :]
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
