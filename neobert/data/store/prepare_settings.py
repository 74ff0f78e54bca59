"""What shapes a folder of tokenised documents, and whether two such folders hold the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from neobert.config.schema_data import DatasetSection
from neobert.data.fingerprint import fits
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.source.spec import SourceSpec
from neobert.data.source.splits import SplitSlice
from neobert.data.store.token_writer import FILE_TOKENS
from neobert.data.tokenizer import Tokenizer

_FORMAT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What shapes the folder, besides documents and tokenizer."""

    max_document_chars: int
    max_bad_records: int
    text_column: str | None = None
    split: str | None = None
    special_tokens: bool = False
    """True: every row is `[CLS] tokens [SEP]`; False: bare tokens."""

    special_tokens_mask: bool = False
    """Adds the column `special_tokens_mask`."""

    max_length: int | None = None
    """Longer documents become consecutive rows of at most this many tokens, special ones included, and a column
    `document` numbers the documents. None: a document is a row."""

    max_documents: int | None = None
    """Only the first documents, this many."""

    min_tokens: int = 0
    """Documents with fewer tokens are left out and counted as `short`."""

    file_tokens: int = FILE_TOKENS

    @property
    def row_tokens(self) -> int | None:
        """Tokens of the longest row without its special tokens; None: no limit."""
        if self.max_length is None:
            return None
        return self.max_length - (SPECIALS_PER_SEGMENT if self.special_tokens else 0)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two folders to be equal; how many bad records are accepted does not matter."""
        return {name: value for name, value in asdict(self).items() if name != "max_bad_records"}


def choose_settings(
    section: DatasetSection, spec: SourceSpec, split: SplitSlice, max_documents: int | None
) -> PrepareSettings:
    """How a run has its text tokenised to disk: bare tokens of whole documents."""
    return PrepareSettings(
        max_document_chars=section.max_document_chars,
        max_bad_records=section.max_bad_records,
        text_column=spec.text_column,
        split=str(split),
        max_documents=max_documents,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where documents and tokenizer come from, as text for the manifest."""

    source: str | None = None
    revision: str | None = None
    tokenizer: str | None = None


UNNAMED = Origin()
"""Nothing is known of where they come from."""


def make_identity(
    fingerprint: str, tokenizer: Tokenizer, settings: PrepareSettings, part: tuple[int, int] | None
) -> dict[str, Any]:
    """What is equal in folders with equal content; a part of every manifest."""
    return {
        "format": _FORMAT,
        "source": fingerprint,
        "tokenizer_digest": tokenizer.digest,
        "special_tokens": settings.special_tokens,
        "settings": settings.identity(),
        "part": None if part is None else list(part),
    }


def describe_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where two identities differ, as text; empty when they do not."""
    pairs = {**here, **here["settings"]}
    others = {**there, **there.get("settings", {})}
    names = [name for name in pairs if name != "settings" and not fits(others.get(name), pairs[name])]
    return ", ".join(f"{name} is {others.get(name)!r} there and {pairs[name]!r} here" for name in names)
