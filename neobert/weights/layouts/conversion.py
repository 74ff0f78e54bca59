"""How other formats name and arrange the tensors of the same encoder.

A layout is a list of rules, one for each tensor of ours: the tensors of theirs that it is made of, how they are put
together and how it is taken apart again. Reading and writing use the same rules, so each direction tests the other.
The tensors that a model of ours must have, and their shapes, come from the model itself.

Besides names, these things differ between the formats:

- Fused matrices. Our `qkv` is the rows of all queries, then of all keys, then of all values; our `gate_up` is the rows
  of the gate, then of what it multiplies. ModernBERT has the same; EuroBERT and Llama keep them apart. NeoBERT fuses
  queries, keys and values head by head: the rows of head 0's query, key and value, then those of head 1.
- Grouped heads. Where several heads of queries share one of keys and values, ours has a copy for each.
- Rotary planes. Ours rotates coordinate i with coordinate i + D/2 of a head of width D. NeoBERT alone rotates
  coordinate 2i with 2i + 1. Queries and keys with their rows sorted from one order to the other have equal products,
  so the attention is the same.
- Learned positions. The fork of NeoBERT counts them from 1, with an unused row 0 for padding.

A tensor that is not expected is an error, except a bias of zeros and a second copy of a tied matrix, which change
nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.hub_encoder import build_encoder_of
from neobert.model.layers import PredictionHead
from neobert.weights.describe import WeightsError

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

    prefix: str | None = None
    """What the names of the encoder's tensors start with in a model with a head, and not where the encoder was saved
    alone; None where it is never."""

    prepare: Callable[[Mapping[str, Any], ModelConfig, Tensors], tuple[Tensors, str]] = lambda raw, config, x: (x, "")
    """Their config, ours and the tensors to tensors that the rules fit, and a sentence for the log, empty where nothing
    was changed."""

    is_causal: bool = False
    """Whether it was trained to read what is before a token alone, with a tokenizer that has no mask."""

    title: str = ""
    """As text, where transformers has classes for it."""

    classes: str = ""
    """What the names of these classes start with."""

    token_ids: Mapping[str, str] = field(default_factory=dict)
    """Keys of its config -> roles of `Tokenizer.roles`."""

    to_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    """The inverse of `describe`, without the tokenizer's ids."""

    requires: Mapping[str, Any] | None = None
    """Fields of ModelConfig that have one value in it, for a format that encoders are exported in."""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an `ObjectiveModule` with this architecture."""
    with torch.device("meta"):
        encoder = build_encoder_of(config, ATTENTION["sdpa"])
    shapes = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    if not config.tie_word_embeddings:
        shapes["decoder.weight"] = (config.vocab_size, config.hidden_size)
    if config.prediction_head:
        with torch.device("meta"):
            head = PredictionHead(config).state_dict()
        shapes |= {f"prediction_head.{name}": tuple(tensor.shape) for name, tensor in head.items()}
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
