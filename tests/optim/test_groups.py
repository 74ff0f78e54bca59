"""Parameter groups and optimizers."""

import pytest
import torch
from torch import nn

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.optim.groups import build_parameter_groups
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer


def model(*, tied: bool = True) -> MaskedLM:
    config = ModelConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        vocab_size=20,
        pad_token_id=0,
        rope=False,
        tie_word_embeddings=tied,
    )
    return MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(tied: bool) -> None:
    decayed, others = build_parameter_groups(model(tied=tied), weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    block = "encoder.layers.0."
    matrices = [block + name + ".weight" for name in ("qkv", "out", "gate_up", "down")]
    assert decayed["names"] == matrices + ([] if tied else ["decoder.weight"])
    assert others["names"] == [
        "encoder.embedding.weight",
        "encoder.position_embedding.weight",
        block + "attention_norm.weight",
        block + "ffn_norm.weight",
        "encoder.norm.weight",
    ]


def test_every_parameter_is_in_exactly_one_group() -> None:
    module = model(tied=False)
    module.encoder.norm.weight.requires_grad_(False)
    members = [p for group in build_parameter_groups(module, weight_decay=0.1) for p in group["params"]]
    assert len(members) == len({id(p) for p in members})
    assert {id(p) for p in members} == {id(p) for p in module.parameters() if p.requires_grad}


def test_groups_without_members_are_left_out() -> None:
    assert [g["names"] for g in build_parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)] == [["weight"]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_gradient_decays_matrices_alone(name: str) -> None:
    module = model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = build_optimizer(module, name=name, lr=0.5, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in module.named_parameters():
        if not any(part in n for part in ("qkv", "out", "gate_up", "down")):
            assert torch.equal(p.detach(), before[n])
        elif name == "adam":  # The penalty is a gradient like any other, and the first step about its sign.
            penalty = 0.1 * before[n]
            torch.testing.assert_close(p.detach(), before[n] - 0.5 * penalty / (penalty.abs() + 1e-8))
        else:
            torch.testing.assert_close(p.detach(), before[n] * 0.95)


def test_adamw_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    optimizer = build_optimizer(module, name="adamw", lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    module.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # Bias correction makes the first update the sign of the gradient; decay is lr * weight_decay of the weight.
    assert module.weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1)


def test_an_unknown_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name: 'sgd' is unknown; write one of adamw"):
        build_optimizer(nn.Linear(1, 1), name="sgd", lr=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
