"""How other formats name and arrange the tensors of the same encoder.

A layout is a list of rules, one for each tensor of ours: the tensors of theirs that it is made of, how they are put
together and how it is taken apart again. Reading and writing use the same rules, so each direction tests the other.
The tensors that a model of ours must have, and their shapes, come from the model itself.

Three things differ between the formats, besides names:

- Fused matrices. Our `qkv` is the rows of all queries, then of all keys, then of all values; our `gate_up` is the rows
  of the gate, then of what it multiplies. EuroBERT keeps them apart. NeoBERT fuses queries, keys and values head by
  head: the rows of head 0's query, key and value, then those of head 1.
- Rotary planes. Ours rotates coordinate i with coordinate i + D/2 of a head of width D, EuroBERT too. NeoBERT rotates
  coordinate 2i with 2i + 1. Queries and keys with their rows sorted from one order to the other have equal products,
  so the attention is the same.
- Learned positions. The fork of NeoBERT counts them from 1, with an unused row 0 for padding.

A tensor that is not expected is an error, except a bias of zeros and a second copy of a tied matrix, which change
nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.hub_encoder import build_encoder_of
from neobert.weights.describe import (
    WeightsError,
    describe_eurobert,
    describe_neobert,
    describe_ours,
)

Tensors = Mapping[str, Tensor]

DECODER_BIASES = ("decoder_bias", "decoder.bias")
"""Ours, and what it is called where the projection is a linear layer."""


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One tensor of ours and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    merge: Callable[[Sequence[Tensor]], Tensor] = _rows
    """Theirs to ours; by default one after the other along the rows."""

    split: Callable[[Tensor], Sequence[Tensor]] | None = None
    """The inverse of `merge`; by default equal parts of the rows."""

    def take_apart(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.chunk(len(self.theirs)) if self.split is None else self.split(tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One format."""

    name: str
    describe: Callable[[Mapping[str, Any], Tensors], ModelConfig]
    """Their config and tensors to our ModelConfig. Raises WeightsError for what our encoder cannot express."""

    rules: Callable[[ModelConfig], Iterator[Rule]]
    embedding: str
    """Their name of the token embedding."""

    head: str
    """Their name of the vocabulary projection: absent, or a copy of the embedding, when the two are tied."""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an `ObjectiveModule` with this architecture."""
    with torch.device("meta"):
        encoder = build_encoder_of(config, ATTENTION["sdpa"])
    shapes = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    if not config.tie_word_embeddings:
        shapes["decoder.weight"] = (config.vocab_size, config.hidden_size)
    if config.decoder_bias:
        shapes["decoder_bias"] = (config.vocab_size,)
    if config.ngpt:
        shapes["logit_scale"] = (config.vocab_size,)
    return shapes


def to_ours(
    layout: Layout, config: ModelConfig, tensors: Tensors, *, drop_decoder_bias: bool = False
) -> dict[str, Tensor]:
    """`tensors` of a format under our names, dtypes as they are.

    With `drop_decoder_bias` a bias that `config` does not have is left out.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; every one is named.
    """
    shapes = tensor_shapes(config)
    rules = list(layout.rules(config))
    if {rule.ours for rule in rules} != set(shapes):
        odd = ", ".join(sorted({rule.ours for rule in rules} ^ set(shapes)))
        raise WeightsError(f"the {layout.name} layout has no rule for this architecture: {odd}")
    problems, result, known = [], {}, {name for rule in rules for name in rule.theirs}
    for rule in rules:
        parts = rule.take_apart(torch.empty(shapes[rule.ours], device="meta"))
        for name, part in zip(rule.theirs, parts):
            if name not in tensors:
                problems.append(f"{name} is missing, shape {list(part.shape)}")
            elif tensors[name].shape != part.shape:
                problems.append(f"{name} has shape {list(tensors[name].shape)} instead of {list(part.shape)}")
        if not problems:
            result[rule.ours] = rule.merge([tensors[name] for name in rule.theirs]).contiguous()
    problems += _unexpected(layout, tensors, known, drop_decoder_bias)
    if problems:
        raise WeightsError("\n  ".join([f"the weights do not fit the {layout.name} layout:", *problems]))
    return result


def _unexpected(layout: Layout, tensors: Tensors, known: set[str], drop_decoder_bias: bool) -> Iterator[str]:
    for name in tensors:
        tensor = tensors[name]
        if name in known or (name.endswith(".bias") and not tensor.any()):
            continue
        if name == layout.head and layout.embedding in tensors:
            if not torch.equal(tensor, tensors[layout.embedding]):
                yield f"{name} is tied to {layout.embedding} by the config, but the two differ"
        elif not (drop_decoder_bias and name in DECODER_BIASES):
            yield f"{name} is not expected, shape {list(tensor.shape)}"


def from_ours(layout: Layout, config: ModelConfig, tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `to_ours`: our tensors under the names of a format. The head is left out when it is tied."""
    return {
        name: part.contiguous()
        for rule in layout.rules(config)
        for name, part in zip(rule.theirs, rule.take_apart(tensors[rule.ours]))
    }


