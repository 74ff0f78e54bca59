"""MaskedLM: the loss of a batch, its ablation, weight tying, and training that learns."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM, target_hits
from neobert.optim.optimizers import keep_unit_length
from neobert.types import IGNORE_INDEX, PackedBatch

VOCAB = 40


def build(*, tied: bool = True, variant: dict[str, Any] | None = None, **options: Any) -> MaskedLM:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.2,
        "tie_word_embeddings": tied,
    }
    config = ModelConfig(**{**values, **(variant or {})})
    return MaskedLM(Encoder(config, ATTENTION["sdpa"]), **{"kernel": KERNELS["torch"], **options})


def batch_of(rows: tuple[tuple[int, ...], ...], tokens: Tensor, masked: list[int], num_entries: int = 8) -> PackedBatch:
    """Rows of 12 slots with documents of these lengths; slots `masked` of the stream are hidden behind token 3."""
    slots = tokens.numel()
    ids = torch.zeros(len(rows), 12, dtype=torch.int32)
    positions = torch.zeros(len(rows), 12, dtype=torch.int32)
    borders = {0, slots}
    for number, lengths in enumerate(rows):
        ends = np.cumsum((0, *lengths)).tolist()
        for document, (start, end) in enumerate(pairwise(ends), start=1):
            ids[number, start:end] = document
            positions[number, start:end] = torch.arange(end - start)
        borders |= {number * 12 + end for end in ends}
    cu_seqlens = torch.tensor(sorted(borders) + [slots] * (20 - len(borders)), dtype=torch.int32)
    unused = num_entries - len(masked)
    corrupted = tokens.clone().flatten()
    corrupted[masked] = 3
    return PackedBatch(
        input_ids=corrupted.view_as(tokens),
        positions=positions,
        segments=Segments(ids=ids, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens, max_seqlen=12),
        masked_index=torch.tensor(masked + [0] * unused),
        targets=torch.tensor(tokens.flatten()[masked].tolist() + [IGNORE_INDEX] * unused),
        row_keys=torch.arange(len(rows)),
        source_tokens=(sum(map(sum, rows)),),
        num_tokens=sum(map(sum, rows)),
        num_targets=len(masked),
        num_documents=sum(map(len, rows)),
        attended_tokens=sum(n * n for row in rows for n in row),
        digest=0,
    )


@pytest.fixture
def batch() -> PackedBatch:
    tokens = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    return batch_of(((5, 4), (12,)), tokens, [0, 2, 6, 13, 20])


def test_loss_is_the_cross_entropy_of_the_targets(batch: PackedBatch) -> None:
    model = build()
    hidden = model.encoder(batch.input_ids, batch.positions, batch.segments)
    log_probs = model.logits(hidden).log_softmax(-1)
    used = batch.targets != IGNORE_INDEX
    expected = -log_probs[batch.masked_index[used], batch.targets[used]].sum()
    result = model(batch)
    torch.testing.assert_close(result.loss_sum, expected)
    assert result.num_correct is None


@pytest.mark.parametrize("tied", [True, False])
def test_all_positions_is_the_same_loss(batch: PackedBatch, tied: bool) -> None:
    """Slot 0 is predicted and also where unused entries point: its target must survive."""
    losses, gradients = [], []
    for all_positions in (False, True):
        model = build(tied=tied, all_positions=all_positions)
        result = model(batch)
        losses.append(result.loss_sum)
        gradients.append(torch.autograd.grad(result.loss_sum, list(model.parameters())))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_correct_predictions_are_counted_when_asked_for_and_in_evaluation(batch: PackedBatch) -> None:
    model = build(count_correct=True)
    counted = model(batch).num_correct
    assert counted is not None
    hidden = model.encoder(batch.input_ids, batch.positions, batch.segments)[batch.masked_index]
    assert counted == (model.logits(hidden).argmax(-1) == batch.targets).sum()
    quiet = build().eval()
    assert quiet(batch).num_correct == counted
    hits = target_hits(model, batch)
    assert hits.shape == batch.targets.shape
    assert hits.sum() == counted


@pytest.mark.parametrize("kernel", ["reference", "torch", "triton"])
@pytest.mark.parametrize("all_positions", [False, True])
def test_z_loss_and_its_gradient(batch: PackedBatch, kernel: str, all_positions: bool) -> None:
    """In training the loss gains z logsumexp^2 for each target, in evaluation nothing."""
    plain = build(kernel=KERNELS["reference"])
    hidden = plain.encoder(batch.input_ids, batch.positions, batch.segments)
    used = batch.targets != IGNORE_INDEX
    lse = plain.logits(hidden)[batch.masked_index[used]].logsumexp(-1)
    expected = plain(batch).loss_sum + 0.01 * (lse**2).sum()
    gradients = torch.autograd.grad(expected, list(plain.parameters()))
    model = build(kernel=KERNELS[kernel], z_loss=0.01, all_positions=all_positions)
    loss = model(batch).loss_sum
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.eval()(batch).loss_sum, plain(batch).loss_sum, atol=1e-4, rtol=1e-5)


HEADS = {
    "biased": {"decoder_bias": True},
    "normalised": {"ngpt": True, "embedding_init_range": 0.02, "decoder_init_range": 0.02},
}


@pytest.mark.parametrize("kernel", ["reference", "torch", "triton"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", HEADS)
def test_a_bias_and_a_logit_scale_go_through_every_kernel(
    batch: PackedBatch, variant: str, tied: bool, kernel: str
) -> None:
    """Loss and gradients, z-loss and count included, are those of the logits that a prediction sees."""
    model = build(kernel=KERNELS[kernel], tied=tied, variant=HEADS[variant], z_loss=0.01, count_correct=True)
    head = model.decoder_bias if variant == "biased" else model.logit_scale
    assert head is not None
    torch.nn.init.uniform_(head, 0.5, 1.5)
    hidden = model.encoder(batch.input_ids, batch.positions, batch.segments)
    used = batch.targets != IGNORE_INDEX
    logits = model.logits(hidden[batch.masked_index[used]])
    base = torch.tensor(32.0).rsqrt()
    by_hand = hidden[batch.masked_index[used]] @ model.head_weight.T
    torch.testing.assert_close(logits, by_hand + head if variant == "biased" else by_hand * head / base)
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[used], reduction="sum")
    expected = expected + 0.01 * (logits.logsumexp(-1) ** 2).sum()
    result = model(batch)
    torch.testing.assert_close(result.loss_sum, expected, atol=1e-4, rtol=1e-5)
    assert result.num_correct == (logits.argmax(-1) == batch.targets[used]).sum()
    weights = list(model.parameters())
    gradients = torch.autograd.grad(result.loss_sum, weights), torch.autograd.grad(expected, weights)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_prediction_head_is_before_the_projection(batch: PackedBatch, tied: bool) -> None:
    """norm(gelu(W h)), then the projection with its bias: in the loss, in its gradients, and in a prediction."""
    model = build(tied=tied, variant={"prediction_head": True, "decoder_bias": True, "rms_norm": False})
    head, bias = model.prediction_head, model.decoder_bias
    assert head is not None
    assert bias is not None
    for weight in (head.norm.weight, bias):
        torch.nn.init.uniform_(weight, 0.5, 1.5)
    used = batch.targets != IGNORE_INDEX
    hidden = model.encoder(batch.input_ids, batch.positions, batch.segments)[batch.masked_index[used]]
    transformed = torch.nn.functional.gelu(hidden @ head.dense.weight.T)
    centred = transformed - transformed.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm.weight
    by_hand = normed @ model.head_weight.T + bias
    torch.testing.assert_close(model.logits(hidden), by_hand, atol=1e-5, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(by_hand, batch.targets[used], reduction="sum")
    loss, weights = model(batch).loss_sum, list(model.parameters())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    gradients = torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)
    assert {name for name in model.state_dict() if name.startswith("prediction")} == {
        "prediction_head.dense.weight",
        "prediction_head.norm.weight",
    }


def test_a_new_bias_changes_nothing(batch: PackedBatch) -> None:
    plain, biased = build(), build(variant=HEADS["biased"])
    torch.testing.assert_close(biased(batch).loss_sum, plain(batch).loss_sum)
    assert biased.decoder_bias.shape == (VOCAB,)
    assert plain.decoder_bias is None


def test_tied_weights_are_one_tensor(batch: PackedBatch) -> None:
    model = build()
    assert model.head_weight is model.encoder.embedding.weight
    assert model.decoder is None
    assert not any(name.startswith("decoder") for name in model.state_dict())
    model.check_tied()
    untied = build(tied=False)
    assert untied.head_weight is untied.decoder.weight
    assert untied.state_dict()["decoder.weight"].shape == (VOCAB, 32)
    assert untied.head_weight.abs().max() <= 0.2
    untied(batch).loss_sum.backward()
    assert untied.decoder.weight.grad.abs().sum() > 0


def test_weights_that_were_untied_behind_our_back_are_an_error() -> None:
    model = build()
    model.decoder = torch.nn.Linear(32, VOCAB, bias=False)
    with pytest.raises(RuntimeError, match=r"model\.tie_word_embeddings: True, but .* is not the embedding matrix"):
        model.check_tied()
    untied = build(tied=False)
    untied.decoder.weight = untied.encoder.embedding.weight
    with pytest.raises(RuntimeError, match=r"model\.tie_word_embeddings: False, but .* is the embedding matrix"):
        untied.check_tied()


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_packed_equals_unpacked(bf16: bool, tolerance: float) -> None:
    """Loss and gradients of two documents in one row are those of the two alone."""
    tokens = torch.randint(4, VOCAB, (1, 12), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    apart = torch.zeros(2, 12, dtype=torch.int32)
    apart[0, :5], apart[1, :7] = tokens[0, :5], tokens[0, 5:]
    losses, gradients = [], []
    for batch in (batch_of(((5, 7),), tokens, [1, 3, 8, 10]), batch_of(((5,), (7,)), apart, [1, 3, 15, 17])):
        model = build()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(batch).loss_sum
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[0] > 0
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for a, b in zip(*gradients):
        assert (a - b).norm() <= tolerance * b.norm()


def test_a_batch_without_targets_gives_zero(batch: PackedBatch) -> None:
    model = build()
    empty = batch_of(((5, 4), (12,)), batch.input_ids, [])
    loss = model(empty).loss_sum
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("variant", [{}, {"decoder_bias": True, "qk_norm": True, "embedding_norm": True}])
def test_it_learns(batch: PackedBatch, variant: dict[str, Any]) -> None:
    model = build(variant=variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(15):
        loss = model(batch).loss_sum / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > math.log(VOCAB), "worse than guessing at the start"
    assert losses[-1] < 0.1


def test_the_normalised_model_learns_and_stays_normalised(batch: PackedBatch) -> None:
    """Its logits start between -1 and 1, so its loss near that of a guess; their scale grows."""
    model = build(variant=HEADS["normalised"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0, fused=True)
    keep_unit_length(optimizer, model.unit_matrices())
    losses = []
    for _ in range(40):
        loss = model(batch).loss_sum / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert losses[-1] < 0.1
    for matrix, dim in model.unit_matrices():
        torch.testing.assert_close(matrix.norm(dim=dim), torch.ones(matrix.shape[1 - dim]))
