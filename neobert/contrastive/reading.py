"""Where the rows of a set come from: the hub, files, folders, and relevance judgements between two collections.

A local folder is one of three things: what `save_to_disk` wrote; `queries.jsonl`, `corpus.jsonl` and `qrels/SPLIT.tsv`
(the layout of BEIR, Thakur et al., arXiv 2104.08663), which are joined to pairs; or files, whose split is a word of
their name as in pretraining. Files are JSON lines, CSV, TSV (compressed too) or Parquet. A record that cannot be read
is named and counted, as in pretraining: more than `dataset.max_bad_records` of a source stop the work.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neobert.config.schema_contrastive import PairSource
from neobert.config.schema_data import DatasetSection
from neobert.contrastive.examples import FORM_NAMES, SETS, Example, Form, choose_columns, join
from neobert.data.source.files import DataFile, kind_of_name, local_file
from neobert.data.source.formats import DataFiles, list_data_files
from neobert.data.source.inventory import NO_FILES, FileReport, Inventory
from neobert.data.source.known_sets import KNOWN_SETS, choose_set
from neobert.data.source.sharing import choose_borders
from neobert.data.source.spec import SourceSpec
from neobert.data.source.splits import SPLIT_WORDS, choose_train_split
from neobert.data.source.tables import (
    TABLE_KINDS,
    HubRows,
    Limits,
    RawRow,
    inspect_tables,
    is_saved_table,
    load_saved_table,
    number_rows,
    read_file,
    read_hub,
)
from neobert.data.source.text import RecordCounts
from neobert.errors import OR_SKIP_SHARD, DataError

_DEFAULTS = DatasetSection()

_COLUMN_SAMPLE = 100
"""Rows whose columns are looked at."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FoundSet:
    """A source that can be read."""

    form: Form
    examples: Iterator[Example]
    label: str
    """What it is, for people."""

    inventory: Inventory = NO_FILES
    reports: dict[str, FileReport] = field(default_factory=dict)
    """What the files gave, those that were read so far."""

    @property
    def found(self) -> Inventory:
        """The files, and what those that were read gave."""
        return self.inventory.with_content(self.reports)


