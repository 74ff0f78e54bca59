"""Attention within documents, on one flat stream of tokens.

A backend has two parts. `prepare` turns the borders of a batch's segments into what its kernel reads, once per forward
pass and kind of layer; `attend` runs once per layer. No backend lets a token see another document, and none has dropout
on attention probabilities. With a sliding window of w tokens, query i sees the keys j of its document with
|i - j| <= w // 2; where the segments are causal, only those with j <= i.

| backend | where | how |
|---|---|---|
| `flash_attn_varlen` | CUDA, bf16 or fp16 | one kernel over all documents: flash-attn 3, flash-attn 2, or torch's own |
| `sdpa` | everywhere | document by document on a CPU, in buckets of about one length elsewhere; `segmented.py` |
| `flex` | CUDA | FlexAttention with a mask of documents; `flex.py` |

Legend: T tokens of the flat stream, N heads, D head size.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from neobert.model.flex import attend_flex, flex_problem, prepare_flex
from neobert.model.segmented import attend_segmented, prepare_segmented
from neobert.model.segments import Segments

try:
    from flash_attn import flash_attn_varlen_func as _flash_2
except ImportError:
    _flash_2 = None
try:
    from flash_attn_interface import flash_attn_varlen_func as _flash_3
except ImportError:
    _flash_3 = None

flash_attn_varlen_func: Callable[..., Any] | None = _flash_3 or _flash_2
"""What `flash_attn_varlen` runs, see `choose_attention`; without it torch's own kernel."""

_WITHOUT_FLASH_3 = "torch.nn.attention.varlen" if _flash_2 is None else "flash-attn 2"
FLASH = _WITHOUT_FLASH_3 if _flash_3 is None else "flash-attn 3"
"""Its name, for the log."""

MOST_SEGMENTS = 65_535
"""Of one launch: the kernels count segments in the second dimension of CUDA's grid, which ends there."""