# --- ours -----------------------------------------------------------------------------------------------------------


def _our_rules(config: ModelConfig) -> Iterator[Rule]:
    return (Rule(ours=name, theirs=(name,)) for name in tensor_shapes(config))


def _remote_code_rules(config: ModelConfig) -> Iterator[Rule]:
    for name in tensor_shapes(config):
        theirs = "decoder.bias" if name == "decoder_bias" else name
        yield Rule(ours=name, theirs=(f"model.{name}" if name.startswith("encoder.") else theirs,))


# --- EuroBERT -------------------------------------------------------------------------------------------------------


def _eurobert_rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule(ours="encoder.embedding.weight", theirs=("model.embed_tokens.weight",))
    yield Rule(ours="encoder.norm.weight", theirs=("model.norm.weight",))
    for number in range(config.num_hidden_layers):
        for ours, theirs in _EUROBERT_BLOCK.items():
            names = tuple(f"model.layers.{number}.{part}.weight" for part in theirs)
            yield Rule(ours=f"encoder.layers.{number}.{ours}.weight", theirs=names)
    if not config.tie_word_embeddings:
        yield Rule(ours="decoder.weight", theirs=("lm_head.weight",))


_EUROBERT_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


# --- NeoBERT and its fork -------------------------------------------------------------------------------------------


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
    feed_forward = {"gate_up": gate_up, "down": ("w3",)} if config.hidden_act == "swiglu" else {"up": "0", "down": "2"}
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


LAYOUTS: dict[str, Layout] = {
    "checkpoint": Layout(
        name="checkpoint",
        describe=describe_ours,
        rules=_our_rules,
        embedding="encoder.embedding.weight",
        head="decoder.weight",
    ),
    "remote_code": Layout(
        name="remote_code",
        # transformers changes the size beside the architecture when it resizes the embedding.
        describe=lambda config, tensors: describe_ours(
            {**config["architecture"], "vocab_size": config["vocab_size"]}, tensors
        ),
        rules=_remote_code_rules,
        embedding="model.encoder.embedding.weight",
        head="decoder.weight",
    ),
    "eurobert": Layout(
        name="eurobert",
        describe=describe_eurobert,
        rules=_eurobert_rules,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
    ),
    "neobert": Layout(
        name="neobert",
        describe=describe_neobert,
        rules=lambda config: _neobert_rules(config, ("w12",)),
        embedding="model.encoder.weight",
        head="decoder.weight",
    ),
    "neobert_fork": Layout(
        name="neobert_fork",
        describe=describe_neobert,
        rules=lambda config: _neobert_rules(config, ("w1", "w2")),
        embedding="model.encoder.weight",
        head="decoder.weight",
    ),
}
"""All formats. `neobert` is that of the published model, `neobert_fork` that of training code derived from it."""
