"""From the configs of other formats: a ModelConfig, or a sentence for each thing that our encoder cannot express."""

from collections.abc import Mapping
from typing import Any

from neobert.errors import UserError
from neobert.model.config import ModelConfig


class WeightsError(UserError, ValueError):
    """Weights that cannot be used as they are; the message says why and what to do."""


def check_expected(name: str, expected: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Raises when a config says what our encoder cannot express.

    Args:
        name: Of the model, for the message.
        expected: By key: its value, and the values that can be expressed.

    Raises:
        WeightsError: with every such key.
    """
    problems = [
        f"{key}: {value!r} cannot be expressed, only {' or '.join(repr(x) for x in allowed if x is not None)}"
        for key, (value, allowed) in expected.items()
        if value not in allowed
    ]
    if problems:
        raise WeightsError("\n  ".join([f"this {name} model has another architecture than ours:", *problems]))


def build_config(**values: Any) -> ModelConfig:
    """A ModelConfig. Raises WeightsError where these values make no model."""
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise WeightsError(str(error)) from error
