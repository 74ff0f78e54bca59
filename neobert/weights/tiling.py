"""A larger encoder from a smaller one: widths by repeating units, depth by repeating layers.

Width. Position i of a large axis takes unit `(i - (N - n) // 2) mod n` of the small one: the small matrix is in the
middle and continues periodically to both sides ("center tiling", ModernBERT, arXiv 2412.13663, section 2.2.4).
The units are channels of the residual stream, whole attention heads, and neurons of the feed-forward layer; queries,
keys and values, and gate and up, are tiled each by itself.

Plain tiling sums every copied unit again, so activations grow. Here the large layer computes what the small one did: of
a weight whose input unit has c copies, each copy gets a fraction, and the fractions sum to 1 (Net2Net, arXiv
1511.05641). They are unequal and random: with equal ones, copies would have equal gradients forever, and the large
model no more capacity than the small one (LEMON, arXiv 2310.07999). A tied vocabulary projection cannot be split,
being the embedding too; there the weights of the norm before it are divided by c.

Depth. Layer i of D takes layer `floor(i d / D)` of d (the order of Gopher, arXiv 2112.11446, appendix G.3.3). What r
copies of a layer add to the residual stream is divided by r.

What is preserved: with the same depth, and every width the same or a multiple, all hidden states (repeated) and logits,
up to rounding. With a width that is no multiple, the norms see some channels more often than others, and with more
layers the copies see each other's output: then the function is near, not equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from neobert.model.config import ModelConfig
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights
from neobert.weights.layouts import tensor_shapes

TILED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Fields of ModelConfig that the large encoder may have larger."""


