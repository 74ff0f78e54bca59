"""Which column holds the text."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from neobert.data.errors import DataError

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


def choose_candidates(values: Mapping[str, Sequence[str]], wanted: str | None) -> list[str]:
    """The columns of strings that could be the text: one that is named or called so is believed, others are looked at.

    Args:
        values: some of each column; a column without is believed.
    """
    return [name for name, some in values.items() if is_believed(name, wanted) or not some or may_be_text(some)]


def split_schema(schema: pa.Schema, wanted: str | None) -> tuple[list[str], list[str]]:
    """(columns of text, the others with their types) of an Arrow schema.

    A column without values (of type null) is one of text. So is a binary one that is named or called text: what is
    UTF-8 in it is text. Several columns of one name are none.
    """
    counts = Counter(schema.names)
    fields = [f for f in schema if counts[f.name] == 1]
    texts = [f.name for f in fields if is_text(f.type) or (_may_hold_text(f.type) and is_believed(f.name, wanted))]
    others = [f"{f.name}{_describe_kind(f, wanted)}" for f in fields if f.name not in texts]
    return texts, others + [f"{name} ({count} columns)" for name, count in counts.items() if count > 1]


def _describe_kind(column: pa.Field, wanted: str | None) -> str:
    """The type of a column, where its name or type would let one think of text."""
    if pa.types.is_primitive(column.type) and not is_believed(column.name, wanted):
        return ""
    return f" ({str(column.type).partition('<')[0]})"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _may_hold_text(kind: pa.DataType) -> bool:
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(is_binary or pa.types.is_null(kind))


def is_believed(name: str, wanted: str | None) -> bool:
    """Whether a column is the text by its name alone."""
    return name == wanted or name in TEXT_COLUMNS


def choose_text_column(
    text_columns: Sequence[str], other_columns: Sequence[str], wanted: str | None, place: str
) -> tuple[str, str]:
    """The column to read, and a sentence that says so.

    Raises:
        DataError: the wanted column is not there, or none was named and several would do.
    """
    if wanted is not None:
        if wanted in text_columns:
            return wanted, f"text from column {wanted!r} (dataset.text_column)"
        is_there = any(name == wanted or name.startswith(f"{wanted} (") for name in other_columns)
        kind = "holds no text" if is_there else "is not"
        raise DataError(
            f"dataset.text_column: {wanted!r} {kind} in {place}; "
            f"text columns there: {', '.join(text_columns) or 'none'}"
        )
    for name in TEXT_COLUMNS:
        if name in text_columns:
            return name, f"text from column {name!r}"
    if len(text_columns) == 1:
        return text_columns[0], f"text from column {text_columns[0]!r}, the only one with text"
    if text_columns:
        raise DataError(
            f"dataset.text_column is null and {place} has several text columns; name one of {', '.join(text_columns)}"
        )
    raise DataError(
        f"{place} has no text column (columns: {', '.join(other_columns) or 'none'}); "
        "choose another dataset.path, or name the column with dataset.text_column"
    )
