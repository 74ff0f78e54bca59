"""Which column holds the text."""

from collections.abc import Sequence

from neobert.data.errors import DataError

TEXT_COLUMNS = ("text", "content", "sentence")
"""Tried in this order when `dataset.text_column` is null."""


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
        kind = "holds no text" if wanted in other_columns else "is not"
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
