"""Clipping of attention logits: what is measured, what is scaled, and that nothing else happens."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from neobert.config.schema_optimizer import MuonSection
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM
from neobert.optim.optimizers import step_unless
from neobert.optim.qk_clip import QKClip, clips_in_step, largest_logits

H, N, S = 16, 2, 10
IDS = torch.tensor([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]], dtype=torch.int32)
BORDERS = torch.tensor([0, 4, 10, 17, 20], dtype=torch.int32)
SEGMENTS = Segments(ids=IDS, cu_seqlens=BORDERS, cu_seqlens_cpu=BORDERS, max_seqlen=S)


def build(seen: list[Any] | None = None, **options: Any) -> MaskedLM:
    """A small model; `seen` is filled with the queries, keys and scale of every attention."""
    torch.manual_seed(0)
    fields = {"rope": True, "local_attention": 4, "global_attention_every": 2, **options}
    config = ModelConfig(
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=N,
        intermediate_size=24,
        max_position_embeddings=S,
        vocab_size=20,
        pad_token_id=0,
        decoder_init_range=0.5,
        embedding_init_range=0.5,
        **fields,
    )
    attention = ATTENTION["sdpa"]
    if seen is not None:

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Any, *, scale: float) -> torch.Tensor:
            seen.append((q.detach(), k.detach(), scale))
            return ATTENTION["sdpa"].attend(q, k, v, prepared, scale=scale)

        attention = replace(attention, attend=attend)
    return MaskedLM(Encoder(config, attention), kernel=KERNELS["torch"])


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(1, 20, (2, S), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def by_hand(q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None, *, causal: bool = False) -> list[float]:
    """Pair by pair."""
    best = [float("-inf")] * q.shape[1]
    flat = [(row, ident, at) for row in range(2) for ident, at in zip(IDS[row].tolist(), POSITIONS[row].tolist())]
    for i, (row, ident, at) in enumerate(flat):
        for j, (other_row, other, other_at) in enumerate(flat):
            near = window is None or abs(at - other_at) <= window // 2
            if row == other_row and ident == other > 0 and near and not (causal and other_at > at):
                for head in range(q.shape[1]):
                    best[head] = max(best[head], (q[i, head] @ k[j, head]).item() * scale)
    return best


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 15, 1000])
def test_the_largest_logit_is_that_of_a_pair_in_one_document(window: int | None, chunk_size: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2 * S, N, 8), torch.randn(2 * S, N, 8)
    found = largest_logits(q, k, IDS, POSITIONS, window=window, chunk_size=chunk_size, causal=causal)
    torch.testing.assert_close(found, torch.tensor(by_hand(q, k, 1.0, window, causal=causal)))


@pytest.mark.parametrize("options", [{}, {"rope": False}, {"rms_norm": False, "hidden_act": "gelu"}])
def test_it_is_measured_on_the_queries_and_keys_that_the_attention_takes(options: dict[str, Any]) -> None:
    seen: list[Any] = []
    encoder = build(seen, **options).encoder
    clip = QKClip(encoder, MuonSection(clipping_interval=1))
    with clip.measuring(0, 2):
        encoder(tokens(1), POSITIONS, SEGMENTS)
        encoder(tokens(2), POSITIONS, SEGMENTS)
        found = clip._logits_LN
    assert len(seen) == 4, "two layers, two micro-batches"
    wanted = torch.tensor([by_hand(q, k, scale, encoder.windows[i % 2]) for i, (q, k, scale) in enumerate(seen)])
    torch.testing.assert_close(found, torch.maximum(wanted[:2], wanted[2:]))
    assert encoder.observe is None


def test_the_last_micro_batch_alone() -> None:
    encoder = build().encoder
    clip = QKClip(encoder, MuonSection(clipping_interval=1, capture_last_microbatch_only=True))
    alone = QKClip(encoder, MuonSection(clipping_interval=1))
    with clip.measuring(0, 2):
        encoder(tokens(1), POSITIONS, SEGMENTS)
        encoder(tokens(2), POSITIONS, SEGMENTS)
        found = clip._logits_LN
    with alone.measuring(0, 1):
        encoder(tokens(2), POSITIONS, SEGMENTS)
        assert torch.equal(found, alone._logits_LN)


def clipped_step(module: MaskedLM, clip: QKClip, *, skip: bool = False) -> None:
    """A step whose optimizer changes nothing."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)
    clip.clip_after(optimizer)
    with clip.measuring(0, 1):
        module.encoder(tokens(1), POSITIONS, SEGMENTS).sum().backward()
        step_unless(optimizer, torch.tensor(skip))


