"""Initial weights from another model (`model.init_from`), for a fresh start, into the same architecture, or with
`model.init_tile` into a larger one (`neobert.weights.tiling`).

Keys of the architecture that are not set are the source's; those that are set must match it. A run that names no
tokenizer has the source's, with the special tokens that one of a decoder lacks. The config that has them all is the
run's, and the one that is saved.

With the same tokenizer and as many rows, everything is copied as it is. With another tokenizer, or another number of
rows, the embedding (and an untied vocabulary projection) follows the texts of the tokens; see
`neobert.weights.vocabulary`. Optimizer, schedule, step and data start again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.config.nesting import parse_json
from neobert.config.rules import validate
from neobert.config.schema import Config, ModelSection, TokenizerSection
from neobert.data.rows.order import key
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.errors import DataError, StartupError
from neobert.model.config import ARCHITECTURE, Architecture, ModelConfig
from neobert.model.ngpt import normalise_
from neobert.objectives.base import Objective, ObjectiveModule
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, load_encoder_weights
from neobert.weights.tiling import TILED, choose_layers, tile_weights
from neobert.weights.vocabulary import VOCABULARY_TENSORS, match_tokens, remap_rows


def bind_architecture(config: Config, theirs: Architecture) -> Config:
    """The config with the architecture `theirs` in the keys that are not set; nothing is checked.

    A key is set when it was written down, or is not at its default (in a config that was made in Python).
    """
    ours, defaults = config.model, ModelSection()
    source = {
        name: getattr(theirs, name)
        for name in ARCHITECTURE
        if f"model.{name}" not in config.explicit and getattr(ours, name) == getattr(defaults, name)
    }
    explicit = config.explicit | {f"model.{name}" for name in ARCHITECTURE}
    return replace(config, model=replace(ours, **source), explicit=explicit)


def check_bound(config: Config) -> None:
    """Raises when a config breaks a rule with the architecture of its source.

    Raises:
        StartupError: with every rule that is broken.
    """
    errors = validate(config)
    if errors:
        raise StartupError(
            "\n  ".join([f"the config does not fit model.init_from: {config.model.init_from}:", *errors])
        )


def load_initial_weights(config: Config) -> tuple[Config, EncoderWeights | None]:
    """What `model.init_from` names, and the config with its architecture; without it the config as it is, and None.

    Raises:
        StartupError: it cannot be read, or has another architecture than the config gives; every difference is named.
    """
    source = config.model.init_from
    if source is None:
        return config, None
    try:
        weights = load_encoder_weights(
            source,
            drop_decoder_bias=config.model.init_drop_decoder_bias,
            weights=config.model.init_weights,
            any_encoder=config.task == "finetune",
        )
    except WeightsError as error:
        raise StartupError(f"model.init_from: {error}") from error
    if config.model.init_layers:
        try:
            weights = choose_layers(weights, config.model.init_layers)
        except WeightsError as error:
            raise StartupError(str(error)) from error
    config = bind_architecture(config, weights.config)
    differences = [
        (name, f"model.{name}: the config has {ours!r}, {source} has {theirs!r}")
        for name, ours, theirs in _architectures(config, weights.config)
        if ours != theirs and not (config.model.init_tile and name in TILED)
    ]
    if differences:
        larger = all(name in TILED for name, _ in differences)
        raise StartupError(
            "\n  ".join([f"model.init_from: {source} holds another architecture:", *(text for _, text in differences)])
            + "\nremove these keys: keys that are not set take the source's values"
            + ("; or write model.init_tile: true to make a larger model of it" if larger else "")
        )
    config = bind_tokenizer(config, weights)
    check_bound(config)
    return config, _tile(config, weights) if config.model.init_tile else weights


def bind_tokenizer(config: Config, weights: EncoderWeights) -> Config:
    """The config with the tokenizer of `weights`, where it names none and trains none.

    Raises:
        StartupError: they have none either.
    """
    section = config.tokenizer
    if _has_tokenizer(section):
        return config
    if weights.tokenizer is None:
        raise StartupError(f"model.init_from: {weights.folder} has no tokenizer; name one with tokenizer.path")
    rewrite = section.allow_special_token_rewrite or weights.is_causal
    return replace(config, tokenizer=replace(section, path=str(weights.tokenizer), allow_special_token_rewrite=rewrite))


def _has_tokenizer(section: TokenizerSection) -> bool:
    return section.train or section.name is not None or section.path is not None


def _tile(config: Config, weights: EncoderWeights) -> EncoderWeights:
    target = {name: getattr(config.model, name) for name in TILED}
    try:
        return tile_weights(weights, replace(weights.config, **target), seed=key(config.seed, "init") % 2**63)
    except ValueError as error:  # WeightsError, or sizes that make no model.
        raise StartupError(str(error)) from error


def _architectures(config: Config, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Key, value of the config and value of the source, of everything that shapes the computation."""
    section, skipped = config.model, {"max_position_embeddings" if theirs.rope else "rope_theta"}
    if replace(theirs, intermediate_size=section.intermediate_size).ffn_size == theirs.ffn_size:
        skipped.add("intermediate_size")
    names = [name for name in ARCHITECTURE if name not in skipped]
    return [(name, getattr(section, name), getattr(theirs, name)) for name in names]


