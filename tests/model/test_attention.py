"""Every backend of the table against the definition, forward and backward, and what the segmented operator promises."""

import pytest
import torch
from packed import ROWS, pack, real_slots
from torch import Tensor

from neobert.model import attention
from neobert.model.attention import ATTENTION, AttentionBackend, choose_attention, reference_attention
from neobert.model.segments import Segments

CPU = torch.device("cpu")


def inputs(segments: Segments, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and an output gradient that is zero on padding; 2 heads of 8, strided as in a block."""
    generator = torch.Generator().manual_seed(1)
    slots = segments.ids.numel()
    qkv = torch.randn(slots, 6, 8, generator=generator, dtype=torch.float64)
    grad = torch.randn(slots, 2, 8, generator=generator, dtype=torch.float64) * real_slots(segments)[:, None, None]
    q, k, v = (x.detach() for x in qkv.to(device, dtype).split(2, dim=1))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad.to(device, dtype)


def results(backend: AttentionBackend, segments: Segments, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients of a backend on the real slots."""
    q, k, v, grad = inputs(segments, dtype, device)
    out = backend.attend(q, k, v, backend.prepare(segments.to(torch.device(device))), scale=0.3)
    out.backward(grad)
    return [x[real_slots(segments)].double().cpu() for x in (out, q.grad, k.grad, v.grad)]


def expected(segments: Segments, dtype: torch.dtype) -> list[Tensor]:
    """The definition in double precision, on the same numbers."""
    q, k, v, grad = (x.detach().double().requires_grad_() for x in inputs(segments, dtype))
    out = reference_attention(q, k, v, segments, scale=0.3)
    out.backward(grad.detach())
    return [x[real_slots(segments)] for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", ATTENTION)
def test_backend_agrees_with_the_definition(name: str, dtype: torch.dtype, tolerance: float) -> None:
    device = next((d for d in ("cpu", "cuda") if _works(name, d, dtype)), None)
    if device is None:
        pytest.skip(f"{name} does not compute in {dtype} here")
    _, segments = pack(ROWS, 16)
    for got, want in zip(results(ATTENTION[name], segments, dtype, device), expected(segments, dtype)):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def _works(name: str, device: str, dtype: torch.dtype) -> bool:
    available = device == "cpu" or torch.cuda.is_available()
    return available and ATTENTION[name].obstacle(torch.device(device), dtype) is None


def test_sdpa_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document longer than a tile is cut, and its keys and values add up over the tiles."""
    monkeypatch.setattr(attention, "_TILE", {"cpu": 20})
    monkeypatch.setattr(attention, "_LEAST_QUERIES", 2)
    _, segments = pack(ROWS, 16)
    for got, want in zip(results(ATTENTION["sdpa"], segments, torch.float32, "cpu"), expected(segments, torch.float32)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_sdpa_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding a document up to a block, in one tile or in several, takes nothing from its neighbours."""
    _, segments = pack(ROWS, 16)
    want = expected(segments, torch.bfloat16)
    for block, least in ((1, 128), (4, 128), (4, 4), (32, 2)):
        monkeypatch.setattr(attention, "_BLOCK", block)
        monkeypatch.setattr(attention, "_TILE", {"cpu": 1 if least < 128 else 2**20})
        monkeypatch.setattr(attention, "_LEAST_QUERIES", least)
        for got, exact in zip(results(ATTENTION["sdpa"], segments, torch.bfloat16, "cpu"), want):
            torch.testing.assert_close(got, exact, atol=4e-2, rtol=4e-2)


def test_sdpa_gradients_are_the_derivatives() -> None:
    _, segments = pack([(2, 1)], 4)
    qkv = torch.randn(3, 4, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    borders = attention.prepare_sdpa(segments)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention.segmented_attention(q, k, v, borders, 0.3), tuple(x.requires_grad_() for x in qkv)
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
    with pytest.raises(ValueError, match=r"model\.attn_backend: 'flex' is unknown; write one of auto, .*sdpa"):
        choose_attention("flex", device=CPU, dtype=torch.float32)


class FakeKernel:
    """Stands in for a flash kernel on a machine without one: the definition, with the kernel's arguments."""

    def __init__(self, segments: Segments) -> None:
        self.segments, self.called = segments, False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **scale: float
    ) -> Tensor:
        assert cu_q is cu_k is self.segments.cu_seqlens
        assert max_q == max_k == 16
        self.called = True
        return reference_attention(q, k, v, self.segments, scale=next(iter(scale.values())))


@pytest.mark.parametrize("kernel", ["varlen_attn", "flash_attn_varlen_func"])
def test_varlen_hands_its_kernel_the_borders(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, segments = pack(ROWS, 16)
    fake = FakeKernel(segments)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr(attention, kernel, fake)
    for got, want in zip(
        results(ATTENTION["flash_attn_varlen"], segments, torch.float32, "cpu"), expected(segments, torch.float32)
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert fake.called
