"""Parameter groups and optimizers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from neobert.config.schema_optimizer import GroupSection, GroupsSection, MuonSection, OptimizerSection
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.optim.groups import build_parameter_groups, regroup_state
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
    decayed, others = build_parameter_groups(model(tied=tied), OptimizerSection(weight_decay=0.1))
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
    members = [p for group in build_parameter_groups(module, OptimizerSection()) for p in group["params"]]
    assert len(members) == len({id(p) for p in members})
    assert {id(p) for p in members} == {id(p) for p in module.parameters() if p.requires_grad}


def test_groups_without_members_are_left_out() -> None:
    assert [g["names"] for g in build_parameter_groups(nn.Linear(2, 2, bias=False), OptimizerSection())] == [["weight"]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_gradient_decays_matrices_alone(name: str) -> None:
    module = model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    section = OptimizerSection(name=name, lr=0.5, weight_decay=0.1, muon_config=MuonSection(muon_decay=0.1))
    optimizer = build_optimizer(module, section)
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
    optimizer = build_optimizer(module, OptimizerSection(name="adamw", lr=0.1, weight_decay=0.5))
    module.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # Bias correction makes the first update the sign of the gradient; decay is lr * weight_decay of the weight.
    assert module.weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1)


def test_adam_adds_the_decay_to_the_gradient() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    optimizer = build_optimizer(module, OptimizerSection(name="adam", lr=0.1, weight_decay=0.5, eps=1.0))
    module.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    assert module.weight.item() == pytest.approx(2.0 - 0.1 * 4.0 / (4.0 + 1.0)), "gradient 3 + 0.5 * 2"


def test_a_role_of_its_own_has_a_group_of_its_own() -> None:
    own = GroupsSection(head=GroupSection(lr=0.02), vectors=GroupSection(weight_decay=0.3))
    section = OptimizerSection(lr=0.1, weight_decay=0.2, groups=own)
    groups = build_parameter_groups(model(tied=False), section)
    assert [g["roles"] for g in groups] == [["matrices"], ["head"], ["embeddings"], ["vectors"]]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.2, 0.0, 0.3]
    assert [g["lr"] for g in groups] == [0.1, 0.02, 0.1, 0.1]
    assert [g["lr_factor"] for g in groups] == pytest.approx([1.0, 0.2, 1.0, 1.0])
    assert groups[1]["names"] == ["decoder.weight"]
    assert groups[2]["names"] == ["encoder.embedding.weight", "encoder.position_embedding.weight"]
    muon = OptimizerSection(name="normuon", weight_decay=0.2, muon_config=MuonSection(muon_decay=0.4))
    apart = build_parameter_groups(model(tied=False), muon)
    assert [g["roles"] for g in apart] == [["matrices"], ["head"], ["embeddings", "vectors"]]
    assert [g["weight_decay"] for g in apart] == [0.4, 0.2, 0.0]


def test_a_decay_of_its_own_speed_is_the_same_at_every_peak() -> None:
    for lr in (0.01, 0.5):
        module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.weight, 2.0)
        section = OptimizerSection(lr=lr, weight_decay=0.25, decoupled_weight_decay=True)
        optimizer = build_optimizer(module, section)
        optimizer.param_groups[0]["lr"] = lr / 2  # Half-way down the schedule.
        module.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        assert module.weight.item() == pytest.approx(2.0 * (1 - 0.25 / 2))


def test_state_follows_the_names_into_other_groups() -> None:
    module = model(tied=False)
    section = OptimizerSection(lr=0.1)
    optimizer = build_optimizer(module, section)
    for number, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, float(number))
    optimizer.step()
    own = GroupsSection(vectors=GroupSection(lr=1.0), matrices=GroupSection(lr=2.0))
    other = build_optimizer(module, replace(section, groups=own))
    other.load_state_dict(regroup_state(optimizer.state_dict(), other.param_groups))
    assert [g["lr"] for g in other.param_groups] == [2.0, 0.1, 0.1, 1.0]
    for p in module.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert torch.equal(other.state[p]["step"], optimizer.state[p]["step"])


def test_an_unknown_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name: 'sgd' is unknown; write one of adamw"):
        build_optimizer(nn.Linear(1, 1), OptimizerSection(name="sgd"))  # type: ignore[arg-type]
