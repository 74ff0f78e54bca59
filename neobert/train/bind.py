"""The config of a run that fine-tunes, from the user's, which says little about the model.

`model` and `tokenizer` are the checkpoint's, and `model.init_from` is the folder its weights are read from, so that the
saved config describes the run without looking anywhere else.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.config.rules import validate
from neobert.config.schema import Config, ModelSection
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import StartupError
from neobert.model.config import Architecture, ModelConfig
from neobert.train.start import read_checkpoint_config
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import find_weights, load_encoder_weights

_OF_TRAINING = ("dropout_prob", "embedding_init_range", "decoder_init_range")
"""Fields of the architecture that a fine-tuning run sets for itself."""


def bind_own(config: Config, checkpoint: Path) -> Config:
    """The config with the architecture and tokenizer of a checkpoint that its run continues from.

    Raises:
        StartupError: the checkpoint cannot be read, or the config says something else than it.
    """
    saved = read_checkpoint_config(checkpoint)
    theirs = ModelConfig.from_dict(parse_json((checkpoint / "model_config.json").read_text()))
    return _bind(config, theirs, str(checkpoint), init_from=saved.model.init_from, tokenizer=saved.tokenizer)


def bind_source(config: Config, source: str, key: str, *, any_encoder: bool = False) -> Config:
    """The config with the architecture and tokenizer of the encoder that a run starts from.

    Args:
        source: a run, a checkpoint, an exported folder or a name of the hub.
        key: the key that names it.
        any_encoder: as of `load_encoder_weights`.

    Raises:
        StartupError: it cannot be read, or the config says something else than it.
    """
    try:
        folder = find_weights(source)
        weights = load_encoder_weights(folder, any_encoder=any_encoder)
    except WeightsError as error:
        raise StartupError(f"{key}: {error}") from error
    if weights.tokenizer is None:
        raise StartupError(f"{key}: {folder} has no tokenizer.json; put the tokenizer it was trained with there")
    initial = config.model.init_from
    if initial is not None and Path(initial).resolve() != folder.resolve():
        raise StartupError(
            f"model.init_from: {initial} is set beside {key} = {source}, which means {folder}; remove one of the two"
        )
    tokenizer = TokenizerSection(path=str(weights.tokenizer))
    _check_tokenizer(config, tokenizer)
    return _bind(config, weights.config, str(folder), key=key, init_from=str(folder), tokenizer=tokenizer)


def _bind(
    config: Config,
    theirs: ModelConfig,
    source: str,
    *,
    key: str = "trainer.resume_from_checkpoint",
    init_from: str | None,
    tokenizer: TokenizerSection,
) -> Config:
    """The config with the architecture `theirs`; a length of rows that nobody set is at most the model's.

    Raises:
        StartupError: a key of `model` is neither at its default nor what the checkpoint has; every one is named.
    """
    shared = {f.name for f in fields(Architecture)} - set(_OF_TRAINING)
    defaults = ModelSection()
    differing, bound = [], dict[str, Any]()
    for name in sorted(shared):
        ours, value = getattr(config.model, name), getattr(theirs, name)
        bound[name] = value
        same_width = name == "intermediate_size" and replace(theirs, intermediate_size=ours).ffn_size == theirs.ffn_size
        if ours not in (value, getattr(defaults, name)) and not same_width:
            differing.append(f"model.{name}: the config has {ours!r}, {source} has {value!r}")
    if differing:
        raise StartupError(
            "\n  ".join([f"{key}: {source} holds another architecture:", *differing])
            + "\nremove these keys: the checkpoint decides"
        )
    dataset = config.dataset
    if "dataset.max_seq_length" not in config.explicit:
        dataset = replace(dataset, max_seq_length=min(dataset.max_seq_length, theirs.max_position_embeddings))
    model = replace(config.model, **bound, init_from=init_from)
    bound_config = replace(config, model=model, tokenizer=tokenizer, dataset=dataset)
    errors = validate(bound_config)
    if errors:
        raise StartupError("\n".join(["the config does not fit the checkpoint:", *errors]))
    return bound_config


def _check_tokenizer(config: Config, theirs: TokenizerSection) -> None:
    """Raises when the config names another tokenizer than the checkpoint has.

    Raises:
        StartupError: with both.
    """
    section = config.tokenizer
    if section.name is None and section.path is None:
        return
    if not load_tokenizer(section).is_source_of(load_tokenizer(theirs).digest):
        key, value = ("name", section.name) if section.path is None else ("path", section.path)
        raise StartupError(
            f"tokenizer.{key}: {value} is not the tokenizer of the checkpoint ({theirs.path}); remove the key"
        )
