"""Opening a split the way `dataset.streaming` asks: in place, or tokenised once to disk and then indexed.

| the source is | `streaming: null` | `true` | `false`, or `pre_tokenize: true` |
|---|---|---|---|
| tokenised folder of `save_to_disk` | indexed | indexed | indexed |
| text folder of `save_to_disk` | indexed, tokenised window by window | the same | tokenised once, then indexed |
| JSONL, text, CSV, Parquet, hub | streamed | streamed | tokenised once, then indexed |
| `python_stdlib` | tokenised once, then indexed | the same | the same |
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neobert.config.schema import DatasetSection
from neobert.data.fingerprint import combine
from neobert.data.rows.lanes import State
from neobert.data.source.documents import Documents
from neobert.data.source.formats import OpenSplit, list_shared_splits
from neobert.data.source.one_reader import Share, alone, see
from neobert.data.source.spec import SourceSpec, describe_sources, name_folders
from neobert.data.source.splits import SplitSlice, choose_eval_split, choose_train_split, parse_split, slice_bounds
from neobert.data.source.text import WHOLE, RecordCounts, Span, cut_text
from neobert.data.store.prepare import prepare_tokens
from neobert.data.store.token_folder import choose_settings
from neobert.data.store.tokens import TokenStore
from neobert.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class View:
    """Some of the documents of a source, in a row."""

    documents: Documents
    spec: SourceSpec
    span: Span

    def count(self) -> int | None:
        """Documents, where their number is known without reading them."""
        return self.documents.count(self.span)

    def beyond(self, cursor: State | None) -> "View":
        """What is left after the document with this cursor; None: all of it."""
        return replace(self, span=self.span.beyond(cursor))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """One source of a run: its splits, and the split that is trained on."""

    spec: SourceSpec
    section: DatasetSection
    tokenizer: Tokenizer
    splits: Mapping[str, OpenSplit]
    train_split: SplitSlice
    prepared_dir: Path
    main_first: Callable[..., AbstractContextManager[Any]]
    share: Share

    def count_train_split(self) -> int | None:
        """Documents of the whole training split, where that is known without reading them."""
        return self.splits[self.train_split.name](self.tokenizer).count()

    def open(self, split: SplitSlice, max_documents: int | None = None) -> View:
        """A split or a slice of it, at most its first `max_documents`; tokenises it first where that is requested."""
        found = self.splits[split.name](self.tokenizer)
        to_disk = self.section.streaming is False or self.section.pre_tokenize or not found.in_place
        if to_disk and not found.is_tokenised:
            if found.count() is not None or not split.needs_size:
                return View(documents=self._prepare(found, split, max_documents), spec=self.spec, span=WHOLE)
            # The size is known when the whole split is on disk; only then can it be sliced.
            found = self._prepare(found, SplitSlice(name=split.name), None)
        return View(documents=found, spec=self.spec, span=locate_slice(found, split, max_documents))

    def _prepare(self, documents: Documents, split: SplitSlice, max_documents: int | None) -> Documents:
        """The documents as tokens on disk; they have the fingerprint of what they are made of."""
        folder = self.prepared_dir / split.folder_name
        span = locate_slice(documents, split, max_documents)
        settings = choose_settings(self.section, self.spec, split, max_documents)
        facts = {f"documents of {self.spec.label}": documents.fingerprint, "tokenizer": self.tokenizer.digest}
        with self.main_first(facts):
            manifest = prepare_tokens(documents, self.tokenizer, folder, settings, span=span, label=str(folder))
        numbers = {key: manifest[key] for key in ("num_documents", "num_tokens", "bad", "skipped")}
        note = "tokenised to {}: {num_documents:,} documents, {num_tokens:,} tokens; {bad} bad, {skipped} without text"
        stored = self.share(
            lambda: TokenStore(folder, self.tokenizer),
            path=[str(folder)],
            seen=lambda: see([str(folder / "state.json")]),
        )
        stored.fingerprint = combine([documents.fingerprint], lambda parts: _hash(parts[0], str(span)))
        stored.notes = [*documents.notes, note.format(folder, **numbers)]
        stored.inventory = documents.inventory
        return stored


def list_sources(
    section: DatasetSection,
    tokenizer: Tokenizer,
    prepared_dir: Path,
    main_first: Callable[..., AbstractContextManager[Any]],
    share: Share,
) -> list[Source]:
    """The sources that the config names, their splits found and the training split chosen; nothing is read yet.

    Raises:
        DataError: a source or its training split is not there.
    """
    specs = describe_sources(section)
    found = []
    for spec, folder in zip(specs, name_folders(specs, prepared_dir)):
        splits = list_shared_splits(spec, share)
        found.append(
            Source(
                spec=spec,
                section=section,
                tokenizer=tokenizer,
                splits=splits,
                train_split=parse_split(choose_train_split(list(splits), spec.split)),
                prepared_dir=folder,
                main_first=main_first,
                share=share,
            )
        )
    return found


def locate_slice(
    documents: Documents, split: SplitSlice, max_documents: int | None = None, *, size: int | None = None
) -> Span:
    """Where a slice starts and ends.

    Args:
        size: documents of the split, where the caller knows better than the source.

    Raises:
        DataError: the slice is empty or outside of the split, or its size is needed and not known.
    """
    size = documents.count() if size is None else size
    first, last = slice_bounds(split, size)
    if max_documents is not None and (last is None or last > first + max_documents):
        last = first + max_documents
        if size is not None:
            last = min(last, size)
    return documents.slice(first, last, size=size, is_cap=max_documents is not None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingTexts:
    """The texts a tokenizer may learn from: the training splits without the documents held out for evaluation."""

    texts: Iterator[str]
    fingerprint: str


def open_training_texts(
    specs: Sequence[SourceSpec], section: DatasetSection, max_documents: int | None, share: Share = alone
) -> TrainingTexts:
    """Texts of the training splits in source order, source after source, long ones in parts.

    Args:
        max_documents: so many in all, shared equally by the sources.

    Raises:
        DataError: a source is not there, or is tokenised already.
    """
    limit = None if max_documents is None else -(-max_documents // len(specs))
    opened = [_open_texts(spec, section, limit, share) for spec in specs]
    return TrainingTexts(
        texts=(text for item in opened for text in item.texts),
        fingerprint=opened[0].fingerprint
        if len(opened) == 1
        else combine((item.fingerprint for item in opened), lambda parts: _hash(*parts)),
    )


def _hash(*parts: str) -> str:
    return f"sha256:{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}"


def _open_texts(spec: SourceSpec, section: DatasetSection, max_documents: int | None, share: Share) -> TrainingTexts:
    splits = list_shared_splits(spec, share)
    train = parse_split(choose_train_split(list(splits), spec.split))
    source = splits[train.name](None).as_text(spec.label)
    requested = None if section.eval_split is None else parse_split(section.eval_split).name
    has_split = requested is not None or choose_eval_split(list(splits), train.name) is not None
    num_held_out = 0 if has_split else section.eval_samples or 0
    if not has_split and section.validation_split is not None:
        num_held_out = int((source.count() or 0) * section.validation_split) + 1
    counts = RecordCounts(max_bad=section.max_bad_records, where="the training split")
    span = locate_slice(source, train, spec.max_documents)

    def texts() -> Iterator[str]:
        number = 0
        for record in source.records(span):
            if record.text is None:
                counts.add(record)
                continue
            number += 1
            if number <= num_held_out:
                continue
            if max_documents is not None and number > num_held_out + max_documents:
                return
            yield from cut_text(record.text, section.max_document_chars)

    return TrainingTexts(texts=texts(), fingerprint=source.fingerprint)
