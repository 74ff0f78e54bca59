"""Our own checkpoints, and the folders that we export with their code."""

from collections.abc import Iterator, Mapping
from typing import Any

from neobert.model.config import ModelConfig
from neobert.weights.describe import WeightsError
from neobert.weights.layouts.conversion import Layout, Rule, Tensors, tensor_shapes

REMOTE_CODE_TYPE = "neobert_encoder"
"""`model_type` of models that we export with their code."""


def describe_ours(config: Mapping[str, Any], tensors: Tensors) -> ModelConfig:
    """The contents of `model_config.json`."""
    try:
        return ModelConfig.from_dict(dict(config))
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _describe_remote_code(config: Mapping[str, Any], tensors: Tensors) -> ModelConfig:
    # transformers changes the size beside the architecture when it resizes the embedding.
    return describe_ours({**config["architecture"], "vocab_size": config["vocab_size"]}, tensors)


def _our_rules(config: ModelConfig) -> Iterator[Rule]:
    return (Rule(ours=name, theirs=(name,)) for name in tensor_shapes(config))


def _remote_code_rules(config: ModelConfig) -> Iterator[Rule]:
    for name in tensor_shapes(config):
        theirs = "decoder.bias" if name == "decoder_bias" else name
        yield Rule(ours=name, theirs=(f"model.{name}" if name.startswith("encoder.") else theirs,))


CHECKPOINT = Layout(
    name="checkpoint",
    describe=describe_ours,
    rules=_our_rules,
    embedding="encoder.embedding.weight",
    head="decoder.weight",
)
REMOTE_CODE = Layout(
    name="remote_code",
    describe=_describe_remote_code,
    rules=_remote_code_rules,
    embedding="model.encoder.embedding.weight",
    head="decoder.weight",
    prefix="model.",
)
