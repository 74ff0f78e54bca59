"""The kernel over all documents gets the real borders, in one compiled graph: counted with stand-ins for the kernel."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packed import pack, tiny_config
from torch import Tensor
from torch._dynamo.utils import counters

from neobert.benchmark.step_batches import made_up_policy
from neobert.data.rows.collate import Collator, bound_segments
from neobert.data.rows.packing import max_segments_per_row
from neobert.model import attention
from neobert.model.attention import ATTENTION, choose_attention, prepare_varlen
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.types import PackedRow

VARLEN = ATTENTION["flash_attn_varlen"]
BLOCK = 128
"""Queries of a block of the kernels."""


class BlockCounter:
    """Counts what a launch would start, and refuses what CUDA would."""

    def __init__(self) -> None:
        self.launched = self.useful = self.segments = self.launches = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **named: Any
    ) -> Tensor:
        lengths, heads = cu_q.diff(), q.shape[1]
        if len(lengths) > 65_535:
            raise RuntimeError("CUDA error: invalid configuration argument")
        assert lengths.min() > 0, "an empty segment"
        assert lengths.max() <= max_q, "tokens that no block computes"
        assert int(cu_q[-1]) == len(q)
        self.launched += math.ceil(max_q / BLOCK) * heads * len(lengths)
        self.useful += int(lengths.add(BLOCK - 1).div(BLOCK, rounding_mode="floor").sum()) * heads
        self.segments += len(lengths)
        self.launches += 1
        return q


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> BlockCounter:
    found = BlockCounter()
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", found)
    return found


def collate(rows: Sequence[Sequence[int]], length: int, longest: int | None = None) -> Segments:
    """The segments of a batch of these documents, as training collates it."""
    packed = [
        PackedRow(
            tokens=np.full(sum(lengths), 9, dtype=np.int32),
            lengths=tuple(lengths),
            documents=tuple(range(len(lengths))),
            offsets=(0,) * len(lengths),
            sources=(0,) * len(lengths),
            key=number,
        )
        for number, lengths in enumerate(rows)
    ]
    batch = Collator(
        policy=made_up_policy(64, 0.2),
        seed=1,
        draw="row",
        max_seq_length=length,
        max_segments=max_segments_per_row(length, packed=True),
        pad_id=0,
        max_segment_length=longest,
    )
    return batch(packed).segments


def run(segments: Segments, heads: int = 2) -> Tensor:
    q = torch.arange(float(segments.ids.numel()))[:, None, None].expand(-1, heads, 8)
    return VARLEN.attend(q, q, q, VARLEN.prepare(segments), scale=1.0)


@pytest.mark.parametrize(
    ("documents", "longest"),
    [((1024,), None), ((600, 424), None), ((100,) * 10, 128), ((250, 250, 250, 200), 256), ((33,) * 31, 64)],
)
def test_blocks_without_work_are_few(counter: BlockCounter, documents: Sequence[int], longest: int | None) -> None:
    """Of 64 x 1,024 slots; filled up to the size of `cu_seqlens` they were a hundred times as many."""
    segments = collate([documents] * 64, 1024, longest)
    run(segments)
    assert counter.launched <= 2 * counter.useful
    assert len(segments.cu_seqlens) > 64 * 128
    assert counter.segments <= 64 * (len(documents) + 1)  # a padding at the end of a row


def test_only_real_segments_are_launched(counter: BlockCounter) -> None:
    """Documents of very different lengths: as many blocks for each as for the longest, none for borders that fill."""
    rows = [(8,) * 40 + (704,), (1000, 24), (1024,)]
    run(collate(rows, 1024))
    assert (counter.segments, counter.launches) == (44, 1)
    assert counter.launched == 8 * 2 * 44


@pytest.mark.parametrize("rows", [400, 1100])
def test_more_segments_than_a_launch_takes(counter: BlockCounter, rows: int) -> None:
    """Full rows of the shortest documents; launches are as many for every batch of the shape."""
    segments = collate([(8,) * 128] * rows, 1024, 64)
    assert torch.equal(run(segments, 1)[:, 0, 0], torch.arange(rows * 1024.0))
    assert counter.segments == rows * 128
    assert counter.launches == (1 if rows == 400 else 3)
    shapes = [
        [tokens for _, tokens in prepare_varlen(s).launches] for s in (segments, collate([(9,)] * rows, 1024, 64))
    ]
    assert shapes[0] == shapes[1]


def test_a_row_of_more_segments_than_a_launch_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SEGMENTS", 3)
    prepare_varlen(pack([(2, 2, 2)], 6, 4)[1])
    with pytest.raises(ValueError, match=r"5 documents in a row of 10 slots .* 3 .* model\.attn_backend: flex"):
        prepare_varlen(pack([(2,) * 5], 10)[1])


def test_several_launches_compute_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *rest: Any, scale: float, **named: Any) -> Tensor:
        calls.append(len(cu_q) - 1)
        return _definition(q, k, v, cu_q, scale)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(attention, "MOST_SEGMENTS", 6)
    _, segments = pack([(7, 5), (9,), (3, 3, 6), (16,), (4, 4)], 16, 5 * 3 + 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 80, 2, 8, generator=generator)
    got = VARLEN.attend(q, k, v, VARLEN.prepare(segments), scale=0.3)
    want = attention.reference_attention(q, k, v, segments, scale=0.3)
    real = segments.ids.flatten() != 0
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    assert calls == [5, 5, 3]


def _definition(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    segment = torch.searchsorted(borders, torch.arange(len(q), dtype=torch.int32), right=True)
    scores = scale * torch.einsum("qnd,knd->nqk", q, k)
    scores = scores.masked_fill(segment[:, None] != segment[None, :], float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


@torch.library.custom_op("neobert_tests::varlen", mutates_args=())
def opaque_varlen(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float) -> Tensor:
    """A kernel as the compiler sees it: an operator that knows shapes alone."""
    assert borders.diff().max() <= longest
    return _definition(q, k, v, borders, scale)


@opaque_varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float) -> Tensor:
    return torch.empty_like(q)


def test_one_graph_serves_batches_of_different_numbers_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, five batches, with 2 to 12 real segments: one compilation, and the eager result each time."""
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size: opaque_varlen(q, k, v, cu_q, max_q, scale),
    )
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    config = tiny_config(max_position_embeddings=16)
    torch.manual_seed(0)
    encoder = Encoder(config, VARLEN)
    batches = [[(7, 5), (9,)], [(16,), (16,)], [(2,) * 5, (3, 3, 3)], [(15, 1), (1, 5, 5, 4)], [(4,) * 4, (2,) * 8]]
    packed = [pack(rows, 16) for rows in batches]
    tokens = torch.randint(1, 50, (2, 16), dtype=torch.int32)
    with torch.no_grad():
        want = [encoder(tokens, *one) for one in packed]
        for block in encoder.layers:
            block.compile(backend=backend, dynamic=False)
        try:
            got = [encoder(tokens, *one) for one in packed]
        finally:
            torch.compiler.reset()
    assert len({len(s.cu_seqlens_cpu.unique()) for _, s in packed}) == 5
    assert len(graphs) == 1
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_bound_of_a_segment_follows_the_longest_document() -> None:
    assert [bound_segments([n], 1024) for n in (1, 62, 63, 126, 500, 1022, 9000)] == [4, 64, 128, 128, 512, 1024, 1024]
    assert bound_segments([10, None], 1000) == 1000
    assert bound_segments([600], 1000) == 1000
    # What a row has left is cut, so that no segment is longer.
    assert collate([(10,), (16, 16, 30)], 64, 32).cu_seqlens.unique().tolist() == [0, 10, 42, 64, 80, 96, 126, 128]


