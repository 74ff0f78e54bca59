"""NeoBERT as published, and the fork of its training code that this project's config keys come from."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neobert.model.config import ModelConfig
from neobert.weights.describe import WeightsError, build_config, check_expected
from neobert.weights.layouts.conversion import Layout, Rule, Tensors


def describe_neobert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The `config.json` of a NeoBERT model, or the `model` section of the fork's `config.yaml`.

    The vocabulary, the number of learned positions, the tie of the weights and the bias of the vocabulary projection
    (one of zeros is none) are read off the tensors: the fork's configs are known to say otherwise.
    """
    check_expected("NeoBERT", {"ngpt": (bool(config.get("ngpt", False)), (False,))})
    embedding, head = tensors.get("model.encoder.weight"), tensors.get("decoder.weight")
    bias = tensors.get("decoder.bias")
    if embedding is None:
        raise WeightsError("model.encoder.weight is missing: this is no NeoBERT with a language-modelling head")
    try:
        lengths = [config[key] for key in ("max_position_embeddings", "max_length") if key in config]
        positions = tensors.get("model.positional_embedding.weight")
        return build_config(
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


def _neobert_rules(config: ModelConfig, gate_up: tuple[str, ...]) -> Iterator[Rule]:
    yield Rule(ours="encoder.embedding.weight", theirs=("model.encoder.weight",))
    yield Rule(ours="encoder.norm.weight", theirs=("model.layer_norm.weight",))
    if not config.rope:
        yield Rule(
            ours="encoder.position_embedding.weight",
            theirs=("model.positional_embedding.weight",),
            merge=lambda parts: parts[0][1:],
            split=lambda tensor: (torch.cat((tensor.new_zeros(1, tensor.shape[1]), tensor)),),
        )
    feed_forward = {"gate_up": gate_up, "down": ("w3",)} if config.is_gated else {"up": "0", "down": "2"}
    for number in range(config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{number}", f"model.transformer_encoder.{number}"
        yield Rule(
            ours=f"{ours}.qkv.weight",
            theirs=(f"{theirs}.qkv.weight",),
            merge=lambda parts: _heads_apart(parts[0], config),
            split=lambda tensor: (_heads_together(tensor, config),),
        )
        yield Rule(ours=f"{ours}.out.weight", theirs=(f"{theirs}.wo.weight",))
        for norm in ("attention_norm", "ffn_norm"):
            yield Rule(ours=f"{ours}.{norm}.weight", theirs=(f"{theirs}.{norm}.weight",))
        for name, parts in feed_forward.items():
            yield Rule(ours=f"{ours}.{name}.weight", theirs=tuple(f"{theirs}.ffn.{part}.weight" for part in parts))
    if not config.tie_word_embeddings:
        yield Rule(ours="decoder.weight", theirs=("decoder.weight",))
    if config.decoder_bias:
        yield Rule(ours="decoder_bias", theirs=("decoder.bias",))


def _heads_apart(weight: Tensor, config: ModelConfig) -> Tensor:
    """Rows `[head, (q, k, v), D]` with planes (2i, 2i + 1) to rows `[(q, k, v), head, D]` with planes (i, i + D/2)."""
    heads, width = config.num_attention_heads, config.head_dim
    qkv = weight.reshape(heads, 3, width, -1).transpose(0, 1)
    if config.rope:
        pairs = qkv[:2].reshape(2, heads, width // 2, 2, -1).transpose(2, 3)
        qkv = torch.cat((pairs.reshape(2, heads, width, -1), qkv[2:]))
    return qkv.reshape(weight.shape)


def _heads_together(weight: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `_heads_apart`."""
    heads, width = config.num_attention_heads, config.head_dim
    qkv = weight.reshape(3, heads, width, -1)
    if config.rope:
        pairs = qkv[:2].reshape(2, heads, 2, width // 2, -1).transpose(2, 3)
        qkv = torch.cat((pairs.reshape(2, heads, width, -1), qkv[2:]))
    return qkv.transpose(0, 1).reshape(weight.shape)


def _layout(name: str, gate_up: tuple[str, ...]) -> Layout:
    return Layout(
        name=name,
        describe=describe_neobert,
        rules=lambda config: _neobert_rules(config, gate_up),
        embedding="model.encoder.weight",
        head="decoder.weight",
    )


NEOBERT = _layout("neobert", ("w12",))
NEOBERT_FORK = _layout("neobert_fork", ("w1", "w2"))


def choose_neobert(tensors: Tensors) -> Layout:
    """Which of the two these tensors are."""
    return NEOBERT if any(name.endswith(".ffn.w12.weight") for name in tensors) else NEOBERT_FORK
