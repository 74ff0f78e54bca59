"""`dataset.*` -> the list of sources it names, one `SourceSpec` each; and which column of a source holds the text."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from neobert.config.schema_data import DatasetSection, MixtureSource
from neobert.data.source.codecs import codec_of_name
from neobert.data.source.files import kind_of_name
from neobert.errors import DataError

TEXT_COLUMNS = ("text", "content", "sentence")
"""Tried in this order when `dataset.text_column` is null."""

_NO_TEXT = re.compile(
    r"\w+://\S+|www\.\S+"  # An address.
    r"|[\W\d_]*"  # No letter: a number, a date, a version.
    r"|v?\d+(?:\.\w+)+(?:[-+][\w.]+)?"  # A version.
    r"|\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-][\d:]+)?"  # A time.
    r"|(?=\S*[\d_@])[\w.:/@+=#-]+"  # An identifier: one word with a digit in it.
)


def may_be_text(values: Iterable[str]) -> bool:
    """Whether one of these values is no address, number, version, time or identifier.

    >>> may_be_text(["1.0.2", "1.1.0-rc1"]), may_be_text(["1.0.2", "the second release"])
    (False, True)
    """
    return any(not _NO_TEXT.fullmatch(value.strip()) for value in values)


def choose_candidates(values: Mapping[str, Sequence[str]], requested: str | None) -> list[str]:
    """The columns of strings that could be the text: one that is named or called so is believed, others are looked at.

    Args:
        values: some of each column; a column without is believed.
    """
    return [name for name, some in values.items() if is_believed(name, requested) or not some or may_be_text(some)]


def split_schema(schema: pa.Schema, requested: str | None) -> tuple[list[str], list[str]]:
    """(columns of text, the others with their types) of an Arrow schema.

    A column without values (of type null) is one of text. So is a binary one that is named or called text: what is
    UTF-8 in it is text. Several columns of one name are none.
    """
    counts = Counter(schema.names)
    fields = [f for f in schema if counts[f.name] == 1]
    texts = [f.name for f in fields if is_text(f.type) or (_may_hold_text(f.type) and is_believed(f.name, requested))]
    others = [f"{f.name}{_describe_kind(f, requested)}" for f in fields if f.name not in texts]
    return texts, others + [f"{name} ({count} columns)" for name, count in counts.items() if count > 1]


def _describe_kind(column: pa.Field, requested: str | None) -> str:
    """The type of a column, where its name or type would let one think of text."""
    if pa.types.is_primitive(column.type) and not is_believed(column.name, requested):
        return ""
    return f" ({str(column.type).partition('<')[0]})"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _may_hold_text(kind: pa.DataType) -> bool:
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(is_binary or pa.types.is_null(kind))


def is_believed(name: str, requested: str | None) -> bool:
    """Whether a column is the text by its name alone."""
    return name == requested or name in TEXT_COLUMNS


def choose_text_column(
    text_columns: Sequence[str], other_columns: Sequence[str], requested: str | None, label: str
) -> tuple[str, str]:
    """The column to read, and a sentence that says so.

    Raises:
        DataError: the requested column is not there, or none was named and several would do.
    """
    if requested is not None:
        if requested in text_columns:
            return requested, f"text from column {requested!r} (dataset.text_column)"
        is_there = any(name == requested or name.startswith(f"{requested} (") for name in other_columns)
        kind = "holds no text" if is_there else "is not"
        raise DataError(
            f"dataset.text_column: {requested!r} {kind} in {label}; "
            f"text columns there: {', '.join(text_columns) or 'none'}"
        )
    for name in TEXT_COLUMNS:
        if name in text_columns:
            return name, f"text from column {name!r}"
    if len(text_columns) == 1:
        return text_columns[0], f"text from column {text_columns[0]!r}, the only one with text"
    if text_columns:
        raise DataError(
            f"dataset.text_column is null and {label} has several text columns; name one of {', '.join(text_columns)}"
        )
    raise DataError(
        f"{label} has no text column (columns: {', '.join(other_columns) or 'none'}); "
        "choose another dataset.path, or name the column with dataset.text_column"
    )


PYTHON_STDLIB = "python_stdlib"
"""The name of the corpus that is always there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec(MixtureSource):
    """One source of documents, before anything of it was looked at: what is null in an entry of a mixture is replaced
    by what `dataset` says."""

    path: tuple[str, ...] = ()
    """Files, folders and patterns, local or remote; empty for a source with a name."""

    section: DatasetSection = field(default_factory=DatasetSection)
    """How all sources are read."""

    @property
    def label(self) -> str:
        """A short name of the source, for messages and the log."""
        if not self.path:
            return str(self.name)
        return self.path[0] if len(self.path) == 1 else f"{self.path[0]} (and {len(self.path) - 1} more)"