def measure(module: MaskedLM) -> torch.Tensor:
    clip = QKClip(module.encoder, MuonSection(clipping_interval=1))
    with clip.measuring(0, 1):
        module.encoder(tokens(1), POSITIONS, SEGMENTS)
        found = clip._logits_LN
    assert found is not None
    return found


def test_a_head_above_the_threshold_is_brought_down_to_it_and_no_other_weight_changes() -> None:
    module = build()
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    before = measure(module)
    threshold = before[0].mean().item()  # Between the two heads of the first layer.
    over = before[0] > threshold
    assert over.sum() == 1
    head = int(over.nonzero())
    clip = QKClip(module.encoder, MuonSection(clipping_interval=1, clipping_threshold=threshold, clipping_alpha=0.25))
    clipped_step(module, clip)
    after = measure(module)
    assert after[0, head].item() == pytest.approx(threshold, rel=1e-5)
    assert after[0, 1 - head] == before[0, 1 - head]
    eta = threshold / before[0, head].item()
    old, new = (
        w.view(3, N, 8, H) for w in (weights["encoder.layers.0.qkv.weight"], module.encoder.layers[0].qkv.weight)
    )
    torch.testing.assert_close(new[0, head], old[0, head] * eta**0.25)
    torch.testing.assert_close(new[1, head], old[1, head] * eta**0.75)
    assert torch.equal(new[:, 1 - head], old[:, 1 - head])
    assert torch.equal(new[2], old[2]), "values stay"
    for name, p in module.named_parameters():
        assert torch.equal(p, weights[name]) or name.endswith("qkv.weight"), name
    found = clip.read()
    assert found["max_attention_logit"] == before.max().item()
    assert found["clipped_heads"] == (before > threshold).sum().item()
    assert clip.read() == {}


def test_a_step_that_is_left_out_clips_nothing() -> None:
    module = build()
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    clip = QKClip(module.encoder, MuonSection(clipping_interval=1, clipping_threshold=1e-3))
    clipped_step(module, clip, skip=True)
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert clip.read()["clipped_heads"] == 0
    clipped_step(module, clip)
    assert clip.read()["clipped_heads"] == 4


def test_logits_that_are_not_numbers_clip_nothing() -> None:
    module = build()
    with torch.no_grad():
        module.encoder.layers[0].qkv.weight[0] = torch.inf
    before = module.encoder.layers[1].qkv.weight.detach().clone()
    clipped_step(module, QKClip(module.encoder, MuonSection(clipping_interval=1, clipping_threshold=1e-3)), skip=True)
    assert torch.equal(module.encoder.layers[1].qkv.weight, before)


def test_which_steps_clip() -> None:
    def steps(interval: int, warmup: int) -> list[int]:
        section = MuonSection(clipping_interval=interval, clipping_warmup_steps=warmup)
        return [step for step in range(8) if clips_in_step(section, step)]

    assert steps(2, 0) == [1, 3, 5, 7]
    assert steps(2, 4) == [5, 7]
    assert steps(1, 5) == [5, 6, 7]
    module = build()
    clip = QKClip(module.encoder, MuonSection(clipping_interval=2))
    with clip.measuring(0, 1):
        assert module.encoder.observe is None


@pytest.mark.parametrize("autocast", [False, True])
def test_measuring_changes_no_gradient(autocast: bool) -> None:
    grads = []
    for interval in (1, 2):
        module = build()
        clip = QKClip(module.encoder, MuonSection(clipping_interval=interval))
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with clip.measuring(0, 1), precision:
            assert (module.encoder.observe is not None) == (interval == 1)
            module.encoder(tokens(1), POSITIONS, SEGMENTS).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads))
