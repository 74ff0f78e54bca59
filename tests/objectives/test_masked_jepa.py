"""Masked language modelling with predicted hidden states: the loss against a plain reference, forward and backward."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definition import MASKS, assert_is_definition, rows

from neobert.config.load import load_config
from neobert.config.schema_optimizer import MuonSection
from neobert.data.rows.collate import Collator
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.masked_jepa import MaskedJEPA, restore_tokens
from neobert.objectives.mlm import MaskedLM
from neobert.objectives.table import recognise_objective
from neobert.optim.qk_clip import QKClip
from neobert.train.record.statistics import Statistics
from neobert.types import IGNORE_INDEX, PackedBatch

WEIGHT = 0.7


def build(seed: int = 0) -> MaskedJEPA:
    torch.manual_seed(seed)
    config = ModelConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        vocab_size=50,
        pad_token_id=0,
        embedding_init_range=0.5,
        decoder_init_range=0.3,
    )
    encoder = Encoder(config, ATTENTION["sdpa"])
    return MaskedJEPA(encoder, kernel=KERNELS["reference"], jepa_weight=WEIGHT).double()


def collate(*documents: tuple[int, ...]) -> tuple[PackedBatch, torch.Tensor]:
    """A masked batch, and its tokens without masks."""
    packed = rows(*documents)
    settings: dict[str, Any] = {"seed": 1, "draw": "row", "max_seq_length": 24, "max_segments": 8, "pad_id": 0}
    tokens = torch.zeros(len(packed), 24, dtype=torch.int32)
    for number, row in enumerate(packed):
        tokens[number, : len(row.tokens)] = torch.from_numpy(row.tokens)
    return Collator(policy=MASKS, **settings)(packed), tokens


def test_loss_and_gradients_are_those_of_the_definition() -> None:
    module, teacher = build(), build(seed=1)
    module.learn_from_average(lambda: dict(teacher.named_parameters()))
    batch, tokens = collate((9, 12), (7, 5, 8))
    found = module(batch).loss_sum
    student = module.encoder(batch.input_ids, batch.positions, batch.segments)
    with torch.no_grad():
        targets = teacher.encoder(tokens, batch.positions, batch.segments)
    expected = torch.zeros((), dtype=torch.float64)
    for slot, target in zip(batch.masked_index.tolist(), batch.targets.tolist()):
        if target != IGNORE_INDEX:
            expected = expected - module.logits(student[slot]).log_softmax(-1)[target]
            inner = F.gelu(module.predictor.dense.weight @ student[slot])
            said = module.predictor.out.weight @ inner
            cosine = said @ targets[slot] / (said.norm() * targets[slot].norm())
            expected = expected + WEIGHT * (1 - cosine)
    assert_is_definition(module, found, expected)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_pass_of_the_teacher_is_not_measured() -> None:
    module, teacher = build().float(), build(seed=1).float()
    with torch.no_grad():
        for block in teacher.encoder.layers:
            block.qkv.weight.mul_(100)
    module.learn_from_average(lambda: dict(teacher.named_parameters()))
    batch, _ = collate((9, 12), (7, 5, 8))
    clip, alone = (QKClip(module.encoder, MuonSection(clipping_interval=1)) for _ in range(2))
    statistics = Statistics(module)
    with clip.measuring(0, 1), statistics.watching(batch) as observe:
        module(batch).loss_sum.backward()
        observe()
        found = clip._logits_LN
    with alone.measuring(0, 1), statistics.watching(batch) as observe_alone:
        seen = statistics.read()
        module.encoder(batch.input_ids, batch.positions, batch.segments)
        observe_alone()
        assert torch.equal(found, alone._logits_LN)
    assert seen["logit/max"] == statistics.read()["logit/max"]


def test_the_distance_is_no_part_of_the_perplexity() -> None:
    module, teacher = build(), build(seed=1)
    batch, _ = collate((9, 12), (7, 5, 8))
    plain = module(batch)
    module.learn_from_average(lambda: dict(teacher.named_parameters()))
    found = module(batch)
    assert found.z_sum is not None
    assert (found.loss_sum - found.z_sum).item() == pytest.approx(plain.loss_sum.item())
    assert found.z_sum.item() > 0


def test_the_tokens_before_masks_are_restored() -> None:
    batch, tokens = collate((9, 12), (7, 5, 8))
    assert not torch.equal(batch.input_ids, tokens)
    assert torch.equal(restore_tokens(batch), tokens)


def test_an_evaluation_is_that_of_masked_language_modelling() -> None:
    module = build()
    module.learn_from_average(lambda: pytest.fail("an evaluation has no teacher"))
    plain = MaskedLM(copy.deepcopy(module.encoder), kernel=KERNELS["reference"])
    batch, _ = collate((20,), (22,))
    with torch.no_grad():
        assert torch.equal(module.eval()(batch).loss_sum, plain.eval()(batch).loss_sum)
    assert recognise_objective(module.state_dict()).name == "mlm_jepa"


def test_without_an_average_there_is_no_teacher() -> None:
    with pytest.raises(StartupError, match=r"mlm_jepa learns from an average of the weights; set trainer\.ema_decay"):
        build().learn_from_average(None)
    base = ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=9", "trainer.objective=mlm_jepa"]
    ema = "trainer.ema_decay=0.9"
    for keys, text in (
        ([], r"trainer\.ema_decay: null, but trainer\.objective: mlm_jepa learns from"),
        ([ema, "trainer.ema_start_step=3"], r"trainer\.ema_start_step: 3, but"),
        ([ema, "trainer.parallel=fsdp2"], r"trainer\.parallel: fsdp2 shards the average.*write ddp"),
        ([ema, "trainer.bf16_residual=true"], r"trainer\.bf16_residual: true computes with copies.*write false"),
    ):
        with pytest.raises(Exception, match=text):
            load_config(None, [*base, *keys])
    load_config(None, [*base, ema, "trainer.jepa_weight=0.5"])