def test_flash_attention_3_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package may be there on a machine that it has no kernel for."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "_flash_3", lambda *given, **named: "3")
    monkeypatch.setattr(attention, "_flash_2", lambda *given, **named: "2")
    monkeypatch.setattr(attention, "flash_attn_varlen_func", attention._flash_3)
    monkeypatch.setattr(attention, "_WITHOUT_FLASH_3", "flash-attn 2")
    monkeypatch.setitem(ATTENTION, "flash_attn_varlen", replace(VARLEN, kernel="flash-attn 3"))
    monkeypatch.setattr(attention, "activate_flash_3", lambda: "torch cannot run it")
    plan = prepare_varlen(pack([(4,)], 4)[1])
    q = torch.zeros(4, 1, 8)
    for capability, version in (((8, 0), "2"), ((9, 0), "3"), ((10, 0), "2"), ((12, 0), "2")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for name in ("auto", "flash_attn_varlen"):
            backend = choose_attention(name, device=cuda, dtype=torch.bfloat16)
            assert backend.kernel == f"flash-attn {version}"
            assert backend.attend(q, q, q, plan, scale=1.0) == version


def test_torch_runs_flash_attention_3_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own operator, of which a compiled block is one graph. Nothing is activated on another GPU."""
    cuda, activated = torch.device("cuda"), []
    monkeypatch.setattr(attention, "_flash_3", lambda *given, **named: "3")
    monkeypatch.setattr(attention, "FLASH", "flash-attn 3")
    monkeypatch.setattr(attention, "_flash_2", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *given, **named: q + 1)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    plan, q = prepare_varlen(pack([(4,)], 4)[1]), torch.zeros(4, 1, 8)
    for capability in ((8, 0), (10, 0), (9, 0)):
        assert activated == []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        backend = choose_attention("auto", device=cuda, dtype=torch.bfloat16)
    assert activated == ["FA3"]
    assert backend.kernel == "flash-attn 3 in torch.nn.attention.varlen"
    assert torch.equal(backend.attend(q, q, q, plan, scale=1.0), q + 1)
    monkeypatch.setattr(attention, "_flash_3", None)
    assert choose_attention("auto", device=cuda, dtype=torch.bfloat16) is VARLEN
    assert activated == ["FA3"]


def test_what_is_in_the_way_of_flash_attention_3_is_said() -> None:
    if importlib.util.find_spec("flash_attn_interface") is None:
        assert "No module named 'flash_attn_interface'" in str(attention.activate_flash_3())


def test_one_graph_with_the_real_kernel_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operator, as the compiler sees it: on tensors without memory. Traced by AOT, joint and backward."""
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    counters.clear()
    encoder = Encoder(tiny_config(), VARLEN).to("meta", torch.bfloat16)
    for block in encoder.layers:
        block.compile(backend="aot_eager", dynamic=False)
    tokens = torch.zeros(2, 16, dtype=torch.int32, device="meta")
    try:
        for rows in ([(7, 5), (9,)], [(16,), (16,)], [(2,) * 5, (3, 3, 3)], [(4,) * 4, (2,) * 8]):
            positions, segments = pack(rows, 16)
            encoder(tokens, positions.to("meta"), segments.to(torch.device("meta"))).float().sum().backward()
    finally:
        torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1
