"""Opening a split the way `dataset.streaming` asks: in place, or tokenised once to disk and then indexed.

| the source is | `streaming: null` | `true` | `false` |
|---|---|---|---|
| tokenised folder of `save_to_disk` | indexed | indexed | indexed |
| text folder of `save_to_disk` | indexed, tokenised window by window | the same | tokenised once, then indexed |
| JSONL, Parquet, hub | streamed | streamed | tokenised once, then indexed |
| `python_stdlib` | tokenised once, then indexed | the same | the same |
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.schema import DatasetSection
from neobert.data.arrow import TokenStore
from neobert.data.errors import DataError
from neobert.data.prepare import PrepareSettings, prepare_tokens
from neobert.data.sources import OpenSplit, StreamedText, list_splits
from neobert.data.spec import SourceSpec
from neobert.data.splits import choose_eval_split, choose_train_split
from neobert.data.stdlib import StdlibSource
from neobert.data.text import RecordCounts, cut_text
from neobert.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """The documents of a split, ready to read."""

    documents: TokenStore | StreamedText
    fingerprint: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opener:
    """Opens the splits of one source."""

    section: DatasetSection
    tokenizer: Tokenizer
    splits: dict[str, OpenSplit]
    prepared_dir: Path
    main_first: Callable[[], AbstractContextManager[Any]]

    def open(self, split: str) -> Opened:
        """A split; tokenises it first where `dataset.streaming` or the source wants that."""
        found = self.splits[split](self.tokenizer)
        if isinstance(found, TokenStore):
            return Opened(documents=found, fingerprint=found.fingerprint, notes=found.notes)
        if not isinstance(found, StdlibSource) and self.section.streaming is not False:
            return Opened(documents=found, fingerprint=found.fingerprint, notes=found.notes)
        folder = self.prepared_dir / split
        settings = PrepareSettings(
            max_document_chars=self.section.max_document_chars, max_bad_records=self.section.max_bad_records
        )
        with self.main_first():
            manifest = prepare_tokens(found, self.tokenizer, folder, settings)
        numbers = {name: manifest[name] for name in ("num_documents", "num_tokens", "bad", "skipped")}
        note = "tokenised to {}: {num_documents:,} documents, {num_tokens:,} tokens; {bad} bad, {skipped} without text"
        return Opened(
            documents=TokenStore(folder, self.tokenizer),
            fingerprint=found.fingerprint,
            notes=[*found.notes, note.format(folder, **numbers)],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingTexts:
    """The texts a tokenizer may learn from: the training split without the documents held out for evaluation."""

    texts: Iterator[str]
    fingerprint: str


def open_training_texts(
    specs: Sequence[SourceSpec], section: DatasetSection, max_documents: int | None
) -> TrainingTexts:
    """Texts of the training split in source order, long ones in parts.

    Raises:
        DataError: the source is not there, or is tokenised already.
    """
    (spec,) = specs
    splits = list_splits(spec)
    train = choose_train_split(list(splits), section.train_split)
    source = splits[train](None)
    if isinstance(source, TokenStore):
        raise DataError("a tokenizer is trained on text, and this source is tokenised already")
    has_split = section.eval_split is not None or choose_eval_split(list(splits), train) is not None
    num_held_out = 0 if has_split else section.eval_samples or 0
    counts = RecordCounts(max_bad=section.max_bad_records, where="the training split")

    def texts() -> Iterator[str]:
        number = 0
        for record in source.records():
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