def copy_initial_weights(
    module: ObjectiveModule,
    objective: Objective,
    weights: EncoderWeights,
    tokenizer: Tokenizer,
    *,
    tile: bool = False,
) -> str:
    """Writes `weights` into `module`, in its dtype; returns a line for the log. What only training has starts fresh.
    `tile`: they were tiled.

    Raises:
        StartupError: the tokens of the two vocabularies cannot be matched.
    """
    tensors, note = _with_vocabulary(weights, tokenizer, module.encoder.config.vocab_size)
    fresh = {name: x for name, x in module.state_dict().items() if name.startswith(objective.training_only)}
    module.load_state_dict({**fresh, **tensors}, strict=True)
    module.check_tied()
    normalise_(module.unit_matrices())  # The mean of rows of length 1 is shorter.
    trained = f" after {weights.step:,} steps" if weights.step is not None else ""
    config = weights.config
    tiled = f"; tiled to {config.num_hidden_layers} layers x {config.hidden_size}" if tile else ""
    source = f"{weights.folder} ({weights.layout} layout{trained})"
    return "; ".join([f"initial weights from {source}: {len(tensors)} tensors{tiled}", *weights.notes, note])


def _with_vocabulary(weights: EncoderWeights, tokenizer: Tokenizer, num_rows: int) -> tuple[dict[str, Tensor], str]:
    if weights.tokenizer is None:
        raise StartupError(
            f"model.init_from: {weights.folder} has no tokenizer, so its embeddings cannot be matched with tokens; put "
            "the tokenizer.json it was trained with beside its weights"
        )
    try:
        theirs = load_tokenizer(
            TokenizerSection(path=str(weights.tokenizer), allow_special_token_rewrite=weights.is_causal)
        )
    except DataError as error:
        raise StartupError(f"model.init_from: {error}") from error
    if theirs.digest == tokenizer.digest and num_rows == weights.config.vocab_size and not theirs.added:
        return weights.tensors, "the tokenizer is the same"
    matched = match_tokens(theirs.vocabulary, tokenizer.vocabulary, theirs.roles, tokenizer.roles)
    # What was added to it just now has no row that means anything.
    pairs = {new: old for new, old in matched.items() if old < weights.config.vocab_size and old not in theirs.added}
    tensors = dict(weights.tensors)
    for name in VOCABULARY_TENSORS:
        if name in tensors:
            tensors[name] = remap_rows(tensors[name], pairs, num_rows)
    new = len(tokenizer.vocabulary) - len(pairs)
    return tensors, (
        f"embeddings of {len(pairs):,} tokens are copied, {new:,} tokens that its tokenizer lacks start at their mean"
    )


def start_at_frequencies(module: ObjectiveModule, counts: NDArray[np.int64]) -> str:
    """Has the bias of the vocabulary projection start at the logarithm of the frequency of each token, of which
    `counts` has how often it occurs; returns a line for the log.

    With logits near 0 otherwise, the loss then starts near the entropy of the frequencies. Every row of the vocabulary
    counts once more (Laplace), so that the logarithm of a token that does not occur is finite.
    """
    bias = module.decoder_bias
    assert bias is not None, "model.decoder_bias_init needs model.decoder_bias"
    smoothed = np.ones(len(bias))
    smoothed[: len(counts)] += counts
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(smoothed / smoothed.sum())))
    return f"the bias of the vocabulary projection starts at log frequencies, of {counts.sum():,} tokens"


def bind_initial(config: Config, checkpoint_config: Config | None) -> tuple[Config, EncoderWeights | None]:
    """The config with the architecture of `model.init_from`, and its weights; a checkpoint has its own of both."""
    if checkpoint_config is None:
        return load_initial_weights(config)
    if config.model.init_from is None:
        return config, None
    config = bind_architecture(config, checkpoint_config.model)
    if not _has_tokenizer(config.tokenizer):
        config = replace(config, tokenizer=checkpoint_config.tokenizer)
    check_bound(config)
    return config, None


def choose_hub_encoder(checkpoint: Path | None, initial: EncoderWeights | None) -> ModelConfig | None:
    """The encoder of transformers that a run continues or starts with; None for one of ours."""
    if checkpoint is not None:
        found = ModelConfig.from_dict(parse_json((checkpoint / "model_config.json").read_text()))
    elif initial is not None:
        found = initial.config
    else:
        return None
    return found if found.hub_config is not None else None