class Attend(Protocol):
    """`[T, N, D]` queries, keys and values to `[T, N, D]` outputs; `prepared` is the backend's own."""

    def __call__(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor: ...


class Prepare(Protocol):
    """Borders of the segments, whether they are causal, and a layer's sliding window in tokens, to what `attend` reads;
    no device sync."""

    def __call__(self, segments: Segments, window: int | None = None) -> Any: ...


class FindProblem(Protocol):
    """Why a backend cannot compute in a dtype on a device, with heads of a size where one is passed; else None."""

    def __call__(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """One way of computing attention within segments."""

    name: str
    """The value for `model.attn_backend`."""

    kernel: str
    """What runs, for the log."""

    prepare: Prepare

    attend: Attend

    problem: FindProblem = lambda device, dtype, head_dim=None: None
    """By default it runs everywhere."""

    def describe(self) -> str:
        """For the log."""
        return f"attention {self.name} ({self.kernel})"


def choose_attention(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> AttentionBackend:
    """The backend called `name`, or with `auto` the first of ATTENTION that works for `dtype` on `device`.

    `dtype` is what matrix products are computed in: the autocast dtype where autocast is on. Without `head_dim` the
    size of the heads is not checked. flash-attn 3 has kernels for compute capability 9 (Hopper) alone: there torch's
    varlen_attn runs them from now on, in the whole process, where both can; elsewhere the next one is taken.
    Raises ValueError for an unknown name and for a named backend that cannot run here.
    """
    if name == "auto":
        found = next(b for b in ATTENTION.values() if b.problem(device, dtype, head_dim) is None)
        return _with_kernel_of(found, device)
    if name not in ATTENTION:
        raise ValueError(f"model.attn_backend: {name!r} is unknown; write one of auto, {', '.join(sorted(ATTENTION))}")
    backend = ATTENTION[name]
    if (problem := backend.problem(device, dtype, head_dim)) is not None:
        raise ValueError(f"model.attn_backend: {name!r} {problem}; or write model.attn_backend: auto")
    return _with_kernel_of(backend, device)


def _with_kernel_of(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    if backend.name != "flash_attn_varlen" or _flash_3 is None:
        return backend
    if torch.cuda.get_device_capability(device)[0] != 9:
        return replace(backend, kernel=_WITHOUT_FLASH_3, attend=attend_varlen_without_flash_3)
    if activate_flash_3() is not None:
        return backend
    return replace(backend, kernel=f"{FLASH} in torch.nn.attention.varlen", attend=attend_varlen_by_torch)


def activate_flash_3() -> str | None:
    """Has torch's varlen_attn run flash-attn 3 in this process; else what is in the way.

    As torch's operator it is a part of a compiled block; the package's own function need not be.
    """
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # The package, its kernels or torch's entry is missing: each has an error of its own.
        return f"{type(error).__name__}: {error}"
    return None


def reference_attention(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, segments: Segments, *, scale: float, window: int | None = None
) -> Tensor:
    """The definition: one product over the whole stream with a mask of equal segments. For tests; any dtype."""
    rows, slots = segments.ids.shape
    ids_T = (segments.ids.long() + torch.arange(rows, device=segments.ids.device)[:, None] * (slots + 1)).flatten()
    scores_NTT = scale * torch.einsum("qnd,knd->nqk", q_TND, k_TND)
    apart_TT = ids_T[:, None] != ids_T[None, :]
    if window is not None:
        token_T = torch.arange(len(ids_T), device=ids_T.device)
        apart_TT |= (token_T[:, None] - token_T).abs() > window // 2
    if segments.causal:
        apart_TT |= torch.ones_like(apart_TT).triu(1)
    scores_NTT = scores_NTT.masked_fill(apart_TT, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores_NTT.softmax(dim=-1), v_TND)


# --- flash_attn_varlen: one kernel over all documents -------------------------------------------------------------


class VarlenPlan(NamedTuple):
    """What the kernel reads."""

    launches: tuple[tuple[Tensor, int], ...]
    """int32 borders on the device, counted from 0, and the number of tokens, of one launch after the other."""

    longest: int
    """Bound of a segment's length; the kernel launches blocks for so many tokens of every segment."""

    reach: tuple[int, int]
    """How far a token sees to the left and right; -1: no limit."""


def prepare_varlen(segments: Segments, window: int | None = None) -> VarlenPlan:
    """The real borders, without those that fill up `cu_seqlens`: the kernel launches blocks for every segment that it
    gets, empty or not.

    Their number is read on the host, and differs from batch to batch; the compiler is asked for one graph for all.
    Rows that together may have more than MOST_SEGMENTS segments go in several launches, as many for every batch of one
    shape.
    """
    reach = -1 if window is None else window // 2
    (rows, width), borders = segments.ids.shape, segments.cu_seqlens_cpu.tolist()
    slots_per_launch = max(1, MOST_SEGMENTS * rows // max(1, len(borders) - 1)) * width
    launches = []
    for start in range(0, rows * width, slots_per_launch):
        end = min(start + slots_per_launch, rows * width)
        first, last = bisect_left(borders, start), bisect_left(borders, end)
        if last - first > MOST_SEGMENTS:
            raise ValueError(
                f"{last - first} documents in a row of {width} slots are more than the {MOST_SEGMENTS} that "
                "flash_attn_varlen takes: write shorter rows, or model.attn_backend: flex"
            )
        part = segments.cu_seqlens[first : last + 1]
        part = part - start if start else part
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_dynamic(part, 0)
        launches.append((part, end - start))
    return VarlenPlan(tuple(launches), segments.max_seqlen, (reach, 0 if segments.causal else reach))


def attend_varlen(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself, by the flash-attn package or by torch's kernel.

    The backward is deterministic where torch's deterministic algorithms are asked for; torch's kernel looks for itself.
    """
    return _launch(flash_attn_varlen_func, q_TND, k_TND, v_TND, prepared, scale)


def attend_varlen_without_flash_3(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float
) -> Tensor:
    """The same on a GPU that flash-attn 3 has no kernel for."""
    return _launch(_flash_2, q_TND, k_TND, v_TND, prepared, scale)


def attend_varlen_by_torch(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """The same by torch's kernel, which is flash-attn 3 after `activate_flash_3`."""
    return _launch(None, q_TND, k_TND, v_TND, prepared, scale)


def _launch(
    flash: Callable[..., Any] | None, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, plan: VarlenPlan, scale: float
) -> Tensor:
    if len(plan.launches) == 1:
        return _launch_once(flash, q_TND, k_TND, v_TND, plan.launches[0][0], plan, scale)
    counts = [tokens for _, tokens in plan.launches]
    parts = zip(q_TND.split(counts), k_TND.split(counts), v_TND.split(counts), plan.launches)
    return torch.cat([_launch_once(flash, q, k, v, borders, plan, scale) for q, k, v, (borders, _) in parts])


def _launch_once(
    flash: Callable[..., Any] | None,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    plan: VarlenPlan,
    scale: float,
) -> Tensor:
    arguments = (q_TND, k_TND, v_TND, borders, borders, plan.longest, plan.longest)
    if flash is None:
        # Not at import: it brings torch's compiler, which takes a second, and a CPU needs neither.
        from torch.nn.attention.varlen import varlen_attn

        out_TND = varlen_attn(*arguments, scale=scale, window_size=plan.reach)
        assert isinstance(out_TND, Tensor), "a tuple only where auxiliary results are asked for"
        return out_TND
    deterministic = torch.are_deterministic_algorithms_enabled()
    out: Any = flash(*arguments, softmax_scale=scale, window_size=plan.reach, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # the first releases of flash-attn 3 add the logsumexps


def varlen_problem(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Flash kernels need a CUDA device of compute capability 8.0 (Ampere) or later, bf16 or fp16, heads in eights."""
    if device.type != "cuda":
        return f"needs a CUDA device, and this run computes on {device.type}: write model.attn_backend: sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16, not in {str(dtype).removeprefix('torch.')}: write trainer.mixed_precision: bf16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an Ampere GPU or later, not {torch.cuda.get_device_name(device)}: write model.attn_backend: sdpa"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return (
            "needs heads of a multiple of 8 and at most 256, and model.hidden_size / model.num_attention_heads is "
            f"{head_dim}: choose another model.num_attention_heads, or write model.attn_backend: sdpa"
        )
    return None


ATTENTION: dict[str, AttentionBackend] = {
    "flash_attn_varlen": AttentionBackend(
        name="flash_attn_varlen",
        kernel=FLASH,
        prepare=prepare_varlen,
        attend=attend_varlen,
        problem=varlen_problem,
    ),
    "sdpa": AttentionBackend(
        name="sdpa",
        kernel="document by document",
        prepare=prepare_segmented,
        attend=attend_segmented,
    ),
    "flex": AttentionBackend(
        name="flex",
        kernel="FlexAttention",
        prepare=prepare_flex,
        attend=attend_flex,
        problem=flex_problem,
    ),
}
"""All backends, in the order in which `auto` tries them."""
