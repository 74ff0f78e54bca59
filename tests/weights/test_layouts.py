"""Weights of other formats under our names: equal outputs, exact round trips, every odd tensor named."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from neobert_models import LONGEST, SIZES, forward, hub_config, make_tensors
from torch import Tensor

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM
from neobert.weights.describe import WeightsError
from neobert.weights.layouts import LAYOUTS, from_ours, tensor_shapes, to_ours
from neobert.weights.layouts.eurobert import describe_eurobert

IDS = [5, 1, 29, 7, 7, 12, 0, 3, 18, 22]
FORK = {**SIZES, "max_position_embeddings": LONGEST, "norm_eps": "1e-5", "pad_token_id": 0}


def our_logits(config: ModelConfig, tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    model = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    model.load_state_dict(tensors, strict=True)
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    segments = Segments(
        ids=torch.ones(1, len(ids), dtype=torch.int32),
        cu_seqlens=borders,
        cu_seqlens_cpu=borders,
        max_seqlen=len(ids),
    )
    with torch.inference_mode():
        return model.logits(model.encoder(torch.tensor([ids]), torch.arange(len(ids))[None], segments))


def digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + str(tensors[name].shape).encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize(
    ("layout", "kind", "options", "config", "reference"),
    [
        ("neobert", "hub", {}, hub_config(), {}),
        ("neobert", "hub", {"biased": True}, hub_config(), {}),
        ("neobert_fork", "fork", {}, FORK, {}),
        ("neobert_fork", "fork", {"gelu": True}, {**FORK, "hidden_act": "GELU"}, {}),
        ("neobert_fork", "fork", {"learned": True}, {**FORK, "rope": False}, {}),
        ("neobert_fork", "fork", {}, {**FORK, "rms_norm": False}, {"rms_norm": False}),
    ],
    ids=["hub", "biased", "fork", "gelu", "learned", "layernorm"],
)
def test_a_model_of_another_layout_gives_the_same_outputs_and_comes_back_byte_for_byte(
    layout: str, kind: str, options: dict[str, Any], config: dict[str, Any], reference: dict[str, Any]
) -> None:
    theirs = make_tensors(kind, **options)
    described = LAYOUTS[layout].describe(config, theirs)
    ours = to_ours(LAYOUTS[layout], described, theirs)
    expected = forward(theirs, IDS, **reference)
    assert (our_logits(described, ours, IDS) - expected).abs().max() < 2e-5 * expected.abs().max()
    back = from_ours(LAYOUTS[layout], described, ours)
    kept = {name: t for name, t in theirs.items() if name != "decoder.bias" or t.any()}
    assert digest(back) == digest(kept)


def test_the_order_of_rows_is_what_the_text_says() -> None:
    """Head 0 has q rows 0-3, k 4-7, v 8-11, head 1 the next twelve; planes (0, 1), (2, 3) become (0, 2), (1, 3)."""
    config = ModelConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        vocab_size=4,
        pad_token_id=0,
    )
    rule = next(r for r in LAYOUTS["neobert"].rules(config) if r.ours.endswith("qkv.weight"))
    rows = torch.arange(24)[:, None].repeat(1, 8)
    merged = rule.merge([rows])[:, 0].tolist()
    queries, keys, values = merged[:8], merged[8:16], merged[16:]
    assert queries == [0, 2, 1, 3, 12, 14, 13, 15]
    assert keys == [4, 6, 5, 7, 16, 18, 17, 19]
    assert values == [8, 9, 10, 11, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("layout", "biased"),
    [("eurobert", False), *((layout, b) for layout in ("remote_code", "checkpoint", "neobert") for b in (True, False))],
)
@pytest.mark.parametrize("tied", [True, False])
def test_import_export_import_gives_equal_bytes(layout: str, tied: bool, biased: bool) -> None:
    theirs = make_tensors("hub", biased=biased)
    if tied:
        theirs["decoder.weight"] = theirs["model.encoder.weight"].clone()
    config = LAYOUTS["neobert"].describe(hub_config(), theirs)
    assert config.tie_word_embeddings is tied, "read off the tensors"
    first = to_ours(LAYOUTS["neobert"], config, theirs)
    exported = from_ours(LAYOUTS[layout], config, first)
    assert digest(to_ours(LAYOUTS[layout], config, exported)) == digest(first)


def test_every_missing_unexpected_and_misshapen_tensor_is_named() -> None:
    theirs = make_tensors("hub")
    config = LAYOUTS["neobert"].describe(hub_config(), theirs)
    del theirs["model.transformer_encoder.1.wo.weight"]
    theirs["model.layer_norm.weight"] = torch.ones(5)
    theirs["pooler.weight"] = torch.ones(2, 3)
    with pytest.raises(WeightsError) as caught:
        to_ours(LAYOUTS["neobert"], config, theirs)
    message = str(caught.value)
    assert "model.transformer_encoder.1.wo.weight is missing, shape [24, 24]" in message
    assert "model.layer_norm.weight has shape [5] instead of [24]" in message
    assert "pooler.weight is not expected, shape [2, 3]" in message


def test_biases_are_left_out_only_when_they_do_nothing_or_on_request() -> None:
    theirs = make_tensors("hub")
    config = LAYOUTS["neobert"].describe(hub_config(), theirs)
    assert not config.decoder_bias, "one of zeros"
    without = to_ours(LAYOUTS["neobert"], config, theirs)
    theirs["decoder.bias"][3] = 0.5
    biased = LAYOUTS["neobert"].describe(hub_config(), theirs)
    assert biased == replace(config, decoder_bias=True)
    assert torch.equal(to_ours(LAYOUTS["neobert"], biased, theirs)["decoder_bias"], theirs["decoder.bias"])
    with pytest.raises(WeightsError, match=r"decoder.bias is not expected, shape \[30\]"):
        to_ours(LAYOUTS["neobert"], config, theirs)
    assert digest(to_ours(LAYOUTS["neobert"], config, theirs, drop_decoder_bias=True)) == digest(without)
    for layout in ("checkpoint", "remote_code"):
        exported = from_ours(LAYOUTS[layout], biased, to_ours(LAYOUTS["neobert"], biased, theirs))
        assert digest(to_ours(LAYOUTS[layout], config, exported, drop_decoder_bias=True)) == digest(without)
    theirs["model.layer_norm.bias"] = torch.ones(24)
    with pytest.raises(WeightsError, match=r"model.layer_norm.bias is not expected"):
        to_ours(LAYOUTS["neobert"], config, theirs, drop_decoder_bias=True)


def test_a_tied_head_that_differs_from_the_embedding_is_an_error() -> None:
    theirs = make_tensors("hub")
    theirs["decoder.weight"] = theirs["model.encoder.weight"].clone()
    config = LAYOUTS["neobert"].describe(hub_config(), theirs)
    native = from_ours(LAYOUTS["eurobert"], config, to_ours(LAYOUTS["neobert"], config, theirs))
    native["lm_head.weight"] = native["model.embed_tokens.weight"].clone()
    assert "decoder.weight" not in to_ours(LAYOUTS["eurobert"], config, native)
    native["lm_head.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match=r"lm_head.weight is tied to model.embed_tokens.weight .* differ"):
        to_ours(LAYOUTS["eurobert"], config, native)


def test_what_our_encoder_cannot_express_is_named_all_together() -> None:
    config = {"hidden_act": "gelu", "num_key_value_heads": 5, "rope_scaling": {"type": "yarn"}, "attention_bias": True}
    with pytest.raises(WeightsError) as caught:
        describe_eurobert(config, {})
    for key in ("hidden_act: 'gelu'", "num_key_value_heads: 5", "rope_type: 'yarn'", "attention_bias: True"):
        assert key in str(caught.value)
    with pytest.raises(WeightsError, match="ngpt: True cannot be expressed"):
        LAYOUTS["neobert_fork"].describe({**FORK, "ngpt": True}, make_tensors("fork"))
    with pytest.raises(WeightsError, match=r"lacks a key.*hidden_size"):
        LAYOUTS["neobert"].describe({"norm_eps": 1e-5}, make_tensors("hub"))


def test_eurobert_defaults_and_both_spellings_of_theta() -> None:
    published = describe_eurobert({"rope_theta": 250000, "rope_scaling": None, "pad_token_id": None}, {})
    assert (published.rope_theta, published.vocab_size, published.pad_token_id) == (250000.0, 128256, 0)
    assert (published.ffn_size, published.tie_word_embeddings, published.norm_eps) == (3072, False, 1e-5)
    assert describe_eurobert({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {}).rope_theta == 7.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": False},
        {"qk_norm": True, "embedding_norm": True, "decoder_bias": True},
        {"embedding_norm": True, "first_attention_norm": False, "prediction_head": True, "hidden_act": "geglu"},
        {"ngpt": True},
        {"ngpt": True, "tie_word_embeddings": True},
    ],
)
def test_our_shapes_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = replace(LAYOUTS["neobert_fork"].describe(FORK, make_tensors("fork")), **changes)
    model = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    assert tensor_shapes(config) == {name: tuple(t.shape) for name, t in model.state_dict().items()}
