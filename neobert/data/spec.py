"""`dataset.*` -> the list of sources it names, one `SourceSpec` each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from neobert.config.schema_data import MAX_RECORD_BYTES, DatasetSection
from neobert.data.decompress import codec_of_name
from neobert.data.errors import DataError
from neobert.data.files import kind_of_name

PYTHON_STDLIB = "python_stdlib"
"""The name of the corpus that is always there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One source of documents, before anything of it was looked at."""

    name: str | None = None
    """Hub dataset, or `python_stdlib`."""

    config: str | None = None
    revision: str | None = None
    path: tuple[str, ...] = ()
    """Files, folders and patterns, local or remote; empty for a source with a name."""

    split: str | None = None
    """Training split or slice; None for the usual one."""

    text_column: str | None = None
    weight: float | None = None
    """Share of the documents relative to the other sources; None reads each document once per epoch."""

    max_documents: int | None = None
    cache_dir: str | None = None
    sample_by: Literal["line", "paragraph", "document"] = "line"
    num_lanes: int | None = None
    on_bad_shard: Literal["error", "skip"] = "error"
    network_retries: int = 5
    max_record_bytes: int = MAX_RECORD_BYTES

    @property
    def label(self) -> str:
        """The source in a word or two, for messages and the log."""
        if not self.path:
            return str(self.name)
        return self.path[0] if len(self.path) == 1 else f"{self.path[0]} (and {len(self.path) - 1} more)"


def name_folders(specs: Sequence[SourceSpec], folder: Path) -> list[Path]:
    """Where the tokens of each source go: a single source has the folder for itself."""
    if len(specs) == 1:
        return [folder]
    words = [re.sub(r"[^A-Za-z0-9._]+", "-", Path(spec.label.rstrip("/")).name).strip("-.") for spec in specs]
    return [folder / f"{number}-{word or 'source'}" for number, word in enumerate(words)]


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
        cache_dir=section.cache_dir,
        sample_by=section.sample_by,
        num_lanes=section.num_lanes,
        on_bad_shard=section.on_bad_shard,
        network_retries=section.network_retries,
        max_record_bytes=section.max_record_bytes,
    )
    if section.path is not None:
        return (replace(base, path=_as_tuple(section.path)),)
    if section.mixture:
        return tuple(
            replace(
                base,
                name=source.name,
                config=source.config,
                revision=source.revision,
                path=() if source.path is None else _as_tuple(source.path),
                split=source.split or section.train_split,
                text_column=source.text_column or section.text_column,
                weight=source.weight,
                max_documents=source.max_documents,
            )
            for source in section.mixture
        )
    if section.name is None:
        raise DataError("no data is named: set dataset.path (files, folder) or dataset.name (hub, or python_stdlib)")
    words = [word.strip() for name in _as_tuple(section.name) for word in name.split(",")]
    return tuple(_parse_name(word, base) for word in words)


def describe_source(source: str, *, text_column: str | None = None, config: str | None = None) -> SourceSpec:
    """A source given as one word on a command line: what exists or looks like files is a path, all else a name.

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


def _parse_name(word: str, base: SourceSpec) -> SourceSpec:
    name, colon, count = word.rpartition(":")
    if not colon:
        name, count = word, ""
    if not name or (colon and not (count.isdecimal() and int(count) > 0)):
        raise DataError(
            f"dataset.name: {word!r} is not a name; write a hub dataset, or name:5000 for its first 5000 documents"
        )
    return replace(base, name=name, max_documents=int(count) if count else None)


def _has_suffix(source: str) -> bool:
    name = source.lower()
    return kind_of_name(name) is not None or codec_of_name(name) is not None or name.endswith(".arrow")


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
