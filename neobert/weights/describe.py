"""The configs of other formats -> ModelConfig, or a sentence for each thing that our encoder cannot express."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neobert.errors import UserError
from neobert.model.config import ModelConfig


class WeightsError(UserError, ValueError):
    """Weights that cannot be used as they are; the message says why and what to do."""


def describe_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The contents of `model_config.json`."""
    try:
        return ModelConfig.from_dict(dict(config))
    except ValueError as error:
        raise WeightsError(str(error)) from error


_EUROBERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 128001,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "rope_theta": 10000.0,
}
"""What transformers leaves out of a config.json because it is the default of its class."""


def describe_eurobert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The `config.json` of a EuroBERT model of transformers."""
    c = {name: config.get(name, default) for name, default in _EUROBERT_DEFAULTS.items()}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_act": (c["hidden_act"], ("silu",)),
        "attention_bias": (c["attention_bias"], (False,)),
        "mlp_bias": (c["mlp_bias"], (False,)),
        "num_key_value_heads": (c["num_key_value_heads"], (None, c["num_attention_heads"])),
        "head_dim": (c["head_dim"], (None, head_dim)),
        "rope_type": (rope_type, ("default",)),
        "intermediate_size modulo 8": (c["intermediate_size"] % 8, (0,)),
    }
    _check_expected("EuroBERT", expected)
    return _build(
        hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        intermediate_size=c["intermediate_size"] * 3 // 2,
        max_position_embeddings=c["max_position_embeddings"],
        vocab_size=c["vocab_size"],
        pad_token_id=0 if c["pad_token_id"] is None else c["pad_token_id"],
        rope_theta=float(rope.get("rope_theta", c["rope_theta"])),
        norm_eps=float(c["rms_norm_eps"]),
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
    )


def describe_neobert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The `config.json` of a NeoBERT model, or the `model` section of the fork's `config.yaml`.

    The vocabulary, the number of learned positions, the tie of the weights and the bias of the vocabulary projection
    (one of zeros is none) are read off the tensors: the fork's configs are known to say otherwise.
    """
    _check_expected("NeoBERT", {"ngpt": (bool(config.get("ngpt", False)), (False,))})
    embedding, head = tensors.get("model.encoder.weight"), tensors.get("decoder.weight")
    bias = tensors.get("decoder.bias")
    if embedding is None:
        raise WeightsError("model.encoder.weight is missing: this is no NeoBERT with a language-modelling head")
    try:
        lengths = [config[key] for key in ("max_position_embeddings", "max_length") if key in config]
        positions = tensors.get("model.positional_embedding.weight")
        return _build(
            hidden_size=int(config["hidden_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=int(config["num_attention_heads"]),
            intermediate_size=int(config["intermediate_size"]),
            max_position_embeddings=int(lengths[0]) if positions is None else positions.shape[0] - 1,
            vocab_size=embedding.shape[0],
            pad_token_id=int(config.get("pad_token_id", 0)),
            rope=bool(config.get("rope", True)),
            rms_norm=bool(config.get("rms_norm", True)),
            hidden_act=str(config.get("hidden_act", "swiglu")).lower(),
            dropout_prob=float(config.get("dropout_prob", config.get("dropout", 0.0))),
            norm_eps=float(config["norm_eps"]),  # A string in some files: YAML reads 1e-5 as text.
            tie_word_embeddings=head is None or head.equal(embedding),
            decoder_bias=bias is not None and bool(bias.any()),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise WeightsError(f"the NeoBERT config lacks a key, or has one without a value: {error}") from error


def _check_expected(name: str, expected: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    problems = [
        f"{key}: {value!r} cannot be expressed, only {' or '.join(repr(x) for x in allowed if x is not None)}"
        for key, (value, allowed) in expected.items()
        if value not in allowed
    ]
    if problems:
        raise WeightsError("\n  ".join([f"this {name} model has another architecture than ours:", *problems]))


def _build(**values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise WeightsError(str(error)) from error
