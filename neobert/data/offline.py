"""Opening text for work that is done before a run: a split, or a stretch of one, read once in source order."""

from dataclasses import dataclass
from pathlib import Path

from neobert.config.schema_data import TokenizerSection
from neobert.data.arrow import TokenStore
from neobert.data.errors import DataError
from neobert.data.prepare import Origin
from neobert.data.sources import list_splits
from neobert.data.spec import SourceSpec
from neobert.data.splits import choose_train_split
from neobert.data.text import WHOLE, Span, TextSource
from neobert.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextSplit:
    """The documents of a split, or of a slice of one."""

    name: str
    """The split without the slice."""

    source: TextSource
    span: Span


def open_text_split(spec: SourceSpec, wanted: str | None, tokenizer: Tokenizer | None) -> TextSplit:
    """A split of a source of text; None takes `train`, or the only one there is.

    Raises:
        DataError: it is not there, or is tokenised already.
    """
    splits = list_splits(spec)
    name, span = choose_train_split(list(splits), wanted), WHOLE
    source = splits[name](tokenizer)
    if isinstance(source, TokenStore):
        raise DataError(f"{spec.label} is tokenised already; name text, or train on this folder as it is")
    return TextSplit(name=name, source=source, span=span)


def describe_origin(spec: SourceSpec, tokenizer: TokenizerSection) -> Origin:
    """Words for the manifest. Of a path only the last part: the folder may be moved, and be given to others."""
    return Origin(
        source=", ".join(_last_part(path) for path in spec.path) if spec.path else spec.name,
        revision=spec.revision,
        tokenizer=_last_part(tokenizer.path) if tokenizer.path is not None else tokenizer.name,
    )


def _last_part(path: str) -> str:
    return Path(path.rstrip("/")).name


def describe_tokenizer(word: str) -> TokenizerSection:
    """A tokenizer given as one word on a command line: a folder that exists or looks like one, else a hub name."""
    is_path = Path(word).expanduser().exists() or word.startswith((".", "/", "~"))
    return TokenizerSection(path=str(Path(word).expanduser())) if is_path else TokenizerSection(name=word)
