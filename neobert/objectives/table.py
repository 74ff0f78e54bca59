"""The table of objectives, and which of them a config or a set of weights means."""

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.objectives.base import Objective
from neobert.objectives.causal_lm import CLM
from neobert.objectives.classification import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from neobert.objectives.contrastive import CONTRASTIVE
from neobert.objectives.distill import DISTILL
from neobert.objectives.masked_jepa import MLM_JEPA
from neobert.objectives.mlm import MLM
from neobert.objectives.replaced_token import REPLACED_TOKEN


def choose_objective(config: Config) -> Objective:
    """The objective of a config: its task where that is one, by `finetune.kind`, or else by `trainer.objective`."""
    if config.task == "finetune":
        return TOKEN_CLASSIFICATION if config.finetune.kind == "tokens" else SEQUENCE_CLASSIFICATION
    return OBJECTIVES[config.task if config.task in OBJECTIVES else config.trainer.objective]


def recognise_objective(names: Iterable[str]) -> Objective:
    """The objective that weights with these names come from: the first whose own weights are all there. Where none of
    them belongs to training only, they are those of masked language modelling, which adds none."""
    names = tuple(names)
    for objective in OBJECTIVES.values():
        prefixes = objective.training_only
        if prefixes and all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return objective
    return MLM


def check_task(config: Config, task: str) -> None:
    """Raises StartupError when the config is of another task than `task`."""
    if config.task != task:
        command = "glue" if config.task == "glue" else choose_objective(config).command
        raise StartupError(f"task: {config.task} is for `neobert {command}`; use that, or write task: {task}")


def load_part(path: str) -> Any:
    """What `package.module:attribute` names: a part of an objective that a package above this one implements."""
    return resolve_name(path)


OBJECTIVES: dict[str, Objective] = {
    "mlm": MLM,
    "replaced_token": REPLACED_TOKEN,
    "clm": CLM,
    "mlm_jepa": MLM_JEPA,
    "distill": DISTILL,
    "contrastive": CONTRASTIVE,
    "sequence_classification": SEQUENCE_CLASSIFICATION,
    "token_classification": TOKEN_CLASSIFICATION,
}
"""All objectives by name."""
