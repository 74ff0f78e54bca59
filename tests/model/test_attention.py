"""Every backend of the table against the definition, forward and backward, and what the segmented operator promises."""

import random
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed import ROWS, pack, real_slots
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from neobert.model import attention, flex, segmented, short_documents
from neobert.model.attention import ATTENTION, AttentionBackend, choose_attention, reference_attention
from neobert.model.buckets import bucket_length
from neobert.model.segmented import SegmentedPlan
from neobert.model.segments import Segments
from neobert.model.short_documents import split_short

CPU = torch.device("cpu")


LONG = ((37, 1, 2), (48,), (1,), (16, 24, 8))
"""Rows of 48 slots: documents longer than a tile, of one token, and exactly as long as a bucket."""

WINDOWS = (None, 1, 2, 5, 16, 200)


def inputs(segments: Segments, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and an output gradient that is zero on padding; 2 heads of 16, strided as in a block."""
    generator = torch.Generator().manual_seed(1)
    slots = segments.ids.numel()
    qkv = torch.randn(slots, 6, 16, generator=generator, dtype=torch.float64)
    grad = torch.randn(slots, 2, 16, generator=generator, dtype=torch.float64) * real_slots(segments)[:, None, None]
    q, k, v = (x.detach() for x in qkv.to(device, dtype).split(2, dim=1))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad.to(device, dtype)


def results(
    backend: AttentionBackend, segments: Segments, dtype: torch.dtype, device: str = "cpu", window: int | None = None
) -> list[Tensor]:
    """Output and gradients of a backend on the real slots."""
    q, k, v, grad = inputs(segments, dtype, device)
    out = backend.attend(q, k, v, backend.prepare(segments.to(torch.device(device)), window), scale=0.3)
    out.backward(grad)
    return [x[real_slots(segments)].double().cpu() for x in (out, q.grad, k.grad, v.grad)]


def expected(segments: Segments, dtype: torch.dtype, window: int | None = None) -> list[Tensor]:
    """The definition in double precision, on the same numbers."""
    q, k, v, grad = (x.detach().double().requires_grad_() for x in inputs(segments, dtype))
    out = reference_attention(q, k, v, segments, scale=0.3, window=window)
    out.backward(grad.detach())
    return [x[real_slots(segments)] for x in (out, q.grad, k.grad, v.grad)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """`[T, N, D]`, where `seen` `[T, T]` says which keys a query attends to."""
    scores = torch.einsum("qnd,knd->nqk", q, k).mul(scale).masked_fill(~seen, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


class FakeVarlen:
    """Replaces a flash kernel on a machine without one: the definition, from the kernel's own arguments."""

    def __init__(self, scale_name: str, others: tuple[str, ...] = ()) -> None:
        self.scale_name, self.others, self.calls = scale_name, others, 0
        self.deterministic: object = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **named: Any
    ) -> Tensor:
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert max_q == max_k >= cu_q.diff().max()
        assert set(named) == {self.scale_name, "window_size", *self.others}
        self.deterministic = named.get("deterministic")
        self.calls += 1
        left, right = (x if x >= 0 else len(q) for x in named["window_size"])
        token = torch.arange(len(q))
        segment = torch.searchsorted(cu_q, token.int(), right=True)
        ahead = token[None, :] - token[:, None]
        seen = (segment[:, None] == segment[None, :]) & (ahead <= right) & (-ahead <= left)
        return plain_attention(q, k, v, seen, named[self.scale_name])


