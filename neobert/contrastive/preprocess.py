"""Preparing sets: every set of a config is read once and written to `<dataset.path>/all/<KEY>`.

A set that is there already, made from the same source, is kept; other sets in the folder are left alone. So a config
may be prepared in parts, and a start after an interruption goes on with the set that was not complete.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from neobert.config.command_line import parse_command_line
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.reading import HubRows, Opened, describes_columns, open_source, read_hub
from neobert.contrastive.rows import FORM_WORDS
from neobert.contrastive.sets import SETS, choose_set
from neobert.contrastive.store import SetInfo, list_sets, read_info, sets_folder, write_manifest, write_set
from neobert.data.decompress import strip_codec
from neobert.data.errors import DataError

ALL = ("all", "refinedweb")
"""Words of `dataset.name` for every known set; the second is the default of other NeoBERT code."""

_PREFIXES = ("anchor_prefix", "positive_prefix")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSource:
    """A set of a config and the key it is stored under."""

    key: str
    source: PairSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The sets of a config."""

    train: tuple[NamedSource, ...]
    evaluation: tuple[NamedSource, ...]
    pretraining: NamedSource | None

    @property
    def all(self) -> tuple[NamedSource, ...]:
        """Each key once."""
        named = [*self.train, *self.evaluation, *([self.pretraining] if self.pretraining else [])]
        return tuple({item.key: item for item in named}.values())


def list_wanted(config: Config) -> Wanted:
    """What a config trains and evaluates on.

    Raises:
        DataError: two sources would have one key.
    """
    section = config.contrastive
    train = section.sets or tuple(PairSource(name=name) for name in _names(config))
    texts = None if section.pretraining_dataset is None else PairSource(name=section.pretraining_dataset)
    wanted = Wanted(
        train=tuple(map(name_source, train)),
        evaluation=tuple(map(name_source, section.eval_sets)),
        pretraining=None if texts is None else name_source(texts),
    )
    seen: dict[str, dict[str, Any]] = {}
    for item in (*wanted.train, *wanted.evaluation, *([wanted.pretraining] if wanted.pretraining else [])):
        described = describe(item.source)
        if seen.setdefault(item.key, described) != described:
            raise DataError(
                f"contrastive.sets: two sources would both be stored as {item.key}: {seen[item.key]} and {described};"
                " rename one of the files or folders"
            )
    return wanted


def _names(config: Config) -> list[str]:
    names = config.dataset.name
    if names is None:
        return list(SETS)
    listed = [names] if isinstance(names, str) else list(names)
    return [key for name in listed for key in (SETS if name.lower() in ALL else [name])]


def name_source(source: PairSource) -> NamedSource:
    """The key of a source: of a known set, else made of the last part of its name, its configuration and its split."""
    assert source.name is not None, "validated"
    known = choose_set(source.name)
    if known is not None and not describes_columns(source) and not Path(source.name).exists():
        return NamedSource(key=known, source=source)
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet)$", "", strip_codec(source.name.rstrip("/").split("/")[-1]))
    parts = [stem, *([source.config] if source.config else []), *([source.split] if source.split else [])]
    return NamedSource(key=re.sub(r"[^\w.-]+", "_", "-".join(parts)), source=source)


def describe(source: PairSource) -> dict[str, Any]:
    """What decides about the examples of a source: everything but the prefixes, which are put before texts later."""
    values = {name: value for name, value in asdict(source).items() if value is not None and name not in _PREFIXES}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def prepare(
    config: Config, hub: HubRows = read_hub, tell: Callable[[Opened], None] = lambda opened: None
) -> list[tuple[SetInfo, bool]]:
    """Prepares the sets of a config; each with whether it was made now.

    Args:
        tell: takes every source that was read.

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
    for item in list_wanted(config).all:
        folder, source = sets_folder(data.path) / item.key, describe(item.source)
        info = read_info(folder)
        fresh = info is None or info.source != source or data.force_redownload
        if fresh:
            opened = open_source(item.source, hub, data)
            examples = islice(opened.examples, item.source.max_pairs)
            info = write_set(folder, item.key, opened.form, examples, source)
            tell(opened)
        assert info is not None
        done.append((info, fresh))
        write_manifest(data.path)
    return done


def _say_found(opened: Opened) -> None:
    """Prints what was found in the files of a set."""
    for note in opened.found.notes():
        print(f"{opened.label}: {note}")
    for text in opened.found.warnings():
        print(f"warning: {opened.label}: {text}", file=sys.stderr)


def preprocess_command(words: Sequence[str]) -> str:
    """The line that prepares what a config needs."""
    return shlex.join(["python", "scripts/contrastive/preprocess.py", *words])


def run_preprocess(argv: list[str], description: str) -> int:
    """The script: prepares, says what is there, and what to type next."""
    config = parse_command_line(argv, description=description)
    if config.task != "contrastive":
        print(f"error: task: {config.task} is for scripts/pretraining/preprocess.py", file=sys.stderr)
        return 2
    try:
        done = prepare(config, tell=_say_found)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the set that was not complete", file=sys.stderr)
        return 130
    for info, fresh in done:
        negatives = f", up to {info.max_negatives} negatives" if info.max_negatives else ""
        word = "written" if fresh else "there already"
        size = f"{info.num_rows:,} {FORM_WORDS[info.form]}"
        print(f"{sets_folder(str(config.dataset.path)) / info.key}: {size}{negatives} ({word})")
    print("train on it with:")
    print(shlex.join(["python", "scripts/contrastive/finetune.py", *argv]))
    return 0
