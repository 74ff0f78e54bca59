"""ModernBERT, and what was trained with its architecture: Ettin, mmBERT, and encoders of sentences made of them.

LayerNorm without a bias, one after the embedding and none before the attention of the first block; GeGLU; rotary
positions with one base in layers that read whole documents and another in those with a window; a prediction head, and
mostly a bias, on the vocabulary projection. Fused rows and rotary planes are in our order.

Models that were saved without the head on the vocabulary have none here either.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from neobert.model.config import ModelConfig
from neobert.weights.describe import WeightsError, build_config, check_expected
from neobert.weights.layouts.conversion import Layout, Rule, Tensors

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "pad_token_id": 50283,
    "attention_bias": False,
    "mlp_bias": False,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}
"""What transformers leaves out of a config.json because it is the default of its class."""

_FULL, _LOCAL = "full_attention", "sliding_attention"


def describe_modernbert(config: Mapping[str, Any], tensors: Tensors) -> ModelConfig:
    """The `config.json` of a ModernBERT model of transformers; whether it has a prediction head, and a bias on the
    vocabulary projection, is read off the tensors."""
    c = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    has_head, bias = _HEAD in tensors, tensors.get("decoder.bias")
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_activation": (c["hidden_activation"], ("gelu",)),
        "norm_bias": (c["norm_bias"], (False,)),
        "attention_bias": (c["attention_bias"], (False,)),
        "mlp_bias": (c["mlp_bias"], (False,)),
        "intermediate_size modulo 8": (c["intermediate_size"] % 8, (0,)),
    }
    if has_head:
        expected["classifier_bias"] = (c["classifier_bias"], (False,))
        expected["classifier_activation"] = (c["classifier_activation"], ("gelu",))
    check_expected("ModernBERT", expected)
    every = _find_period(config.get("layer_types"), c["num_hidden_layers"], c["global_attn_every_n_layers"])
    theta, local_theta = _find_thetas(config, c)
    windows: dict[str, Any] = {}
    if every is not None:
        windows = {"local_attention": c["local_attention"], "global_attention_every": every}
        windows["local_rope_theta"] = None if local_theta == theta else local_theta
    return build_config(
        hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        intermediate_size=c["intermediate_size"] * 3 // 2,
        max_position_embeddings=c["max_position_embeddings"],
        vocab_size=c["vocab_size"],
        pad_token_id=max(0, c["pad_token_id"] or 0),
        rope_theta=theta,
        norm_eps=float(c["norm_eps"]),
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
        decoder_bias=bias is not None and bool(bias.any()),
        prediction_head=has_head,
        **_ALWAYS,
        **windows,
    )


_HEAD = "head.dense.weight"
_ALWAYS: dict[str, Any] = {
    "rms_norm": False,
    "hidden_act": "geglu",
    "embedding_norm": True,
    "first_attention_norm": False,
}


def _find_period(kinds: list[str] | None, num_layers: int, period: int) -> int | None:
    """k where layers 0, k, 2k, ... read whole documents and the others have a window; None where none has one."""

    def layers(k: int) -> list[str]:
        return [_LOCAL if layer % k else _FULL for layer in range(num_layers)]

    found = layers(period) if kinds is None else list(kinds)
    if _LOCAL not in found:
        return None
    # The number that the config names comes first: few layers fit several.
    for k in (period, *range(2, num_layers + 1)):
        if k > 1 and found == layers(k):
            return k
    raise WeightsError(
        f"this ModernBERT model has windows in other layers than ours can have: layer_types is {found}, and only "
        "layers 0, k, 2k, ... may read whole documents"
    )


def _find_thetas(config: Mapping[str, Any], c: Mapping[str, Any]) -> tuple[float, float]:
    """Of layers that read whole documents, and of those with a window."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    kinds = {kind: rope.get(kind) or {} for kind in (_FULL, _LOCAL)}
    scaling = config.get("rope_scaling") or {}
    types = {found.get("rope_type", "default") for found in (*kinds.values(), scaling)}
    check_expected("ModernBERT", {"rope_type": (next(iter(types - {"default"}), "default"), ("default",))})
    theta = float(kinds[_FULL].get("rope_theta", c["global_rope_theta"]))
    local = kinds[_LOCAL].get("rope_theta", c["local_rope_theta"])
    return theta, theta if local is None else float(local)


def _modernbert_rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule(ours="encoder.embedding.weight", theirs=("model.embeddings.tok_embeddings.weight",))
    yield Rule(ours="encoder.embedding_norm.weight", theirs=("model.embeddings.norm.weight",))
    yield Rule(ours="encoder.norm.weight", theirs=("model.final_norm.weight",))
    for number in range(config.num_hidden_layers):
        for ours, theirs in _BLOCK.items():
            if number or ours != "attention_norm":
                name = f"model.layers.{number}.{theirs}.weight"
                yield Rule(ours=f"encoder.layers.{number}.{ours}.weight", theirs=(name,))
    if config.prediction_head:
        yield Rule(ours="prediction_head.dense.weight", theirs=(_HEAD,))
        yield Rule(ours="prediction_head.norm.weight", theirs=("head.norm.weight",))
    if not config.tie_word_embeddings:
        yield Rule(ours="decoder.weight", theirs=("decoder.weight",))
    if config.decoder_bias:
        yield Rule(ours="decoder_bias", theirs=("decoder.bias",))


_BLOCK = {
    "attention_norm": "attn_norm",
    "qkv": "attn.Wqkv",
    "out": "attn.Wo",
    "ffn_norm": "mlp_norm",
    "gate_up": "mlp.Wi",
    "down": "mlp.Wo",
}


def _modernbert_config(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window_of_layer(layer) for layer in range(config.num_hidden_layers)]
    local_theta = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "hidden_activation": "gelu",
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "local_attention": config.local_attention or 128,
        "layer_types": [_FULL if window is None else _LOCAL for window in windows],
        "global_attn_every_n_layers": config.global_attention_every,
        "rope_parameters": {
            _FULL: {"rope_type": "default", "rope_theta": config.rope_theta},
            _LOCAL: {"rope_type": "default", "rope_theta": local_theta},
        },
        "decoder_bias": config.decoder_bias,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


MODERNBERT = Layout(
    name="modernbert",
    describe=describe_modernbert,
    rules=_modernbert_rules,
    embedding="model.embeddings.tok_embeddings.weight",
    head="decoder.weight",
    prefix="model.",
    title="ModernBERT",
    classes="ModernBert",
    token_ids={
        "pad_token_id": "pad",
        "bos_token_id": "cls",
        "eos_token_id": "sep",
        "cls_token_id": "cls",
        "sep_token_id": "sep",
    },
    to_config=_modernbert_config,
    requires={"rope": True, **_ALWAYS, "prediction_head": True, "qk_norm": False, "ngpt": False, "hub_config": None},
)
