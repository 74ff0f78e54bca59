"""Preparing sets: every set of a config is read once and written to `<dataset.path>/all/<KEY>`.

A set that is there already, made from the same source, is kept; other sets in the folder are left alone. So a config
may be prepared in parts, and a start after an interruption continues with the set that was not complete.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from neobert import cli
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource
from neobert.config.schema_data import DatasetSection
from neobert.contrastive.reading import FoundSet, describes_columns, open_source
from neobert.contrastive.set_folder import SetInfo, list_sets, read_info, sets_folder, write_manifest, write_set
from neobert.data.source.codecs import strip_codec
from neobert.data.source.known_sets import choose_set, list_names
from neobert.data.source.tables import HubRows, read_hub
from neobert.errors import DataError
from neobert.secrets import hide_credentials

_PREFIXES = ("anchor_prefix", "positive_prefix")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSource:
    """A set of a config and the key it is stored under."""

    key: str
    source: PairSource


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestedSets:
    """The sets of a config."""

    train: tuple[NamedSource, ...]
    evaluation: tuple[NamedSource, ...]
    pretraining: NamedSource | None

    @property
    def all(self) -> tuple[NamedSource, ...]:
        """Each key once."""
        named = [*self.train, *self.evaluation, *([self.pretraining] if self.pretraining else [])]
        return tuple({item.key: item for item in named}.values())


def list_sets_of(config: Config) -> RequestedSets:
    """What a config trains and evaluates on.

    Raises:
        DataError: two sources would have one key.
    """
    section = config.contrastive
    train = section.sets or tuple(PairSource(name=name) for name in list_names(config.dataset.name))
    texts = None if section.pretraining_dataset is None else PairSource(name=section.pretraining_dataset)
    requested = RequestedSets(
        train=tuple(map(name_source, train)),
        evaluation=tuple(map(name_source, section.eval_sets)),
        pretraining=None if texts is None else name_source(texts),
    )
    seen: dict[str, dict[str, Any]] = {}
    for item in (*requested.train, *requested.evaluation, *([requested.pretraining] if requested.pretraining else [])):
        described = describe(item.source)
        if not is_same_source(seen.setdefault(item.key, described), described):
            raise DataError(
                f"contrastive.sets: two sources would both be stored as {item.key}: {seen[item.key]} and {described};"
                " rename one of the files or folders"
            )
    return requested


def name_source(source: PairSource) -> NamedSource:
    """The key of a source: of a known set, else made of the last part of its name, its configuration and its split."""
    assert source.name is not None, "validated"
    known = choose_set(source.name)
    if known is not None and not describes_columns(source) and not Path(source.name).exists():
        return NamedSource(key=known, source=source)
    last = strip_codec(hide_credentials(source.name).rstrip("/").split("/")[-1])
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet)$", "", last)
    parts = [stem, *([source.config] if source.config else []), *([source.split] if source.split else [])]
    return NamedSource(key=re.sub(r"[^\w.-]+", "_", "-".join(parts)), source=source)


def describe(source: PairSource) -> dict[str, Any]:
    """What decides about the examples of a source, credentials hidden: everything but the prefixes, which are put
    before texts later."""
    values = {name: value for name, value in asdict(source).items() if value is not None and name not in _PREFIXES}
    return hide_in_source({name: list(x) if isinstance(x, tuple) else x for name, x in values.items()})


def hide_in_source(values: Mapping[str, Any]) -> dict[str, Any]:
    """`describe` of an earlier version, credentials hidden."""
    return {name: hide_credentials(x) if isinstance(x, str) else x for name, x in values.items()}


def is_same_source(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions name one source: a local file or folder may be spelled in several ways."""
    return _with_real_path(hide_in_source(one)) == _with_real_path(hide_in_source(other))


def _with_real_path(described: dict[str, Any]) -> dict[str, Any]:
    path = Path(described["name"])
    return {**described, "name": str(path.resolve())} if path.exists() else described


def prepare(
    config: Config, hub: HubRows = read_hub, report: Callable[[FoundSet], None] = lambda opened: None
) -> list[tuple[SetInfo, bool]]:
    """Prepares the sets of a config; each with whether it was made now.

    Args:
        report: called with every source that was read.

    Raises:
        DataError: a source cannot be read; sets that were complete before stay.
    """
    data = config.dataset
    assert isinstance(data.path, str), "validated"
    if data.load_all_from_disk:
        infos = list_sets(data.path)
        if not infos:
            raise DataError(
                f"dataset.load_all_from_disk: true, but {sets_folder(data.path)} holds no set; write false to fetch"
            )
        write_manifest(data.path)
        return [(info, False) for info in infos.values()]
    done = []
    for item in list_sets_of(config).all:
        folder, source = sets_folder(data.path) / item.key, describe(item.source)
        info = read_info(folder)
        fresh = info is None or not is_same_source(info.source, source) or data.force_redownload
        if fresh:
            info = write_source(folder, item, data, hub, report)
        assert info is not None
        done.append((info, fresh))
        write_manifest(data.path)
    return done


def write_source(
    folder: Path,
    item: NamedSource,
    section: DatasetSection,
    hub: HubRows,
    report: Callable[[FoundSet], None],
    part: tuple[int, int] | None = None,
) -> SetInfo:
    """Writes the set of a source, or the part of it that `open_source` describes, to a folder.

    Raises:
        DataError: the source cannot be read.
    """
    opened = open_source(item.source, hub, section, part=part)
    examples = islice(opened.examples, item.source.max_pairs)
    info = write_set(folder, item.key, opened.form, examples, describe(item.source))
    report(opened)
    return info


def say_found(opened: FoundSet) -> None:
    """Prints what was found in the files of a set."""
    for note in opened.found.notes():
        print(f"{opened.label}: {note}")
    cli.say(*(f"warning: {opened.label}: {text}" for text in opened.found.warnings()))


def preprocess_command(argv: Sequence[str]) -> str:
    """The line that prepares what a config needs."""
    return shlex.join(["neobert", "preprocess-pairs", *argv])