def open_source(
    source: PairSource,
    hub: HubRows = read_hub,
    section: DatasetSection = _DEFAULTS,
    *,
    part: tuple[int, int] | None = None,
) -> FoundSet:
    """The examples of one entry of `contrastive.sets`.

    `section` says how many records may be bad, and how large one may be. With `part`, number i of n from 0, those of a
    run of its files; see `can_be_cut`.

    A name is a local path where there is one, else a known set (unless columns, a split or a configuration are set,
    which describe the dataset of the hub itself), else a dataset of the hub.

    Raises:
        DataError: it is not there, or has no usable columns.
    """
    assert source.name is not None, "validated"
    counts = RecordCounts(max_bad=section.max_bad_records, where=source.name)
    limits = Limits(max_record_bytes=section.max_record_bytes, counts=counts)
    path = Path(source.name)
    if path.exists():
        return _open_local(source, path, limits, part)

    def checked(name: str, config: str | None, split: str, revision: str | None) -> Iterator[RawRow]:
        return number_rows(hub(name, config, split, revision), f"{name} of the hub", limits)

    if looks_local(source.name):
        raise DataError(f"{source.name} is not there: name a file or folder that exists, a known set or a hub dataset")
    key = choose_set(source.name)
    if key is not None and not describes_columns(source):
        return _open_known(key, source.revision, checked)
    if key is None and "/" not in source.name:
        known = ", ".join(SETS)
        raise DataError(f"{source.name} is neither a file, nor a hub dataset (owner/name), nor one of {known}")
    name = source.name if key is None else KNOWN_SETS[key]
    rows = checked(name, source.config, source.split or "train", source.revision)
    return _by_columns(source, rows, f"{name} of the hub")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path."""
    return name.startswith(("/", ".", "~")) or kind_of_name(name) in TABLE_KINDS


def describes_columns(source: PairSource) -> bool:
    """Whether an entry says itself what to read of a known set."""
    columns = (source.anchor_column, source.positive_column, source.negative_columns)
    others = (source.score_column, source.label_column, source.config, source.split)
    return any(value is not None for value in (*columns, *others))


# ---- the hub ----


def _open_known(key: str, revision: str | None, hub: HubRows) -> FoundSet:
    known, hub_name = SETS[key], KNOWN_SETS[key]
    if known.joined:
        examples = join(
            hub(hub_name, "default", "train", revision),
            hub(hub_name, "queries", "queries", revision),
            hub(hub_name, "corpus", "corpus", revision),
        )
    else:
        examples = (
            example
            for part in known.parts
            for row in hub(hub_name, part.config, part.split, revision)
            for example in part.examples(row)
        )
    return FoundSet(form="pairs", examples=examples, label=f"{hub_name} of the hub")


# ---- files ----


def _open_local(source: PairSource, path: Path, limits: Limits, part: tuple[int, int] | None) -> FoundSet:
    label = str(path)
    if source.config is not None or source.revision is not None:
        raise DataError(f"{label} is on the disk; config and revision belong to datasets of the hub: remove them")
    if path.is_file():
        _check_no_split(source.split, label)
    if (path / "qrels").is_dir():
        rows, queries, corpus = (read_file(file, limits) for file in choose_table_files(path, source.split or "train"))
        return FoundSet(form="pairs", examples=join(rows, queries, corpus), label=label)
    if is_saved_table(path):
        return _by_columns(source, number_rows(_read_saved(path, source.split), label, limits), label)
    return _by_files(source, label, limits, part)


def can_be_cut(source: PairSource, count: int) -> bool:
    """Whether each of `count` machines may read files of its own: there are as many, and all of their rows are read."""
    path = Path(str(source.name))
    if not path.is_dir() or (path / "qrels").is_dir() or is_saved_table(path) or source.max_pairs is not None:
        return False
    return len(_list_files(source, str(path))[1]) >= count


def _check_no_split(split: str | None, label: str) -> None:
    if split is not None:
        raise DataError(f"{label} has no splits, so none is called {split}; remove that, or name a folder of splits")


def choose_table_files(folder: Path, split: str) -> list[DataFile]:
    """Judgements of a split, queries and corpus of a folder in the layout of BEIR.

    Raises:
        DataError: one is missing.
    """
    judgements = folder / "qrels" / f"{split}.tsv"
    if not judgements.is_file():
        there = ", ".join(sorted(file.stem for file in judgements.parent.glob("*.tsv"))) or "none"
        raise DataError(f"{judgements} is not there; name a split that is (there: {there})")
    files = [judgements, *(_find(folder, name) for name in ("queries", "corpus"))]
    return [_look_into([local_file(file)], file.name)[0] for file in files]


def _find(folder: Path, stem: str) -> Path:
    found = sorted(file for file in folder.glob(f"{stem}.*") if kind_of_name(file.name) in TABLE_KINDS)
    if not found:
        raise DataError(f"{folder} has qrels/ but no {stem}.jsonl; put it there")
    return found[0]


def _list_files(source: PairSource, label: str) -> tuple[DataFiles, list[DataFile]]:
    """What is there, and the files of the split."""
    try:
        found = list_data_files(SourceSpec(path=(label,)))
    except DataError as error:
        raise _reworded(error) from error
    names = list(dict.fromkeys(found.splits.values()))
    requested = None if source.split is None else SPLIT_WORDS.get(source.split.lower(), source.split)
    if requested is not None and requested not in names:
        raise DataError(f"{label} has no split {source.split}; there: {', '.join(names)}")
    try:
        split = choose_train_split(names, requested)
    except DataError:
        raise DataError(f"{label} has no training files; name a split with split: {', '.join(names)}") from None
    return found, found.files_of(split)


def _by_files(source: PairSource, label: str, limits: Limits, part: tuple[int, int] | None) -> FoundSet:
    """The examples of a file or of the files of a split, each file with columns of its own."""
    found, files = _list_files(source, label)
    if part is not None:
        borders = choose_borders([file.size for file in files], part[1])
        files = files[borders[part[0]] : borders[part[0] + 1]]
    files = _look_into(files, label)
    opened = ((file, _choose_of_file(source, file, limits)) for file in files)
    full = ((file, found) for file, found in opened if found is not None)
    first = next(full, None)
    if first is None:
        raise DataError(f"{label} has no rows")
    form, reports = first[1].form, dict[str, FileReport]()

    def examples() -> Iterator[Example]:
        for file, of_file in itertools.chain([first], full):
            if of_file.form != form:
                raise DataError(
                    f"{file.url} has {FORM_NAMES[of_file.form]}, and the other files have {FORM_NAMES[form]}; "
                    "name the columns in contrastive.sets, or the files in entries of their own"
                )
            count = 0
            for example in of_file.examples:
                count += 1
                yield example
            remark = None if count else f"no {FORM_NAMES[form]} in its rows"
            reports[file.url] = FileReport(url=file.url, content=file.layers, num_usable=count, remark=remark)

    return FoundSet(form=form, examples=examples(), label=label, inventory=found.inventory, reports=reports)


def _choose_of_file(source: PairSource, file: DataFile, limits: Limits) -> FoundSet | None:
    """Examples of a file; None where it has no rows.

    Raises:
        DataError: it has records, and none of them can be read.
    """
    counts, num_bad = limits.counts, limits.counts.bad
    opened = _choose_columns(source, read_file(file, limits), file.url)
    if opened is None and counts.bad > num_bad:
        raise DataError(
            f"{file.url} has no text: none of its {counts.bad - num_bad} records can be read, the last one at "
            f"{counts.last_problem}; correct the file, or take it away"
        )
    return opened


def _look_into(files: Sequence[DataFile], label: str) -> list[DataFile]:
    try:
        return inspect_tables(files, label)
    except DataError as error:
        raise _reworded(error) from error


def _reworded(error: DataError) -> DataError:
    """The error with the keys of `contrastive.sets`, where no file can be skipped."""
    message = str(error).replace(OR_SKIP_SHARD, "").replace("dataset.path: ", "")
    return DataError(message.replace("take it out of dataset.path", "take it away"))


def _read_saved(folder: Path, split: str | None) -> Iterable[RawRow]:
    parts = load_saved_table(folder)
    if None in parts:
        _check_no_split(split, str(folder))
        return parts[None]
    name = split or "train"
    if name not in parts:
        raise DataError(f"{folder} has no split {name}; there: {', '.join(map(str, parts))}")
    return parts[name]


def _by_columns(source: PairSource, rows: Iterable[RawRow], label: str) -> FoundSet:
    opened = _choose_columns(source, rows, label)
    if opened is None:
        raise DataError(f"{label} has no rows")
    return opened


def _choose_columns(source: PairSource, rows: Iterable[RawRow], label: str) -> FoundSet | None:
    """Examples of rows by the columns that the first of them have; None where there are no rows."""
    iterator = iter(rows)
    first = list(itertools.islice(iterator, _COLUMN_SAMPLE))
    if not first:
        return None
    columns = choose_columns(source, list(dict.fromkeys(name for row in first for name in row if name)), label)
    examples = (example for row in itertools.chain(first, iterator) for example in columns.examples(row))
    return FoundSet(form=columns.form, examples=examples, label=label)
