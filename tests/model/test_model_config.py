"""The architecture's config: sizes, round trip, errors."""

import json
from typing import Any

import pytest
from packed import tiny_config

from neobert.model.config import ModelConfig


@pytest.mark.parametrize(("intermediate", "ffn"), [(3072, 2048), (768, 512), (1000, 672), (48, 32), (1024, 688)])
def test_swiglu_takes_two_thirds_rounded_up_to_eights(intermediate: int, ffn: int) -> None:
    assert tiny_config(intermediate_size=intermediate).ffn_size == ffn
    assert tiny_config(intermediate_size=intermediate, hidden_act="gelu").ffn_size == intermediate


def test_round_trip_through_json() -> None:
    config = tiny_config(rope=False, dropout_prob=0.1, tie_word_embeddings=False)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_of_before_the_variants_still_loads() -> None:
    values = tiny_config().to_dict()
    for name in ("local_attention", "global_attention_every", "qk_norm", "embedding_norm", "decoder_bias"):
        del values[name]
    for name in ("init", "init_std", "init_zero_residual", "ngpt", "base_scale"):
        del values[name]
    assert ModelConfig.from_dict(values) == tiny_config()


def test_layers_with_a_window() -> None:
    config = tiny_config(num_hidden_layers=7, local_attention=8, global_attention_every=3)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [config.window_of_layer(layer) for layer in range(7)] == [None, 8, 8, None, 8, 8, None]
    assert {tiny_config().window_of_layer(layer) for layer in range(7)} == {None}


def test_unknown_and_missing_keys_are_named_together() -> None:
    values = tiny_config().to_dict()
    del values["rope"], values["vocab_size"]
    values |= {"layers": 3}
    with pytest.raises(ValueError, match=r"model config: unknown keys layers: .*missing keys rope, vocab_size: "):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, r"model\.num_attention_heads: 5 does not divide model\.hidden_size 32"),
        ({"hidden_size": 30, "num_attention_heads": 10}, r"model\.rope: .* is 3; choose .*model\.rope: false"),
        ({"hidden_act": "relu"}, r"model\.hidden_act: 'relu' is unknown; write one of swiglu, gelu"),
        ({"dropout_prob": 1.0}, r"model\.dropout_prob: 1\.0 must be at least 0 and less than 1"),
        ({"pad_token_id": 50}, r"model\.pad_token_id: 50 is not a row of a vocabulary of 50"),
        ({"ngpt": True}, r"model\.embedding_init_range: 0\.5 is not part of the normalised model"),
        ({"base_scale": 0.0}, r"model\.base_scale: 0\.0 must be greater than 0"),
        ({"local_attention": 0}, r"model\.local_attention: 0 must be at least 1"),
        ({"num_hidden_layers": 0, "norm_eps": 0.0}, r"model\.num_hidden_layers: 0 .*\nmodel\.norm_eps: 0\.0 "),
    ],
)
def test_values_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
