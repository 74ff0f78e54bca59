"""The encoder that fine-tuning starts from: its architecture and tokenizer become those of the config.

The user's config says little about the model. `bind_checkpoint` gives the config of the run: `model` and
`tokenizer` are the checkpoint's, and `model.init_from` is the folder its weights are read from, so that the saved
config describes the run without looking anywhere else.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.config.rules import validate
from neobert.config.schema import Config, ModelSection
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.model.config import ModelConfig
from neobert.train.runtime import StartupError
from neobert.train.start import choose_start, read_checkpoint_config
from neobert.weights.describe import WeightsError
from neobert.weights.folder import checkpoint_steps
from neobert.weights.load import find_weights, load_encoder_weights

_OF_TRAINING = ("dropout_prob", "embedding_init_range", "decoder_init_range")
"""Fields of ModelConfig that a fine-tuning run sets for itself."""


def bind_checkpoint(config: Config) -> Config:
    """The config with the architecture and tokenizer of its checkpoint: the run's own one when it is resumed, else
    `contrastive.pretrained_checkpoint_dir`. Without either, the config as it is.

    Raises:
        StartupError: the checkpoint cannot be read, or the config says something else than it.
    """
    own = choose_start(config).path
    if own is not None:
        saved = read_checkpoint_config(own)
        theirs = ModelConfig.from_dict(parse_json((own / "model_config.json").read_text()))
        bound = _bind(config, theirs, str(own), init_from=saved.model.init_from, tokenizer=saved.tokenizer)
    elif config.contrastive.pretrained_checkpoint_dir is None:
        return config
    else:
        bound = _bind_pretrained(config)
    errors = validate(bound)
    if errors:
        raise StartupError("\n".join(["the config does not fit the checkpoint:", *errors]))
    return bound


def _bind_pretrained(config: Config) -> Config:
    key = "contrastive.pretrained_checkpoint_dir"
    place = _place(config)
    try:
        folder = find_weights(place)
        weights = load_encoder_weights(folder)
    except WeightsError as error:
        raise StartupError(f"{key}: {error}") from error
    if weights.tokenizer is None:
        raise StartupError(f"{key}: {folder} has no tokenizer.json; put the tokenizer it was trained with there")
    given = config.model.init_from
    if given is not None and Path(given).resolve() != folder.resolve():
        raise StartupError(
            f"model.init_from: {given} is set beside {key} = {place}, which means {folder}; remove one of the two"
        )
    tokenizer = TokenizerSection(path=str(weights.tokenizer))
    _check_tokenizer(config, tokenizer)
    return _bind(config, weights.config, str(folder), init_from=str(folder), tokenizer=tokenizer)


def _place(config: Config) -> str:
    """What `contrastive.pretrained_checkpoint_dir` and `pretrained_checkpoint` mean together."""
    section = config.contrastive
    place = str(section.pretrained_checkpoint_dir)
    if section.pretrained_checkpoint == "latest":
        return place
    folder, step = Path(place), section.pretrained_checkpoint
    for candidate in (folder / "checkpoints" / step, folder / step):
        if candidate.is_dir():
            return str(candidate)
    run = folder.parent if folder.name == "checkpoints" else folder
    there = ", ".join(map(str, checkpoint_steps(run))) or "none"
    raise StartupError(f"contrastive.pretrained_checkpoint: {step} is no checkpoint of {place}; steps there: {there}")


def _bind(
    config: Config, theirs: ModelConfig, place: str, *, init_from: str | None, tokenizer: TokenizerSection
) -> Config:
    """The config with the architecture `theirs`.

    Raises:
        StartupError: a key of `model` is neither at its default nor what the checkpoint has; every one is named.
    """
    shared = {f.name for f in fields(ModelSection)} & {f.name for f in fields(ModelConfig)} - set(_OF_TRAINING)
    defaults = ModelSection()
    differing, bound = [], dict[str, Any]()
    for name in sorted(shared):
        ours, value = getattr(config.model, name), getattr(theirs, name)
        bound[name] = value
        same_width = name == "intermediate_size" and replace(theirs, intermediate_size=ours).ffn_size == theirs.ffn_size
        if ours not in (value, getattr(defaults, name)) and not same_width:
            differing.append(f"model.{name}: the config has {ours!r}, {place} has {value!r}")
    if differing:
        raise StartupError(
            "\n  ".join([f"contrastive.pretrained_checkpoint_dir: {place} holds another architecture:", *differing])
            + "\nremove these keys: the checkpoint decides"
        )
    return replace(config, model=replace(config.model, **bound, init_from=init_from), tokenizer=tokenizer)


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
