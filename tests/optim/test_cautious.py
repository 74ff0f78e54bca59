"""Cautious weight decay, heads as matrices of their own and a changing momentum against plain references."""

import copy
import math
from typing import Any

import pytest
import torch
from block_weights import F, H, Model
from torch import Tensor

from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.optim.muon import reference_muon
from neobert.optim.optimizers import build_optimizer, step_unless
from neobert.optim.schedule import choose_muon_beta

LR, DECAY, BETAS, EPS = 0.1, 0.3, (0.8, 0.9), 1e-8
NUM_HEADS = 3
STEPS = range(4)


def build(name: str, **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Model().double()
    muon = MuonSection(muon_decay=DECAY, muon_beta=0.8, **options)
    section = OptimizerSection(
        name=name,  # type: ignore[arg-type]
        lr=LR,
        weight_decay=DECAY,
        betas=BETAS,
        eps=EPS,
        cautious_weight_decay=True,
        muon_config=muon,
    )
    return module, build_optimizer(module, section, dtype=torch.float64, num_heads=NUM_HEADS)


def gradients(module: Model, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in module.named_parameters()}


def make_step(module: Model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for name, grad in gradients(module, seed).items():
        module.get_parameter(name).grad = grad
    step_unless(optimizer, torch.tensor(False))


def reference_adamw(weight: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    """The formula of AdamW with cautious decay, element by element."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
        square = BETAS[1] * square + (1 - BETAS[1]) * grad**2
        update = mean / (1 - BETAS[0] ** step) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)
        decaying = torch.tensor([u * w >= 0 for u, w in zip(update.flatten(), weight.flatten())]).view_as(weight)
        weight = weight - LR * (update + decay * decaying * weight)
    return weight


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_what_adamw_updates_decays_cautiously(name: str) -> None:
    module, optimizer = build(name)
    before = copy.deepcopy(module.state_dict())
    for seed in STEPS:
        make_step(module, optimizer, seed)
    compared = [n for n in before if name == "adamw" or "layers" not in n or n.endswith("norm")]
    for key in compared:
        decay = DECAY if before[key].ndim > 1 and "embedding" not in key else 0.0
        expected = reference_adamw(before[key], [gradients(module, seed)[key] for seed in STEPS], decay)
        torch.testing.assert_close(module.state_dict()[key], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["muonclip", "normuon"])
@pytest.mark.parametrize("split_heads", [False, True])
def test_matrices_of_heads_and_their_cautious_decay_are_the_definition(name: str, split_heads: bool) -> None:
    module, optimizer = build(name, split_heads=split_heads, norm_factor="match_rms_adamw")
    before = copy.deepcopy(module.state_dict())
    betas = [0.5, 0.6, 0.7, 0.8]
    for seed, beta in zip(STEPS, betas):
        for group in optimizer.param_groups:
            group["muon_beta"] = beta
        make_step(module, optimizer, seed)
    heads = [H // NUM_HEADS] * (2 * NUM_HEADS) if split_heads else [H, H]
    for layer, heights in (("qkv", [*heads, H]), ("gate_up", [F, F]), ("out", [H])):
        key = f"layers.1.{layer}.weight"
        grads = [gradients(module, seed)[key] for seed in STEPS]
        for number, part in enumerate(before[key].split(heights)):
            expected = reference_muon(
                part,
                [grad.split(heights)[number] for grad in grads],
                section=MuonSection(muon_beta=0.8, norm_factor="match_rms_adamw"),
                equal_rows=name == "normuon",
                lr=LR,
                weight_decay=DECAY,
                betas=betas,
                cautious=True,
            )
            found = module.state_dict()[key].split(heights)[number]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "normuon"])
def test_a_step_that_is_left_out_decays_nothing(name: str) -> None:
    module, optimizer = build(name, split_heads=True)
    make_step(module, optimizer, 0)
    before = copy.deepcopy(module.state_dict())
    for key, grad in gradients(module, 1).items():
        module.get_parameter(key).grad = grad * math.nan
    step_unless(optimizer, torch.tensor(True))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    make_step(module, optimizer, 2)
    assert not torch.equal(module.decoder.weight, before["decoder.weight"])


def test_momentum_rises_from_its_start_and_falls_back_at_the_end() -> None:
    muon = MuonSection(muon_beta=0.95, muon_beta_start=0.85, muon_beta_warmup_steps=10, muon_beta_cooldown_steps=5)
    section = OptimizerSection(name="normuon", muon_config=muon)
    found = [choose_muon_beta(section, step, end=100) for step in (0, 5, 10, 50, 95, 96, 98, 100, 120)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.93, 0.89, 0.85, 0.85])
    assert choose_muon_beta(OptimizerSection(name="normuon"), 3, end=9) is None
    assert choose_muon_beta(OptimizerSection(name="adamw", muon_config=muon), 3, end=9) is None