def center_map(small: int, large: int) -> Tensor:
    """int64 `[large]`: the unit of the small axis at each index of the large one. For 3 and 7: 1 2 0 1 2 0 1."""
    return (torch.arange(large) - (large - small) // 2) % small


def layer_map(small: int, large: int) -> list[int]:
    """The small encoder's layer at each index of the large one. For 2 and 5: 0 0 0 1 1."""
    return [layer * small // large for layer in range(large)]


def choose_layers(weights: EncoderWeights, layers: Sequence[int]) -> EncoderWeights:
    """`weights` with these of its layers alone, in this order: a start for a student (DistilBERT, arXiv 1910.01108,
    section 3, takes every other one).

    Raises:
        WeightsError: it has no such layer, or one that computes something else at its new index.
    """
    config = weights.config
    count = config.num_hidden_layers
    unknown = [layer for layer in layers if layer >= count]
    if unknown:
        raise WeightsError(
            f"model.init_layers: {list(layers)}: the source has layers 0 to {count - 1}, and no {unknown[0]}"
        )
    for index, layer in enumerate(layers):
        windows = config.window_of_layer(layer), config.window_of_layer(index)
        if windows[0] != windows[1]:
            was, would = ("whole documents" if window is None else f"a window of {window}" for window in windows)
            raise WeightsError(
                f"model.init_layers: {list(layers)}: layer {layer} of the source attends to {was}, as layer {index} it "
                f"would attend to {would}; choose others (model.global_attention_every is "
                f"{config.global_attention_every})"
            )
        if not config.first_attention_norm and (index == 0) != (layer == 0):
            raise WeightsError(
                f"model.init_layers: {list(layers)}: layer 0 of the source has no norm before its attention (model."
                "first_attention_norm: false), so it must be the first one, once"
            )
    tensors = {name: x for name, x in weights.tensors.items() if not name.startswith(_LAYERS)}
    for index, layer in enumerate(layers):
        prefix = f"{_LAYERS}{layer}."
        own = {name: x for name, x in weights.tensors.items() if name.startswith(prefix)}
        tensors |= {f"{_LAYERS}{index}.{name.removeprefix(prefix)}": x for name, x in own.items()}
    note = f"layers {', '.join(map(str, layers))} of {count}"
    return replace(
        weights,
        config=replace(config, num_hidden_layers=len(layers)),
        tensors=tensors,
        notes=(*weights.notes, note),
    )


_LAYERS = "encoder.layers."


def check_tiling(small: ModelConfig, large: ModelConfig) -> None:
    """Raises when an encoder of `small` cannot be tiled to one of `large`.

    Raises:
        WeightsError: naming every key, both values and what to write.
    """
    problems = [
        f"model.{name}: {getattr(large, name)} is less than the {getattr(small, name)} to be tiled; write at least that"
        for name in TILED
        if getattr(large, name) < getattr(small, name)
    ]
    if small.head_dim != large.head_dim:
        problems.append(
            f"model.num_attention_heads: {large.num_attention_heads} heads of {large.head_dim}, but the heads to be "
            f"tiled have width {small.head_dim} and stay whole; write model.hidden_size as a multiple of "
            f"{small.head_dim} and model.num_attention_heads: model.hidden_size / {small.head_dim}"
        )
    for name in (f.name for f in fields(small) if f.name not in TILED):
        if getattr(large, name) != getattr(small, name):
            problems.append(f"model.{name}: {getattr(large, name)!r}, but {getattr(small, name)!r} is to be tiled")
    if problems:
        raise WeightsError("\n  ".join(["model.init_tile: this encoder cannot be tiled:", *problems]))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Maps:
    """Small unit at each index of every large axis, and where the fractions come from."""

    channels: Tensor
    heads: Tensor
    """Rows of one of queries, keys and values; columns of `out`."""

    neurons: Tensor
    generator: torch.Generator

    def fractions(self, num_rows: int, units: Tensor) -> Tensor:
        """fp32 `[num_rows, len(units)]`: positive numbers that sum to 1 over the copies of each unit."""
        drawn = torch.rand(num_rows, len(units), generator=self.generator) + 0.5
        totals = torch.zeros(num_rows, int(units.max()) + 1).index_add_(1, units, drawn)
        return drawn / totals[:, units]


def tile_weights(weights: EncoderWeights, config: ModelConfig, *, seed: int) -> EncoderWeights:
    """`weights` as those of the larger encoder of `config`, in their dtype; the vocabulary stays.

    Args:
        seed: Of the fractions of copied units.

    Raises:
        WeightsError: one cannot be tiled to the other.
    """
    small = weights.config
    check_tiling(small, config)
    heads = center_map(small.num_attention_heads, config.num_attention_heads)
    within = torch.arange(small.head_dim)
    maps = _Maps(
        channels=center_map(small.hidden_size, config.hidden_size),
        heads=(heads[:, None] * small.head_dim + within).flatten(),
        neurons=center_map(small.ffn_size, config.ffn_size),
        generator=torch.Generator().manual_seed(seed),
    )
    layers = layer_map(small.num_hidden_layers, config.num_hidden_layers)
    copies = [layers.count(layer) for layer in layers]
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        source, kind, divisor = name, name.removesuffix(".weight"), 1
        if name.startswith("encoder.layers."):
            _, _, number, kind, *_ = name.split(".")
            source = name.replace(f".{number}.", f".{layers[int(number)]}.", 1)
            divisor = copies[int(number)] if kind in _RESIDUAL else 1
        if kind not in _TILE:
            raise WeightsError(f"model.init_tile: how to tile {name} is not known; start this variant without it")
        if source not in weights.tensors:
            raise WeightsError(
                f"model.init_tile: {name} would be a copy of {source}, which the source does not have (model."
                "first_attention_norm: false); write its own model.num_hidden_layers"
            )
        last_norm = "prediction_head.norm" if config.prediction_head else "encoder.norm"
        tile = _tile_tied_norm if kind == last_norm and config.tie_word_embeddings else _TILE[kind]
        tiled = tile(weights.tensors[source].float(), maps) / divisor
        assert tiled.shape == shape, f"{name}: {tuple(tiled.shape)} instead of {shape}"
        tensors[name] = tiled.to(weights.tensors[source].dtype)
    return replace(weights, config=config, tensors=tensors)


def _tile_rows(weight: Tensor, units: Tensor, num_blocks: int) -> Tensor:
    return torch.cat([block[units] for block in weight.chunk(num_blocks)])


def _tile_columns(weight: Tensor, units: Tensor, maps: _Maps) -> Tensor:
    return weight[:, units] * maps.fractions(len(weight), units)


def _tile_embedding(weight: Tensor, maps: _Maps) -> Tensor:
    return weight[:, maps.channels]


def _keep(weight: Tensor, maps: _Maps) -> Tensor:
    return weight


def _tile_norm(weight: Tensor, maps: _Maps) -> Tensor:
    return weight[maps.channels]


def _tile_tied_norm(weight: Tensor, maps: _Maps) -> Tensor:
    return weight[maps.channels] / maps.channels.bincount()[maps.channels]


def _tile_qkv(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(_tile_rows(weight, maps.heads, 3), maps.channels, maps)


def _tile_out(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(_tile_rows(weight, maps.channels, 1), maps.heads, maps)


def _tile_gate_up(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(_tile_rows(weight, maps.neurons, 2), maps.channels, maps)


def _tile_up(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(_tile_rows(weight, maps.neurons, 1), maps.channels, maps)


def _tile_down(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(_tile_rows(weight, maps.channels, 1), maps.neurons, maps)


def _tile_decoder(weight: Tensor, maps: _Maps) -> Tensor:
    return _tile_columns(weight, maps.channels, maps)


_RESIDUAL = ("out", "down")
"""Matrices of a layer that write into the residual stream."""

_TILE: dict[str, Callable[[Tensor, _Maps], Tensor]] = {
    "encoder.embedding": _tile_embedding,
    "encoder.position_embedding": _tile_embedding,
    "encoder.embedding_norm": _tile_norm,
    "encoder.norm": _tile_norm,
    "prediction_head.dense": lambda weight, maps: _tile_columns(
        _tile_rows(weight, maps.channels, 1), maps.channels, maps
    ),
    "prediction_head.norm": _tile_norm,
    "decoder": _tile_decoder,
    "decoder_bias": _keep,
    "q_norm": _keep,
    "k_norm": _keep,
    "attention_norm": _tile_norm,
    "qkv": _tile_qkv,
    "out": _tile_out,
    "ffn_norm": _tile_norm,
    "gate_up": _tile_gate_up,
    "up": _tile_up,
    "down": _tile_down,
}
"""Kind of weight -> the large one from the fp32 small one."""
