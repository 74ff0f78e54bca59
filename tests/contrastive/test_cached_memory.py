"""What a step with cached gradients holds in tensors: one chunk, one gradient, and a little for every pair."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neobert.config.schema_contrastive import ContrastiveSection
from neobert.contrastive.batches import PairCollator
from neobert.contrastive.pair_order import TrainSet
from neobert.data.rows.side_by_side import NoMasks
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives import losses
from neobert.objectives.contrastive import ContrastiveEncoder
from neobert.objectives.pair_batch import PairBatch
from neobert.types import PackedRow

WIDTH, VOCABULARY, CHUNK = 16, 500, 4


class Live(TorchDispatchMode):
    """Bytes of tensors made under it that are alive, their peak, and the shapes made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.untyped_storage().data_ptr() in given:
                continue
            storage = x.untyped_storage()
            key = id(storage)
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
                self.shapes.append(tuple(x.shape))
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def model(kind: str = "infonce") -> ContrastiveEncoder:
    architecture = ModelConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        embedding_init_range=0.5,
        decoder_init_range=0.2,
    )
    torch.manual_seed(0)
    section = ContrastiveSection(both_directions=kind == "infonce", hard_negative_weight=0.5, learn_temperature=True)
    return ContrastiveEncoder(Encoder(architecture, ATTENTION["sdpa"]), section, kernel=KERNELS["torch"])


def batch_of(num_rows: int, *, chunk: int, kind: Any = "infonce") -> PairBatch:
    """Rows of three texts of 5 tokens each; for `supcon` of one text of 15."""
    rng = np.random.default_rng(0)
    rows = [
        PackedRow(
            tokens=rng.integers(5, VOCABULARY, 15).astype(np.int32),
            lengths=(5, 5, 5) if kind == "infonce" else (15,),
            documents=(number,) * (3 if kind == "infonce" else 1),
            offsets=(0,) * (3 if kind == "infonce" else 1),
            sources=(0,) * (3 if kind == "infonce" else 1),
            key=number,
        )
        for number in range(num_rows)
    ]

    class Labels:
        def column(self, name: str, numbers: list[int]) -> list[int]:
            return [number % 3 for number in numbers]

    pairs = TrainSet(
        key="x",
        store=Labels(),  # type: ignore[arg-type]
        kind=kind,
        first=0,
        anchor_prefix="",
        positive_prefix="",
        num_negatives=1 if kind == "infonce" else 0,
    )
    collate = PairCollator(sets=[pairs], chunk_rows=chunk, max_seq_length=16, pad_id=0, seed=1, masks=NoMasks())
    return collate(rows)


def live_of_step(module: nn.Module, batches: list[PairBatch]) -> Live:
    """Forward and backward, chunk after chunk or batch after batch."""
    module.zero_grad(set_to_none=True)
    with Live() as live:
        for batch in batches:
            module(batch).loss_sum.backward()
    return live


def test_cached_gradients_take_what_accumulated_ones_take() -> None:
    module = model()
    alone = live_of_step(module, [batch_of(CHUNK, chunk=CHUNK)] * 16)
    cached = live_of_step(module, [batch_of(16 * CHUNK, chunk=CHUNK)])
    whole = live_of_step(module, [batch_of(16 * CHUNK, chunk=16 * CHUNK)])
    assert whole.peak > 3 * alone.peak
    # The vectors of all texts, their gradient, and at most as much again.
    vectors = 3 * 16 * CHUNK * WIDTH * 4
    assert cached.peak < alone.peak + 3 * vectors


def test_the_loss_takes_memory_in_proportion_to_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", 8)
    module, peaks = model(), []
    for rows in (64, 128):
        batch = batch_of(rows, chunk=CHUNK)
        vectors = torch.randn(3 * rows, WIDTH, requires_grad=True)
        with Live() as live:
            module._contrast(vectors, batch).backward()
        peaks.append(live.peak)
    assert peaks[1] < 2.1 * peaks[0]


@pytest.mark.parametrize("kind", ["infonce", "supcon"])
def test_no_similarities_of_all_rows(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", 8)
    module = model(kind)
    step = live_of_step(module, [batch_of(40, chunk=40, kind=kind)])
    rows = {shape[-2] for shape in step.shapes if len(shape) >= 2 and shape[-1] in (40, 80)}
    assert 8 in rows
    assert max(rows) < 40


@pytest.mark.parametrize("kind", ["infonce", "supcon"])
def test_blocks_of_rows_have_the_loss_and_the_gradients_of_all(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module, batch = model(kind).double(), batch_of(10, chunk=4, kind=kind)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(batch.text_ids), WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    assert module.log_scale is not None
    found = []
    for rows in (256, 3, 1):
        monkeypatch.setattr(losses, "ROWS_AT_ONCE", rows)
        loss = module._contrast(vectors, batch)
        found.append((loss.detach(), *torch.autograd.grad(loss, (vectors, module.log_scale))))
    for blocks in found[1:]:
        torch.testing.assert_close(blocks, found[0], rtol=1e-12, atol=1e-12)
