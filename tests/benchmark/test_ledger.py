"""What a step asks of a GPU, counted on fake tensors: a change that makes it more is seen here."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch

from neobert.benchmark import ledger
from neobert.benchmark.ledger import measure_ledger
from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import RowSource, made_up_rows
from neobert.types import PackedBatch

PAPER = StepSettings(preset="neobert", rows=64, length=1024)
SMALL = StepSettings(preset="small", rows=8, length=512)

BOUNDS = {
    # launches, elementwise GB, saved bytes; of a compiled block: fused bytes, saved bytes, graphs; attention blocks
    PAPER: (1_686, 546.0, 986_100, 80_680, 26_390, 1, 32_928),
    replace(PAPER, bf16_residual=True): (1_634, 534.0, 980_000, 70_170, 24_640, 1, 32_928),
    SMALL: (402, 4.25, 74_500, 29_510, 9_250, 1, 288),
}
"""What the code needs today, rounded up. Write lower numbers after an improvement; a higher one needs a reason."""


@pytest.mark.parametrize(
    "settings", BOUNDS, ids=lambda settings: settings.preset + (", bf16_residual" if settings.bf16_residual else "")
)
def test_a_step_asks_no_more_of_a_gpu_than_before(settings: StepSettings) -> None:
    """`python -m neobert.benchmark.ledger --rows 64 --length 1024` prints the numbers."""
    found = measure_ledger(settings)
    measured = (
        found.launches,
        found.elementwise_bytes / 1e9,
        found.saved_bytes_per_slot,
        found.fused_bytes_per_slot,
        found.compiled_saved_bytes_per_slot,
        found.graphs_per_block,
        found.attention_blocks,
    )
    names = [name for name in asdict(found) if name not in ("slots", "useful_attention_blocks")]
    over = {name: (got, bound) for name, got, bound in zip(names, measured, BOUNDS[settings]) if got > bound}
    assert over == {}, "name: (measured, bound)"
    assert not torch.is_autocast_enabled("cuda"), "the pretence ends"


def with_batches(change: Callable[[PackedBatch], PackedBatch]) -> Callable[[StepSettings], RowSource]:
    def build(settings: StepSettings) -> RowSource:
        source = made_up_rows(settings)
        return replace(source, batches=map(change, source.batches))

    return build


def test_the_blocks_of_attention_are_those_of_the_borders_that_the_kernel_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_real(batch: PackedBatch) -> PackedBatch:
        borders = torch.unique(batch.segments.cu_seqlens_cpu)
        return replace(batch, segments=replace(batch.segments, cu_seqlens=borders, cu_seqlens_cpu=borders))

    def filled_up(batch: PackedBatch) -> PackedBatch:
        borders = torch.cat([batch.segments.cu_seqlens_cpu, torch.full((1000,), 8 * 512, dtype=torch.int32)])
        return replace(batch, segments=replace(batch.segments, cu_seqlens=borders, cu_seqlens_cpu=borders))

    tiny = StepSettings(preset="tiny", rows=8, length=512, vocab_size=300)
    num_documents = len(torch.unique(next(made_up_rows(tiny).batches).segments.cu_seqlens_cpu)) - 1
    monkeypatch.setattr(ledger, "made_up_rows", with_batches(only_real))
    real = measure_ledger(tiny)
    assert real.attention_blocks == 2 * 4 * num_documents, "2 heads, 4 blocks of 128 queries in 512"
    monkeypatch.setattr(ledger, "made_up_rows", with_batches(filled_up))
    filled = measure_ledger(tiny)
    assert filled.attention_blocks == real.attention_blocks, "borders that fill up the tensor do not reach the kernel"
    assert filled.useful_attention_blocks == real.useful_attention_blocks <= real.attention_blocks
