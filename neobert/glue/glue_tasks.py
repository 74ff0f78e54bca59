"""The tasks of GLUE (Wang et al., arXiv 1804.07461) and its diagnostic set: columns, labels, splits, metrics.

Names of tasks, columns and splits, and the numbers of labels, are those of `nyu-mll/glue` on the hub. Its test splits
have no labels, so scores are those of the validation splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from neobert.errors import DataError

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueTask:
    """One task."""

    columns: tuple[str, ...]
    """The text, or the two of a pair."""

    labels: tuple[str, ...]
    """By number; empty for a number."""

    metrics: tuple[str, ...]
    """Of `METRICS`. The score is their mean, as on GLUE's leaderboard."""

    select: str
    """Which of them chooses the best evaluation of a run."""

    splits: tuple[str, ...] = ("validation",)
    """What is evaluated, the first while training. With several the score is the mean over them."""

    trained_on: str | None = None
    """The task whose models answer this one; it has no training split."""

    transfers: bool = False
    """Whether it may start from a model of `SOURCE_TASK`."""


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "neutral", "contradiction")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(columns=("sentence",), labels=("unacceptable", "acceptable"), metrics=("mcc",), select="mcc"),
    "sst2": GlueTask(columns=("sentence",), labels=("negative", "positive"), metrics=("accuracy",), select="accuracy"),
    "mrpc": GlueTask(
        columns=_PAIR,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        select="accuracy",
        transfers=True,
    ),
    "stsb": GlueTask(columns=_PAIR, labels=(), metrics=("pearson", "spearman"), select="spearman", transfers=True),
    "qqp": GlueTask(
        columns=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        select="accuracy",
    ),
    "mnli": GlueTask(
        columns=("premise", "hypothesis"),
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        select="accuracy",
        splits=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(
        columns=("question", "sentence"),
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        select="accuracy",
    ),
    "rte": GlueTask(
        columns=_PAIR,
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        select="accuracy",
        transfers=True,
    ),
    "wnli": GlueTask(columns=_PAIR, labels=("not_entailment", "entailment"), metrics=("accuracy",), select="accuracy"),
    "ax": GlueTask(
        columns=("premise", "hypothesis"),
        labels=_ENTAILMENT,
        metrics=("mcc",),
        select="mcc",
        splits=("test",),
        trained_on="mnli",
    ),
}
"""By the configuration's name on the hub."""

SOURCE_TASK = "mnli"
"""Where `glue.transfer_from_task` starts: RTE, MRPC and STS-B of RoBERTa (arXiv 1907.11692, section 5.1)."""

AVERAGED = tuple(name for name, task in TASKS.items() if task.trained_on is None)
"""The nine tasks: an average over all of them is GLUE's, over fewer it is not."""


def check_tasks(names: Sequence[str], *, transfer: bool) -> None:
    """Raises DataError for tasks that are unknown, occur twice, or lack the task that their models come from."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise DataError(f"glue.tasks: {', '.join(unknown) or 'empty'}; write some of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise DataError(f"glue.tasks: {list(names)} must be different; name each once")
    for name in names:
        source = TASKS[name].trained_on or (SOURCE_TASK if transfer and TASKS[name].transfers else None)
        if source is not None and source not in names:
            why = "" if TASKS[name].trained_on else " with glue.transfer_from_task: true"
            raise DataError(f"glue.tasks: {name} needs the models of {source}{why}; add {source}, or remove {name}")


def describe_average(names: Sequence[str]) -> str:
    """What the mean score of tasks is called: GLUE only where all nine are there."""
    averaged = [name for name in AVERAGED if name in names]
    if len(averaged) == len(AVERAGED):
        return "GLUE"
    return f"average of {len(averaged)} task{'s' * (len(averaged) != 1)}: {', '.join(averaged)}"


def order_tasks(names: Sequence[str]) -> list[str]:
    """The tasks in an order in which each comes after the one whose models it needs."""
    return sorted(names, key=lambda name: name != SOURCE_TASK)