def name_folders(specs: Sequence[SourceSpec], folder: Path) -> list[Path]:
    """Where the tokens of each source go: a single source has the folder for itself."""
    if len(specs) == 1:
        return [folder]
    names = [re.sub(r"[^A-Za-z0-9._]+", "-", Path(spec.label.rstrip("/")).name).strip("-.") for spec in specs]
    return [folder / f"{number}-{name or 'source'}" for number, name in enumerate(names)]


def describe_sources(section: DatasetSection) -> tuple[SourceSpec, ...]:
    """The sources that `dataset.path`, else `dataset.mixture`, else `dataset.name` describes.

    Raises:
        DataError: none is named, or a name is written wrongly.
    """
    base = SourceSpec(
        config=section.config,
        revision=section.revision,
        split=section.train_split,
        text_column=section.text_column,
        section=section,
    )
    if section.path is not None:
        return (replace(base, path=_as_tuple(section.path)),)
    if section.mixture:
        return tuple(_describe_entry(entry, section) for entry in section.mixture)
    if section.name is None:
        raise DataError("no data is named: set dataset.path (files, folder) or dataset.name (hub, or python_stdlib)")
    names = [part.strip() for name in _as_tuple(section.name) for part in name.split(",")]
    return tuple(_parse_name(name, base) for name in names)


def _describe_entry(entry: MixtureSource, section: DatasetSection) -> SourceSpec:
    values = asdict(entry) | {
        "path": () if entry.path is None else _as_tuple(entry.path),
        "split": entry.split or section.train_split,
        "text_column": entry.text_column or section.text_column,
    }
    return SourceSpec(**values, section=section)


def describe_source(source: str, *, text_column: str | None = None, config: str | None = None) -> SourceSpec:
    """A source as one argument of a command line: what exists or looks like files is a path, all else a name.

    Raises:
        DataError: `config` of a source that has no configurations, or a name written wrongly.
    """
    files = Path(source).expanduser().exists() or "*" in source or "://" in source
    files = files or source.startswith((".", "/", "~")) or _has_suffix(source)
    if config is not None and (files or source == PYTHON_STDLIB):
        raise DataError(f"--dataset-config: {config} belongs to a dataset of the hub, which {source} is not; remove it")
    if files and source != PYTHON_STDLIB:
        return SourceSpec(path=(source,), text_column=text_column)
    return replace(_parse_name(source, SourceSpec()), text_column=text_column, config=config)


def _parse_name(text: str, base: SourceSpec) -> SourceSpec:
    name, colon, count = text.rpartition(":")
    if not colon:
        name, count = text, ""
    if not name or (colon and not (count.isdecimal() and int(count) > 0)):
        raise DataError(
            f"dataset.name: {text!r} is not a name; write a hub dataset, or name:5000 for its first 5000 documents"
        )
    return replace(base, name=name, max_documents=int(count) if count else None)


def _has_suffix(source: str) -> bool:
    name = source.lower()
    return kind_of_name(name) is not None or codec_of_name(name) is not None or name.endswith(".arrow")


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