class FakeFlex:
    """Replaces FlexAttention: every block that its lists leave out is unseen, and full blocks need no mask."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float) -> Tensor:
        self.calls += 1
        size, num_tokens = flex.BLOCK, q.shape[2]
        assert q.shape[0] == 1
        assert (size, size) == block_mask.BLOCK_SIZE
        token = torch.arange(num_tokens)
        zero = torch.zeros((), dtype=torch.int64)
        masked = block_mask.mask_mod(zero, zero, token[:, None], token[None, :])
        partial = self.spread(block_mask.kv_num_blocks, block_mask.kv_indices, num_tokens)
        full = self.spread(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, num_tokens)
        assert not (partial & full).any()
        assert not (full & ~masked).any(), "a full block has something to mask"
        out = plain_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), (masked & partial) | full, scale)
        return out.transpose(0, 1)[None]

    @staticmethod
    def spread(counts: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
        """bool `[T, T]` of the tokens of listed blocks."""
        listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0])):
            listed[row, columns[:count].long()] = True
        wide = listed.repeat_interleave(flex.BLOCK, 0).repeat_interleave(flex.BLOCK, 1)
        return wide[:num_tokens, :num_tokens]


def _runs(name: str, device: str, dtype: torch.dtype) -> bool:
    available = device == "cpu" or torch.cuda.is_available()
    return available and ATTENTION[name].problem(torch.device(device), dtype, 16) is None


def device_for(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a backend is tested; where no device of this machine will do, a stand-in replaces its kernel."""
    device = next((d for d in ("cuda", "cpu") if _runs(name, d, dtype)), None)
    if device is not None:
        return device
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", FakeVarlen("scale"))
    monkeypatch.setattr(flex, "_compiled_flex_attention", FakeFlex)
    monkeypatch.setattr(flex, "BLOCK", 4)
    return "cpu"


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("rows", "slots"), [(ROWS, 16), (LONG, 48)], ids=["short", "long"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", ATTENTION)
def test_backend_matches_the_definition(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    rows: tuple[tuple[int, ...], ...],
    slots: int,
    window: int | None,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = device_for(name, dtype, monkeypatch)
    monkeypatch.setattr(segmented, "_LEAST_QUERIES", 4)  # with a window, several tiles a document
    segments = replace(pack(rows, slots)[1], causal=causal)
    for got, want in zip(results(ATTENTION[name], segments, dtype, device, window), expected(segments, dtype, window)):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_a_window_is_half_to_either_side() -> None:
    """With a window of 4 or 5, token 5 of ten sees 3 to 7: the values are the tokens' numbers, all scores equal."""
    _, segments = pack([(10,)], 10)
    numbers = torch.arange(10.0)[:, None, None].expand(10, 1, 16)
    for window in (4, 5):
        out = reference_attention(numbers * 0, numbers, numbers, segments, scale=1.0, window=window)[:, 0, 0]
        assert out.tolist() == pytest.approx([1, 1.5, 2, 3, 4, 5, 6, 7, 7.5, 8])


def test_a_causal_token_sees_itself_and_those_before_it_in_its_document() -> None:
    """Documents of three and two tokens whose values are 0 to 4, all scores equal."""
    segments = replace(pack([(3, 2)], 5)[1], causal=True)
    numbers = torch.arange(5.0)[:, None, None].expand(5, 1, 16)
    out = reference_attention(numbers * 0, numbers, numbers, segments, scale=1.0)[:, 0, 0]
    assert out.tolist() == pytest.approx([0, 0.5, 1, 3, 3.5])
    near = reference_attention(numbers * 0, numbers, numbers, segments, scale=1.0, window=2)[:, 0, 0]
    assert near.tolist() == pytest.approx([0, 0.5, 1.5, 3, 3.5])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdpa_in_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, causal: bool) -> None:
    """A document longer than a tile is cut, and its keys and values add up over the tiles."""
    monkeypatch.setattr(segmented, "_TILE", 20)
    monkeypatch.setattr(segmented, "_LEAST_QUERIES", 2)
    segments = replace(pack(ROWS, 16)[1], causal=causal)
    for got, want in zip(results(ATTENTION["sdpa"], segments, dtype, "cpu"), expected(segments, dtype)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("longest", [0, 4, 64])
def test_sdpa_in_whole_blocks(monkeypatch: pytest.MonkeyPatch, longest: int, causal: bool) -> None:
    """Rounding a document up to a block, in one tile or in several or together with others of its length, takes nothing
    from its neighbours."""
    monkeypatch.setattr(short_documents, "LONGEST", longest)
    segments = replace(pack(ROWS, 16)[1], causal=causal)
    want = expected(segments, torch.bfloat16)
    for block, least in ((1, 128), (4, 128), (4, 4), (32, 2)):
        monkeypatch.setattr(segmented, "_BLOCK", block)
        monkeypatch.setattr(segmented, "_TILE", 1 if least < 128 else 2**20)
        monkeypatch.setattr(segmented, "_LEAST_QUERIES", least)
        for got, exact in zip(results(ATTENTION["sdpa"], segments, torch.bfloat16, "cpu"), want):
            torch.testing.assert_close(got, exact, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("window", [-1, 16])
def test_sdpa_multiplies_few_shapes_in_bf16(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Of every length at every position, the end of the stream too: torch's library keeps code for each shape."""
    shapes = set()
    for name in ("bmm", "baddbmm"):
        product = getattr(torch, name)

        def note(*args: Any, product: Any = product, **named: Any) -> Tensor:
            shapes.add(tuple(x.shape for x in args[-2:]))
            return product(*args, **named)

        monkeypatch.setattr(torch, name, note)
    for length in range(1, 97):
        borders = torch.tensor([[0, 5], [5, 5 + length]])
        q = torch.zeros(5 + length, 1, 4, dtype=torch.bfloat16)
        segmented._forward_by_document(q, q, q, borders, 0.3, window)
        segmented._backward_by_document(q, q, q, q, borders, 0.3, window)
    # Of slots, and of documents that go together.
    assert {n for pair in shapes for shape in pair for n in shape} == {1, 2, 4, 32, 64, 96}


def test_short_documents_of_one_length_go_together() -> None:
    """In bf16 with the numbers of one at a time, in batches of 1, 2, 4, ...; longer ones, and those with keys out of
    reach, stay."""
    lengths = [13, 5, 64, 65, 1, 40, 32, 33, 120] + [14] * 9
    ends = torch.tensor(lengths).cumsum(0)
    borders = torch.stack((ends - torch.tensor(lengths), ends))
    q, k, v, grad = torch.randn(4, int(ends[-1]), 2, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    for reach, kept in ((-1, [65, 120]), (13, [64, 65, 40, 32, 33, 120])):
        batches, rest = split_short(borders, block=32, reach=reach, num_heads=2)
        assert rest.diff(dim=0).flatten().tolist() == kept
        assert sorted(int(x) for batch in batches for x in batch.is_own_BL.sum(1)) == sorted(set_aside(lengths, kept))
        assert {len(batch.slots_BL) for batch in batches} <= {1, 2, 4, 8}
        one_by_one = [
            [
                segmented._forward_by_document(q, k, v, border[:, None], 0.3, reach),
                *segmented._backward_by_document(grad, q, k, v, border[:, None], 0.3, reach),
            ]
            for border in borders.T
        ]
        together = (
            segmented._forward_by_document(q, k, v, borders, 0.3, reach),
            *segmented._backward_by_document(grad, q, k, v, borders, 0.3, reach),
        )
        for found, *parts in zip(together, *one_by_one):
            torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=1e-2, rtol=1e-2)


def set_aside(lengths: list[int], kept: list[int]) -> list[int]:
    rest = list(lengths)
    for length in kept:
        rest.remove(length)
    return rest


def in_buckets(segments: Segments, window: int | None = None) -> SegmentedPlan:
    """A plan as for a GPU, with its tensors on the CPU."""
    plan = segmented.prepare_segmented(segments, window)
    buckets, slots = segmented.plan_buckets(plan.borders, segments.ids.numel())
    return plan._replace(borders=buckets, slots=slots)


def results_in_buckets(segments: Segments, dtype: torch.dtype, window: int | None) -> list[Tensor]:
    q, k, v, grad = inputs(segments, dtype)
    out = segmented.attend_segmented(q, k, v, in_buckets(segments, window), scale=0.3)
    out.backward(grad)
    return [x[real_slots(segments)].double() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scores", [1, 2**26])
def test_buckets_match_the_definition(
    scores: int, window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few scores at a time, every document is computed by itself."""
    monkeypatch.setattr("neobert.model.buckets._BUCKET_SCORES", scores)
    segments = replace(pack(LONG, 48)[1], causal=causal)
    got = results_in_buckets(segments, torch.float32, window)
    for one, want in zip(got, expected(segments, torch.float32, window)):
        torch.testing.assert_close(one, want, atol=1e-5, rtol=1e-5)


def test_buckets_hold_every_document_once() -> None:
    assert [bucket_length(n) for n in (1, 16, 17, 24, 25, 33, 49, 64, 65, 1000)] == [
        *(16, 16, 24, 24, 32, 48, 64, 64, 96, 1024)
    ]
    borders = torch.tensor([[0, 3, 3, 20], [3, 3, 20, 40]])
    buckets, slots = segmented.plan_buckets(borders, 40)
    assert buckets.T.tolist() == [[16, 1], [24, 2]] + [[0, 0]] * 10
    assert slots.shape == (40 + 20 + 16 * 4,), "the size depends on the shape of the batch alone"
    assert slots[:16].tolist() == [0, 1, 2] + [2] * 13
    assert slots[16:40].tolist() == [*range(3, 20)] + [19] * 7
    assert slots[40:64].tolist() == [*range(20, 40)] + [39] * 4


def random_case(seed: int) -> tuple[Segments, int | None]:
    """Documents of 1 to 60 tokens in up to four rows of 60, the last slots of a row often padding; a window or none."""
    choose = random.Random(seed)
    rows = []
    for _ in range(choose.randint(1, 4)):
        lengths: list[int] = []
        while sum(lengths) < 60 and choose.random() < 0.8:
            lengths.append(min(choose.choice((1, 2, 7, 20, 60)), 60 - sum(lengths)))
        rows.append(tuple(lengths) or (1,))
    _, segments = pack(rows, 60, num_borders=250)
    return segments, choose.choice((None, 1, 3, 8, 30, 100))


def check_random_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    segments, window = random_case(seed)
    choose = random.Random(seed)
    monkeypatch.setattr(segmented, "_TILE", choose.choice((1, 200, 2**20)))
    monkeypatch.setattr(segmented, "_LEAST_QUERIES", choose.choice((1, 5, 128)))
    monkeypatch.setattr(segmented, "_BLOCK", choose.choice((1, 4, 32)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        want = expected(segments, dtype, window)
        for got in (
            results(ATTENTION["sdpa"], segments, dtype, window=window),
            results_in_buckets(segments, dtype, window),
        ):
            for one, exact in zip(got, want):
                torch.testing.assert_close(
                    one, exact, atol=tolerance, rtol=tolerance, msg=lambda m: f"seed {seed}: {m}"
                )


@pytest.mark.parametrize("seed", range(12))
def test_sdpa_on_random_documents(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_case(seed, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 600))
def test_sdpa_on_many_random_documents(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_case(seed, monkeypatch)


def test_rows_after_the_end_of_a_document_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed for whole blocks and dropped, and some products of bf16 look into the next row."""
    seen = []
    probabilities = segmented._probabilities
    monkeypatch.setattr(
        segmented, "_probabilities", lambda *args: seen.append(probabilities(*args).clone()) or seen[-1]
    )
    _, segments = pack([(2, 5, 20)], 27)
    for got, want in zip(
        results(ATTENTION["sdpa"], segments, torch.bfloat16, "cpu", window=1),
        expected(segments, torch.bfloat16, window=1),
    ):
        torch.testing.assert_close(got, want, atol=4e-2, rtol=4e-2)
    assert seen
    assert all(probs.isfinite().all() for probs in seen)


def test_work_of_a_window_is_linear_in_the_length() -> None:
    def work(length: int, reach: int) -> int:
        borders = torch.tensor([[0], [length]])
        (document,) = segmented._documents(borders, torch.empty(4, length, 8, dtype=torch.bfloat16), reach)
        own = [(t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in document.tiles]
        return sum(own)

    assert work(4096, -1) == 4096**2
    assert work(4096, 64) <= 4096 * (128 + 2 * 64)
    assert work(8192, 64) == pytest.approx(2 * work(4096, 64), rel=0.02)
    assert work(100, 128) == work(100, -1) == 128**2, "a window that reaches over the whole document changes nothing"


def test_sdpa_gradients_are_the_derivatives() -> None:
    _, segments = pack([(3, 1)], 5)
    causal = replace(segments, causal=True)
    qkv = torch.randn(3, 5, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plans = [segmented.prepare_segmented(x, window) for x in (segments, causal) for window in (None, 2)]
    for plan in (*plans, in_buckets(segments, 2), in_buckets(causal)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, plan=plan: segmented.attend_segmented(q, k, v, plan, scale=0.3),
            tuple(x.detach().requires_grad_() for x in qkv),
        )


def test_sdpa_leaves_padding_at_zero() -> None:
    _, segments = pack(ROWS, 16)
    q, k, v, _ = inputs(segments, torch.float32)
    out = ATTENTION["sdpa"].attend(q, k, v, ATTENTION["sdpa"].prepare(segments), scale=0.3)
    assert out[~real_slots(segments)].eq(0).all()
    assert out[real_slots(segments)].ne(0).all()


def test_sdpa_keeps_nothing_quadratic() -> None:
    """What the backward needs is linear in the length of a document."""
    _, segments = pack([(64,)], 64)
    q, k, v, _ = inputs(segments, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ATTENTION["sdpa"].attend(q, k, v, ATTENTION["sdpa"].prepare(segments), scale=0.3)
    assert kept
    assert max(kept) <= q.numel()


def test_sdpa_keeps_the_dtype_under_autocast() -> None:
    _, segments = pack(ROWS, 16)
    q, k, v, grad = inputs(segments, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ATTENTION["sdpa"].attend(q, k, v, ATTENTION["sdpa"].prepare(segments), scale=0.3)
        out.backward(grad)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference_attention(q, k, v, segments, scale=0.3) * out.ne(0))


def test_auto_takes_what_works() -> None:
    assert choose_attention("auto", device=CPU, dtype=torch.bfloat16).name == "sdpa"
    assert choose_attention("auto", device=torch.device("cuda"), dtype=torch.float32).name == "sdpa"
    assert choose_attention("sdpa", device=torch.device("cuda"), dtype=torch.bfloat16).name == "sdpa"


def test_auto_takes_varlen_on_a_modern_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention("auto", device=torch.device("cuda"), dtype=torch.bfloat16).name == "flash_attn_varlen"


def test_a_choice_that_cannot_be_met_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"model\.attn_backend: 'flash_attn_varlen' needs a CUDA .* on cpu.*sdpa.*auto"
    ):
        choose_attention("flash_attn_varlen", device=CPU, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not in float32: write trainer\.mixed_precision: bf16"):
        choose_attention("flash_attn_varlen", device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"needs an Ampere GPU or later, not Tesla T4"):
        choose_attention("flash_attn_varlen", device=torch.device("cuda"), dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"model\.attn_backend: 'flex' cannot train on cpu, .* no backward: write .*sdpa"
    ):
        choose_attention("flex", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model\.attn_backend: 'eager' is unknown; write one of auto, flash.*, sdpa"):
        choose_attention("eager", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("package", [False, True])
def test_varlen_hands_its_kernel_what_it_needs(
    package: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash-attn packages take a flag for a deterministic backward; torch's kernel reads torch's setting."""
    _, segments = pack(ROWS, 16)
    fake = FakeVarlen("softmax_scale", ("deterministic",)) if package else FakeVarlen("scale")
    monkeypatch.setattr(attention, "flash_attn_varlen_func", fake if package else None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    got = results(ATTENTION["flash_attn_varlen"], segments, torch.float32, window=4)
    for one, want in zip(got, expected(segments, torch.float32, 4)):
        torch.testing.assert_close(one, want, atol=1e-5, rtol=1e-5)
    assert fake.calls == 1
    assert fake.deterministic == (deterministic if package else None)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (40, False), (None, True), (40, True)])
def test_flex_itself_computes_the_definition(window: int | None, causal: bool) -> None:
    """torch's FlexAttention runs forward on a CPU: blocks of 128, the last one short."""
    segments = replace(pack([(130, 1, 69), (5, 195)], 200)[1], causal=causal)
    q, k, v = (x.detach() for x in inputs(segments, torch.float32)[:3])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it computes all scores
        swapped = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = flex_attention(*swapped, block_mask=flex.prepare_flex(segments, window), scale=0.3)
    want = reference_attention(q, k, v, segments, scale=0.3, window=window)
    got = out[0].transpose(0, 1)
    torch.testing.assert_close(got[real_slots(segments)], want[real_slots(segments)], atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
def test_the_compiled_kernel_of_flex_computes_the_definition_for_all_documents() -> None:
    """Half a minute, most of it for inductor: the kernel that it writes is compiled once for all documents."""
    torch.compiler.reset()
    counters.clear()
    for rows in ([(130, 1, 69), (5, 195)], [(100, 50, 50), (199,)], [(1,) * 100, (20,) * 10]):
        _, segments = pack(rows, 200, num_borders=400)
        q, k, v = (x.detach() for x in inputs(segments, torch.float32)[:3])
        with torch.no_grad():
            got = flex.attend_flex(q, k, v, flex.prepare_flex(segments), scale=0.3)
        want = reference_attention(q, k, v, segments, scale=0.3)
        torch.testing.assert_close(got[real_slots(segments)], want[real_slots(segments)], atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_flex_finds_its_blocks_without_looking_at_values() -> None:
    """Their lists have one shape for all documents; a block inside a document is full."""
    shapes = []
    for rows in ([(512,)], [(1,) * 500], [(300, 212)]):
        _, segments = pack(rows, 512, num_borders=600)
        mask = flex.prepare_flex(segments)
        shapes.append((mask.kv_indices.shape, mask.full_kv_indices.shape, mask.q_indices.shape))
    assert len(set(shapes)) == 1
    assert mask.full_kv_num_blocks.flatten().tolist() == [2, 2, 0, 1]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 4, 1]


def test_heads_that_a_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    for head_dim in (12, 264):
        with pytest.raises(
            ValueError,
            match=rf"model\.attn_backend: 'flash_attn_varlen' needs heads of a multiple of 8 .*model\.hidden_size / "
            rf"model\.num_attention_heads is {head_dim}",
        ):
            choose_attention("flash_attn_varlen", device=cuda, dtype=torch.bfloat16, head_dim=head_dim)
        assert choose_attention("auto", device=cuda, dtype=torch.bfloat16, head_dim=head_dim).name == "sdpa"
    assert choose_attention("auto", device=cuda, dtype=torch.bfloat16, head_dim=64).name == "flash_attn_varlen"
    with pytest.raises(ValueError, match=r"'flex' needs heads of at least 16, .* is 8: choose fewer heads"):
        choose_attention("flex", device=cuda, dtype=torch.float32, head_dim=8)
    assert choose_attention("flex", device=cuda, dtype=torch.float32, head_dim=16).name == "flex"


def test_buckets_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy to a GPU comes from page-locked memory, once a batch; the operators read a small table of buckets."""
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.numel()) or self)
    copies: list[dict[str, Any]] = []
    monkeypatch.setattr(Tensor, "to", lambda self, *where, **how: copies.append(how) or self)
    _, segments = pack(LONG, 48)
    on_gpu = SimpleNamespace(
        ids=SimpleNamespace(device=torch.device("cuda"), numel=segments.ids.numel),
        cu_seqlens_cpu=segments.cu_seqlens_cpu,
        causal=False,
    )
    plan = segmented.prepare_segmented(on_gpu)  # type: ignore[arg-type]
    assert pinned == [plan.slots.numel()]
    assert copies == [{"non_blocking": True}, {}]  # the second finds it there
