"""The teacher of a run: a trained encoder whose outputs another one learns.

It reads the rows of its student, so both have one tokenizer; a run that names none has the teacher's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neobert.config.fields import FIELDS
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.data.tokenizer import Tokenizer
from neobert.errors import StartupError
from neobert.inference.model import build_loaded
from neobert.model.pooling import POOLING
from neobert.objectives.base import Teacher
from neobert.objectives.table import OBJECTIVES
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, UnknownLayout, load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

TEACHERS = ("distill.teacher", "contrastive.teacher")
"""Keys that name one, of which a config has one at most."""


def find_teacher(config: Config) -> tuple[str, str] | None:
    """The key that names a teacher, and its value; None where there is none."""
    named = ((key, FIELDS[key].value_in(config)) for key in TEACHERS)
    return next(((key, str(value)) for key, value in named if value is not None), None)


def bind_teacher(config: Config) -> tuple[Config, EncoderWeights | None]:
    """The config with the teacher's tokenizer, where it names none, and the teacher's weights; None without one.

    Raises:
        StartupError: it cannot be read, or is no encoder that the run can learn from; the message names the key.
    """
    found = find_teacher(config)
    if found is None:
        return config, None
    key, path = found
    try:
        weights = _load(path)
    except WeightsError as error:
        raise StartupError(f"{key}: {error}") from error
    _check_weights(key, weights, config)
    section = config.tokenizer
    if section.path is None and section.name is None:
        config = replace(config, tokenizer=replace(section, path=str(weights.tokenizer)))
    return config, weights


def _load(path: str) -> EncoderWeights:
    """As an encoder of ours, or else as transformers has it."""
    try:
        return load_encoder_weights(path)
    except UnknownLayout:
        return load_encoder_weights(path, any_encoder=True)


def _check_weights(key: str, weights: EncoderWeights, config: Config) -> None:
    where, longest = weights.folder, weights.config.max_position_embeddings
    if weights.tokenizer is None:
        raise StartupError(f"{key}: {where} has no tokenizer.json; put the tokenizer of the model there")
    if weights.is_causal:
        raise StartupError(
            f"{key}: {where} holds a decoder, which has not learned to use what follows a token; make an encoder of it "
            "first with model.init_from, and name that run"
        )
    if longest < config.dataset.max_seq_length:
        raise StartupError(
            f"{key}: {where} reads at most {longest} tokens, and rows have dataset.max_seq_length = "
            f"{config.dataset.max_seq_length}; lower that, or choose another teacher"
        )
    others = _list_other_modules(where) if key == "contrastive.teacher" else []
    if others:
        raise StartupError(
            f"{key}: {where} makes its vectors with {', '.join(others)}, which is not read; name a model that pools "
            "hidden states alone"
        )
    if key == "contrastive.teacher":
        try:
            pooling = load_vector_settings(weights).pooling
        except WeightsError as error:
            raise StartupError(f"{key}: {error}") from error
        if pooling not in POOLING:
            raise StartupError(
                f"{key}: {where} makes a vector for each token (pooling {pooling}), and contrastive.loss_type: distill "
                "compares one of a text; name a model that pools"
            )
    if key == "distill.teacher" and config.distill.logits_weight and not _predicts_tokens(weights):
        raise StartupError(
            f"distill.logits_weight: {config.distill.logits_weight} needs a teacher that predicts hidden tokens, and "
            f"{where} has no head for that; write 0, or name another distill.teacher"
        )


def _list_other_modules(folder: Path) -> list[str]:
    """What a model of sentence-transformers does beside pooling."""
    file = folder / "modules.json"
    kinds = [module["type"].rsplit(".", 1)[-1] for module in parse_json(file.read_text())] if file.is_file() else []
    return [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]


def _predicts_tokens(weights: EncoderWeights) -> bool:
    return weights.config.hub_config is None and OBJECTIVES[weights.objective].fills_masks


def build_teacher(
    config: Config, weights: EncoderWeights, tokenizer: Tokenizer, *, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """The teacher of these weights on `device`, for a student that reads with `tokenizer`.

    Args:
        dtype: of matrix products.

    Raises:
        StartupError: its tokenizer is another one.
    """
    found = find_teacher(config)
    assert found is not None, "it has weights"
    model = build_loaded(weights, device, dtype)
    theirs = model.tokenizer
    if _list_parts(theirs) != _list_parts(tokenizer):
        same = len(theirs.vocabulary.items() & tokenizer.vocabulary.items())
        raise StartupError(
            f"{found[0]}: {weights.folder} has another tokenizer: {same:,} of its {theirs.size:,} tokens are the same "
            f"here, and it reads what its student reads; write tokenizer.path: {weights.tokenizer}"
        )
    return Teacher(
        module=model.module.requires_grad_(False),
        digest=model.digest(),
        num_tokens=tokenizer.size,
        dtype=dtype,
        pooling=load_vector_settings(weights).pooling if found[0] == "contrastive.teacher" else "mean",
    )


def _list_parts(tokenizer: Tokenizer) -> list[Any]:
    """What makes ids of a text; what is around them, padding and the like are no part of it."""
    parts = [tokenizer.definition.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return [*parts, tokenizer.vocabulary, tokenizer.roles]


def describe_teacher(weights: EncoderWeights) -> str:
    """A line for the log."""
    config, trained = weights.config, f" after {weights.step:,} steps" if weights.step is not None else ""
    return (
        f"teacher   {weights.folder} ({weights.layout} layout{trained}): {config.num_hidden_layers} layers x "
        f"{config.hidden_size}"
    )
