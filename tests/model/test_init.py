"""Initial weights: the standard deviation of every kind of layer, for every initialisation."""

import pytest
import torch
from packed import tiny_config

from neobert.model.attention import ATTENTION
from neobert.model.encoder import Encoder
from neobert.model.init import INITS

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 400}
RANGES = {"embedding_init_range": 0.02, "decoder_init_range": 0.02}


def deviations(**changes: object) -> dict[str, float]:
    """By the last name of the layer, over all blocks."""
    torch.manual_seed(0)
    encoder = Encoder(tiny_config(**{**SIZES, **RANGES, **changes}), ATTENTION["sdpa"])
    weights: dict[str, list[torch.Tensor]] = {}
    for name, weight in encoder.named_parameters():
        weights.setdefault(name.split(".")[-2], []).append(weight.detach().flatten())
    assert all(torch.cat(weights[name]).eq(1).all() for name in ("attention_norm", "ffn_norm", "norm"))
    return {name: torch.cat(weights[name]).std().item() for name in ("embedding", "qkv", "gate_up", "out", "down")}


@pytest.mark.parametrize(
    ("changes", "embedding", "inner", "residual"),
    [
        ({"embedding_init_range": 0.5, "decoder_init_range": 0.1}, 0.28868, 0.057735, 0.057735),
        ({"init": "truncated_normal"}, 0.0175926, 0.0175926, 0.0175926),
        ({"init": "truncated_normal", "init_std": 0.1}, 0.087963, 0.087963, 0.087963),
        ({"init": "megatron"}, 0.02, 0.02, 0.0081650),
        ({"init": "megatron", "init_std": 0.006}, 0.006, 0.006, 0.0024495),
        ({"init": "small"}, 0.0790569, 0.0790569, 0.0833333),
    ],
)
def test_standard_deviations(changes: dict[str, object], embedding: float, inner: float, residual: float) -> None:
    found = deviations(**changes)
    want = {"embedding": embedding, "qkv": inner, "gate_up": inner, "out": residual, "down": residual}
    assert found == pytest.approx(want, rel=0.03)


def test_a_truncated_normal_ends_at_two_standard_deviations() -> None:
    encoder = Encoder(tiny_config(**SIZES, **RANGES, init="truncated_normal", init_std=0.1), ATTENTION["sdpa"])
    largest = encoder.embedding.weight.abs().max().item()
    assert 0.19 < largest <= 0.2


@pytest.mark.parametrize("init", INITS)
def test_zero_residual_makes_every_block_the_identity(init: str) -> None:
    found = deviations(init=init, init_zero_residual=True)
    assert (found["out"], found["down"]) == (0, 0)
    assert min(found["embedding"], found["qkv"], found["gate_up"]) > 0
