"""A larger encoder from a smaller one: indices, blocks, and what the large one computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights
from neobert.weights.layouts import tensor_shapes
from neobert.weights.tiling import center_map, choose_layers, layer_map, tile_weights

SMALL = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=36,
    max_position_embeddings=12,
    vocab_size=30,
    pad_token_id=0,
    embedding_init_range=1.0,
    decoder_init_range=0.4,
)
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 72}
VARIANTS = {
    "rotary, SwiGLU, tied": {},
    "learned positions, GELU, untied, LayerNorm": {
        "rope": False,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "rms_norm": False,
    },
    "sliding window": {"local_attention": 4, "global_attention_every": 2},
    "biases and norms": {"decoder_bias": True, "qk_norm": True, "embedding_norm": True},
    "like ModernBERT": {
        "hidden_act": "geglu",
        "rms_norm": False,
        "embedding_norm": True,
        "first_attention_norm": False,
        "prediction_head": True,
    },
}


def build(config: ModelConfig, seed: int = 0) -> MaskedLM:
    torch.manual_seed(seed)
    module = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"]).eval()
    with torch.no_grad():  # Norm weights that are not all 1 show a wrong index.
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5).requires_grad_("norm" in name)
    return module


def weights_of(module: MaskedLM) -> EncoderWeights:
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    folder = Path("small")
    return EncoderWeights(
        config=module.encoder.config, tensors=tensors, tokenizer=None, layout="checkpoint", step=7, folder=folder
    )


def enlarge(small: MaskedLM, **sizes: int) -> MaskedLM:
    config = replace(small.encoder.config, **sizes)
    large = build(config, seed=1)
    large.load_state_dict(tile_weights(weights_of(small), config, seed=5).tensors, strict=True)
    return large


def run(module: MaskedLM) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of two documents of 7 and 5 tokens."""
    ids = torch.tensor([[1] * 7 + [2] * 5], dtype=torch.int32)
    borders = torch.tensor([0, 7, 12, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].int()
    tokens = torch.tensor([[3, 17, 25, 4, 9, 11, 2, 29, 8, 14, 21, 6]], dtype=torch.int32)
    segments = Segments(ids=ids, cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=12)
    hidden = module.encoder(tokens, positions, segments)
    return hidden, module.logits(hidden)


def test_indices_are_those_of_a_pattern_in_the_middle() -> None:
    assert center_map(3, 7).tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert center_map(4, 6).tolist() == [3, 0, 1, 2, 3, 0]
    assert center_map(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert center_map(2, 9).tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_layers_keep_their_order_also_beyond_twice_the_depth() -> None:
    assert layer_map(2, 5) == [0, 0, 0, 1, 1]
    assert layer_map(3, 4) == [0, 0, 1, 2]
    assert layer_map(2, 2) == [0, 1]
    base_to_large = layer_map(22, 28)
    assert (base_to_large[0], base_to_large[-1], len(set(base_to_large))) == (0, 21, 22)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_large_encoder_of_multiples_computes_what_the_small_one_did(variant: str) -> None:
    small = build(replace(SMALL, **VARIANTS[variant]))  # type: ignore[arg-type]
    wider = dict(WIDER)
    if small.encoder.config.hidden_act == "swiglu":
        wider["intermediate_size"] = 144  # 24 neurons of the 36, 96 of the 144.
    large = enlarge(small, **wider)
    (hidden, logits), (large_hidden, large_logits) = run(small), run(large)
    assert torch.allclose(large_logits, logits, atol=2e-5)
    divided = small.decoder is None and small.prediction_head is None
    expected = hidden[:, center_map(16, 48)] / (3 if divided else 1)
    assert torch.allclose(large_hidden, expected, atol=2e-5)


def test_no_growth_is_no_change() -> None:
    small = build(SMALL)
    same = enlarge(small)
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in small.state_dict().items())


def test_between_multiples_and_deeper_it_is_near() -> None:
    gentle = replace(SMALL, decoder_init_range=0.2)
    small = build(gentle)
    logits = run(small)[1].detach().log_softmax(-1)
    spread = float((logits - logits.mean()).std())
    for sizes in ({"hidden_size": 24, "num_attention_heads": 3}, {"num_hidden_layers": 5}):
        near = run(enlarge(small, **sizes))[1].detach().log_softmax(-1)
        again = run(build(replace(gentle, **sizes), seed=1))[1].detach().log_softmax(-1)  # type: ignore[arg-type]
        error, error_again = float((near - logits).std()), float((again - logits).std())
        assert error < 0.15 * spread < error_again


def test_blocks_of_fused_matrices_and_whole_heads() -> None:
    """Weights whose value is the number of the small row: each large row shows where it comes from."""
    tensors = {}
    for name, shape in tensor_shapes(SMALL).items():
        tensors[name] = torch.zeros(shape)
        if len(shape) == 2:
            tensors[name] += torch.arange(float(shape[0]))[:, None]
    weights = replace(weights_of(build(SMALL)), tensors=tensors)
    large = replace(SMALL, hidden_size=24, num_attention_heads=3, intermediate_size=48)
    tiled = tile_weights(weights, large, seed=0).tensors
    # Columns: 24 channels of the 16, whose fractions sum to 1, so that a row of r sums to 16 r.
    rows = tiled["encoder.layers.0.qkv.weight"].sum(1) / 16
    head_0, head_1 = range(8), range(8, 16)
    one_block = [*head_0, *head_1, *head_0]
    assert rows.round(decimals=3).tolist() == [part * 16 + row for part in range(3) for row in one_block]
    rows = tiled["encoder.layers.1.gate_up.weight"].sum(1) / 16
    neurons = [*range(20, 24), *range(24), *range(4)]  # 32 of the 24.
    assert rows.round(decimals=3).tolist() == [*neurons, *(24 + row for row in neurons)]
    channels = [*range(12, 16), *range(16), *range(4)]
    assert (tiled["encoder.layers.1.down.weight"].sum(1) / 24).round(decimals=3).tolist() == channels
    assert (tiled["encoder.layers.1.out.weight"].sum(1) / 16).round(decimals=3).tolist() == channels
    assert tiled["encoder.embedding.weight"].shape == (30, 24)


def test_copies_have_different_fractions_that_sum_to_one_and_so_different_gradients() -> None:
    small = build(SMALL)
    large = enlarge(small, **WIDER)
    matrix, source = (module.encoder.layers[0].down.weight.detach() for module in (large, small))
    units = center_map(SMALL.ffn_size, 48)
    fractions = matrix[8] / source[center_map(16, 48)[8]][units]
    assert float(fractions.min()) > 0
    assert torch.allclose(torch.zeros(24).index_add(0, units, fractions), torch.ones(24), atol=1e-5)
    assert float((fractions[0] - fractions[24]).abs()) > 1e-3
    run(large)[1].logsumexp(-1).sum().backward()
    gradient = large.encoder.layers[0].gate_up.weight.grad
    assert gradient is not None
    copies = gradient[0], gradient[24]
    assert float((copies[0] - copies[1]).norm() / copies[0].norm()) > 1e-2


def test_a_seed_gives_the_same_weights_again_and_dtypes_stay() -> None:
    weights = weights_of(build(SMALL).bfloat16())
    large = replace(SMALL, **WIDER)  # type: ignore[arg-type]
    one, same, other = (tile_weights(weights, large, seed=seed).tensors for seed in (1, 1, 2))
    assert all(tensor.dtype == torch.bfloat16 for tensor in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.layers.0.out.weight"], other["encoder.layers.0.out.weight"])


def test_what_cannot_be_tiled_is_named_together() -> None:
    weights = weights_of(build(SMALL))
    with pytest.raises(WeightsError) as caught:
        tile_weights(weights, replace(SMALL, hidden_size=24, num_hidden_layers=1, rope=False), seed=0)
    message = str(caught.value)
    assert "model.num_hidden_layers: 1 is less than the 2 to be tiled" in message
    assert "model.num_attention_heads: 2 heads of 12, but the heads to be tiled have width 8" in message
    assert "model.rope: False, but True is to be tiled" in message


def test_chosen_layers_are_those_of_the_source_in_that_order() -> None:
    """Where the layers that are left out add nothing, the rest computes what all of them did."""
    for variant in (x for x in VARIANTS.values() if "local_attention" not in x):
        whole = build(replace(SMALL, num_hidden_layers=4, **variant))
        with torch.no_grad():
            for name, weight in whole.named_parameters():
                if ".layers.1." in name or ".layers.3." in name:
                    weight.mul_(0 if ".out." in name or ".down." in name else 1)
        chosen = choose_layers(weights_of(whole), [0, 2])
        student = build(replace(whole.encoder.config, num_hidden_layers=2), seed=1)
        student.load_state_dict(chosen.tensors, strict=True)
        for found, expected in zip(run(student), run(whole)):
            torch.testing.assert_close(found, expected)
    assert chosen.notes == ("layers 0, 2 of 4",)
    assert choose_layers(weights_of(build(SMALL)), [0, 0, 1]).config.num_hidden_layers == 3


def test_layers_that_cannot_be_chosen_are_named() -> None:
    whole = weights_of(build(SMALL))
    with pytest.raises(WeightsError, match=r"model.init_layers: \[0, 2\]: the source has layers 0 to 1, and no 2"):
        choose_layers(whole, [0, 2])
    windows = replace(SMALL, num_hidden_layers=3, local_attention=4, global_attention_every=2)
    with pytest.raises(WeightsError, match=r"layer 2 of the source attends to whole documents, as layer 1 it would"):
        choose_layers(weights_of(build(windows)), [0, 2])
    assert choose_layers(weights_of(build(windows)), [2, 1]).config.num_hidden_layers == 2
    first = weights_of(build(replace(SMALL, first_attention_norm=False, embedding_norm=True)))
    with pytest.raises(WeightsError, match=r"layer 0 of the source has no norm before its attention"):
        choose_layers(first, [1])
