"""The front matter of README.md: what the hub reads of a model. Only what the run recorded or the call says."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from neobert.config.nesting import load_plain_yaml
from neobert.data.source.known_sets import KNOWN_SETS
from neobert.export.choose import ExportError, Form
from neobert.export.facts import RunFacts, datasets_on_hub, hub_model, model_on_hub, name_sources
from neobert.objectives.base import Objective
from neobert.objectives.mlm import MLM
from neobert.objectives.table import OBJECTIVES, choose_objective

_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.S | re.M)
_TRAINING = re.compile(r"^## Training\n\n(.*?)(?=^## |\Z)", re.S | re.M)
_KEPT = ("language", "license", "license_name", "license_link", "datasets", "base_model", "model-index")


@dataclass(frozen=True, kw_only=True, slots=True)
class OlderCard:
    """What the README.md of an exported folder says, for an export of that folder."""

    data: dict[str, Any]
    training: str
    """The section about the training."""

    @property
    def objective(self) -> Objective:
        """What the model was trained for, by how the hub files it."""
        tag = self.data.get("pipeline_tag")
        return next((x for x in OBJECTIVES.values() if x.card.pipeline_tag == tag), MLM)


def check_language(codes: tuple[str, ...]) -> list[str]:
    """A sentence for each code that the hub would not take."""
    return [
        f"--language: {code!r} is no language code; write two or three letters (en, or en,de), code or multilingual"
        for code in codes
        if _LANGUAGE.fullmatch(code) is None
    ]


def read_older_card(folder: Path) -> OlderCard:
    """The card of an exported folder; an empty one where there is none.

    Raises:
        ExportError: its front matter is no YAML mapping.
    """
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    matter, training = _FRONT_MATTER.search(text), _TRAINING.search(text)
    try:
        data = load_plain_yaml(matter[1]) if matter is not None else {}
    except yaml.YAMLError as error:
        raise ExportError(f"{file}: its front matter is no YAML ({error}); correct it, or remove the file") from error
    if not isinstance(data, dict):
        raise ExportError(f"{file}: its front matter is no mapping; correct it, or remove the file")
    return OlderCard(data=data, training=training[1].strip() if training is not None else "")


def build_card_data(
    objective: Objective,
    lineage: Sequence[RunFacts],
    older: OlderCard,
    *,
    form: Form,
    name: str,
    source: str,
    language: tuple[str, ...],
) -> ModelCardData:
    """The front matter of a model with this objective.

    Args:
        lineage: The run, then what it started from; empty for a model that comes without a run, which keeps what its
            `older` card says.
        older: The card of the folder that is exported.
        form: Of the export.
        name: What users load the model by.
        source: What is exported: a folder, or a model of the hub.
        language: Codes that were passed in the call; none keeps those of `older`.
    """
    card = objective.card
    values: dict[str, Any] = {"base_model": hub_model(source)}
    values |= {key: older.data[key] for key in _KEPT if key in older.data}
    if lineage:
        results = list(_results(lineage[0]))
        values["datasets"] = [data for facts in lineage for data in datasets_on_hub(facts)] or None
        values["base_model"] = next(filter(None, map(model_on_hub, lineage)), None)
        values |= {"eval_results": results, "model_name": name} if results else {}
    if language:
        values["language"] = list(language) if len(language) > 1 else language[0]
    data = ModelCardData(
        library_name=card.library_name,
        pipeline_tag=card.pipeline_tag,
        tags=[*card.tags, *(["custom_code"] if form == "remote_code" else [])],
        ignore_metadata_errors=True,
        **values,
    )
    data.model_name = name.split("/")[-1] if data.eval_results else None
    return data


def _results(facts: RunFacts) -> Iterator[EvalResult]:
    """The evaluation of these very weights, as it was recorded; nothing when the last one is of an earlier step."""
    last = facts.evaluation
    if last is None or last["step"] != facts.step:
        return
    for task, dataset, metric, value, label in choose_objective(facts.config).card.results(last):
        named = {"dataset_type": KNOWN_SETS.get(dataset, dataset), "dataset_name": dataset} if dataset else None
        yield EvalResult(
            task_type=task,
            metric_type=metric,
            metric_value=value,
            metric_name=label or metric,
            **(named or _evaluated(facts)),  # type: ignore[arg-type]
        )


def _evaluated(facts: RunFacts) -> dict[str, str | None]:
    """The data of the evaluation: held-out documents of the training data, or a split of it."""
    data, sources = facts.config.dataset, ", ".join(name_sources(facts))
    one = data.path is None and not data.mixture
    return {
        "dataset_type": sources,
        "dataset_name": sources,
        "dataset_config": data.config if one else None,
        "dataset_split": data.eval_split,
        "dataset_revision": data.revision if one else None,
    }
