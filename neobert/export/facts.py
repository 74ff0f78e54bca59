"""What is known of the run that made some weights: its config, what it saved beside them, its log up to their step.

Nothing is guessed: a name counts as one of the hub only where it cannot be a path of the machine that trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neobert.config.load import load_saved_config
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.data.source.known_sets import KNOWN_SETS, choose_set, list_names
from neobert.data.source.spec import PYTHON_STDLIB, describe_source, describe_sources
from neobert.objectives.table import choose_objective
from neobert.secrets import readable
from neobert.weights.encoder_weights import HUB_NAME

_EVALUATIONS = {"model": "eval", "ema": "eval_ema"}
"""Kind of weights -> the lines of log.jsonl that are about them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunFacts:
    """A run, as far as some of its weights know it."""

    config: Config
    step: int | None
    state: dict[str, Any]
    """train_state.json; empty where the folder has none."""

    records: tuple[dict[str, Any], ...]
    """Lines of log.jsonl up to `step`, in their order."""

    evaluation: dict[str, Any] | None
    """The last of them that evaluates this kind of weights."""

    @property
    def start(self) -> str | None:
        """What the run took its initial weights from, a step of a run or as the config names it; None for random."""
        source = self.config.model.init_from
        folder = self.config.contrastive.pretrained_checkpoint_dir or self.config.finetune.model
        return source if folder is None or (source and is_step(Path(source))) else folder


def load_run_facts(folder: Path, step: int | None, kind: str = "model") -> RunFacts | None:
    """Facts of a checkpoint of ours; None for a folder that is none.

    Raises:
        ConfigError: its config.yaml cannot be read.
    """
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    state = folder / "train_state.json"
    records = _read_records(folder, step)
    evaluations = [r for r in records if r["kind"] == _EVALUATIONS[kind]]
    return RunFacts(
        config=load_saved_config(folder / "config.yaml"),
        step=step,
        state=parse_json(state.read_text()) if state.is_file() else {},
        records=records,
        evaluation=evaluations[-1] if evaluations else None,
    )


def load_lineage(folder: Path, step: int | None, kind: str) -> list[RunFacts]:
    """Facts of a run, of the run it started from, and so on, as far as their checkpoints are there."""
    lineage: list[RunFacts] = []
    while (facts := load_run_facts(folder, step, kind)) is not None:
        lineage.append(facts)
        folder, kind = Path(facts.start or ""), facts.config.model.init_weights
        if not is_step(folder):
            break
        step = int(folder.name)
    return lineage


def is_step(folder: Path) -> bool:
    """Whether a path is a checkpoint within a run."""
    return folder.parent.name == "checkpoints" and folder.name.isdecimal()


def _read_records(folder: Path, step: int | None) -> tuple[dict[str, Any], ...]:
    log = folder.parent.parent / "log.jsonl"
    if not is_step(folder) or not log.is_file() or step is None:
        return ()
    records = map(_parse, log.read_text(errors="replace").splitlines())
    return tuple(r for r in records if r.get("step", step + 1) <= step)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:  # The line that a run is writing just now.
        return {}
    return record if isinstance(record, dict) else {}


def model_on_hub(facts: RunFacts) -> str | None:
    """The model of the hub that a run started from; None where there is none, or where it may be a folder."""
    owner = (facts.start or "").split("/")[0]
    # `outputs/quickstart` has the form of a name too, and may have been removed since.
    return None if owner == Path(facts.config.trainer.output_dir).parts[0] else hub_model(facts.start or "")


def hub_model(source: str) -> str | None:
    """`owner/name` of a model of the hub; None for what may be a folder."""
    named = HUB_NAME.fullmatch(source) is not None and not Path(source.split("/")[0]).exists()
    return source.split("@")[0] if named else None


class _Source(NamedTuple):
    """Something that a run was trained on."""

    label: str
    """As readers know it."""

    on_hub: str | None
    """Its name, where it is a dataset of the hub."""


def name_sources(facts: RunFacts) -> list[str]:
    """What a run was trained on, as readers know it: names of the hub and of files, without their folders."""
    return [source.label for source in _SOURCES[choose_objective(facts.config).reads](facts)]


def datasets_on_hub(facts: RunFacts) -> list[str]:
    """Those of them that are datasets of the hub."""
    sources = _SOURCES[choose_objective(facts.config).reads](facts)
    return list(dict.fromkeys(source.on_hub for source in sources if source.on_hub is not None))


def _list_documents(facts: RunFacts) -> list[_Source]:
    specs = describe_sources(facts.config.dataset)
    return [_Source(readable(spec.label), None if spec.name == PYTHON_STDLIB else spec.name) for spec in specs]


def _list_pairs(facts: RunFacts) -> list[_Source]:
    named = [(name, _hub_set(name)) for name in _pair_sets(facts)]
    return [_Source(on_hub or readable(name), on_hub) for name, on_hub in named]


_SOURCES = {"documents": _list_documents, "labels": _list_documents, "pairs": _list_pairs}
"""By what an objective reads."""


def _pair_sets(facts: RunFacts) -> list[str]:
    """Names of the training sets: those of the config, else (all that are on the disk) those of the log."""
    section, data = facts.config.contrastive, facts.config.dataset
    if data.load_all_from_disk:
        return list(dict.fromkeys(key for r in facts.records for key in r.get("source_tokens") or ()))
    return [str(item.name) for item in section.sets] or list_names(data.name)


def _hub_set(name: str) -> str | None:
    key = choose_set(name)
    if key is not None and not Path(name).exists():
        return KNOWN_SETS[key]
    return describe_source(name).name if "/" in name else None
