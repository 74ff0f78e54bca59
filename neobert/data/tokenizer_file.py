"""tokenizer.json is the truth: what transformers makes of a tokenizer is compared with the file, and the file counts.

transformers 5 takes little more than the vocabulary from tokenizer.json where tokenizer_config.json names a class with
a recipe of its own (GPT2Tokenizer, BertTokenizer, XLMRobertaTokenizer, ...): normaliser, pre-tokenizer and some added
tokens are that class's. Digits stay together that the file splits, NFKC is lost, a token is added. Every other program
reads the file, so what it says is what we train with, and the class gives only the names of the special tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from neobert.config.nesting import parse_json

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
OWN_CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, in transformers 4 and 5."""

_PROBE = "Harbor 1234 don't  stop,\n\n\tﬁne Ａ½ Café naïve 日本語 😀 HELLO world's end"
"""Digits, spaces, line ends, ligatures and other forms that NFKC folds, accents, letters without spaces, emoji."""

_PARTS = {"normalizer": "normaliser", "pre_tokenizer": "pre-tokenizer", "model": "model", "decoder": "decoder"}
"""What of tokenizer.json decides about ids and their text. Its post-processor does not: [CLS] and [SEP] are ours."""


class LoadedTokenizer(NamedTuple):
    """A tokenizer of transformers that tokenises as its tokenizer.json says."""

    hf: Any
    note: str | None
    """What transformers would have made of it instead; None where that is the same."""

    rebuilt: tokenizers.Tokenizer | None
    """That other tokenizer, where it could be built."""

    dropped: dict[str, str]
    """Special tokens that are named (`mask_token`, ...) and that tokenizer.json does not have."""


def load_as_written(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> LoadedTokenizer:
    """The tokenizer of a folder or of a repository of the hub, as its tokenizer.json says.

    Raises:
        OSError, ValueError, KeyError, ImportError: it cannot be loaded. ValueError also where tokenizer.json cannot be
            read, and where transformers changes it whatever the class.
    """
    named_class = _read_class(Path(source))
    path = _find_file(source, revision)
    written = None if path is None else _read_file(path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        built = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError):
        raise
    except Exception as error:  # A class that cannot hold this model raises anything; the file is sound.
        if written is None:
            raise ValueError(_first_line(error)) from error
        built = PreTrainedTokenizerFast.from_pretrained(source, **options)
        loaded = _as_written(built, written)
        note = f"{_describe_class(named_class)}, which cannot hold it ({_first_line(error)}); {_REMEDY}"
        return loaded._replace(note=note, rebuilt=None)
    if path is None or written is None or not built.is_fast:
        return LoadedTokenizer(built, None, None, {})
    differences = find_differences(written, built.backend_tokenizer, named=_named_tokens(built))
    if not differences:
        return LoadedTokenizer(built, None, None, {})
    loaded = _as_written(built, written)
    named_class = named_class or _read_class(path.parent)  # Of the hub, it was fetched with the class.
    differences += _probe_difference(written, built.backend_tokenizer)
    note = (
        f"{_describe_class(named_class, built)}, of which transformers {transformers.__version__} makes another "
        f"tokenizer: {'; '.join(differences)}. {_REMEDY}"
    )
    return loaded._replace(note=note, rebuilt=built.backend_tokenizer)


_REMEDY = f'{FILE} is used as it is; "tokenizer_class": "{OWN_CLASS}" makes other programs do the same'


def find_differences(
    written: tokenizers.Tokenizer, built: tokenizers.Tokenizer, named: frozenset[str] = frozenset()
) -> list[str]:
    """What `built` does otherwise than `written`, the content of tokenizer.json; nothing where the ids are the same.

    Args:
        named: Tokens that have a role, and are special in `built` whatever they are in `written`.
    """
    if written.to_str() == built.to_str():
        return []
    ours, theirs = json.loads(written.to_str()), json.loads(built.to_str())
    parts = [
        name
        for part, name in _PARTS.items()
        if _plain(ours[part]) != _plain(theirs[part]) and not (part == "decoder" and ours[part] is None)
    ]
    found = [f"another {' and '.join(parts)}"] if parts else []
    return [*found, *_compare_added(written, ours["added_tokens"], theirs["added_tokens"], named)]


def _plain(part: Any) -> Any:
    """A part of tokenizer.json without entries that say nothing: `null`, false and the empty text mean the same."""
    return {k: v for k, v in part.items() if v not in (None, "", False)} if isinstance(part, dict) else part


def _compare_added(
    written: tokenizers.Tokenizer, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], named: frozenset[str]
) -> Iterator[str]:
    before, after = ({token["content"]: token for token in tokens} for tokens in (ours, theirs))
    for content, token in after.items():
        if content in before:
            changed = [name for name, value in before[content].items() if token.get(name) != value]
            if changed and not (changed == ["special"] and content in named):
                yield f"added token {content!r} with another {', '.join(changed)}"
        elif content not in named or written.token_to_id(content) != token["id"]:
            yield f"{content!r} added as token {token['id']}"
    yield from (f"without the added token {content!r}" for content in before if content not in after)


def _probe_difference(written: tokenizers.Tokenizer, built: tokenizers.Tokenizer) -> list[str]:
    """The first piece of the probe text that the two tokenise differently, as a list of at most one sentence."""
    whole = [tokenizer.encode(_PROBE, add_special_tokens=False).ids for tokenizer in (written, built)]
    for word in _PROBE.split() if whole[0] != whole[1] else ():
        ours, theirs = (tokenizer.encode(f" {word}", add_special_tokens=False) for tokenizer in (written, built))
        if ours.ids != theirs.ids:
            return [f"{word!r} is {' '.join(theirs.tokens)} instead of {' '.join(ours.tokens)}"]
    return []


def _named_tokens(hf: Any) -> frozenset[str]:
    return frozenset(map(str, hf.all_special_tokens))


def _as_written(built: Any, written: tokenizers.Tokenizer) -> LoadedTokenizer:
    """`built` with the content of tokenizer.json instead of its own: of it only names of tokens and settings remain.

    Raises:
        ValueError: transformers changes it all the same.
    """
    tokens = {name: str(token) for name, token in built.special_tokens_map.items() if isinstance(token, str)}
    kept = {name: token for name, token in tokens.items() if written.token_to_id(token) is not None}
    others = [token for token in map(str, built.extra_special_tokens) if written.token_to_id(token) is not None]
    roles = {*kept.values(), *others}
    ordinary = [t for t in written.get_added_tokens_decoder().values() if t.content in roles and not t.special]
    for token in ordinary:  # As transformers does: else text that spells one would become it.
        token.special = True
    special = tokenizers.Tokenizer.from_str(written.to_str())
    special.add_special_tokens(ordinary)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=special,
        name_or_path=built.name_or_path,
        extra_special_tokens=others,
        model_max_length=built.model_max_length,
        model_input_names=built.model_input_names,
        padding_side=built.padding_side,
        truncation_side=built.truncation_side,
        **kept,
    )
    differences = find_differences(written, hf.backend_tokenizer, named=_named_tokens(hf))
    if differences:
        raise ValueError(
            f"transformers {transformers.__version__} makes another tokenizer of it than {FILE} says "
            f"({'; '.join(differences)}); write it again with tokenizer.save_pretrained"
        )
    return LoadedTokenizer(hf, None, None, {name: token for name, token in tokens.items() if name not in kept})


def _find_file(source: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / FILE
        return path if path.is_file() else None
    try:
        found = cached_file(source, FILE, revision=revision)
    except (OSError, ValueError):  # Not there, or nothing can be reached: AutoTokenizer says which.
        return None
    return None if found is None else Path(found)


def _read_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exceptions.
        raise ValueError(
            f"{path} cannot be read ({_first_line(error)}); write it again with tokenizer.save_pretrained"
        ) from error


def _read_class(folder: Path) -> str | None:
    """The class that tokenizer_config.json names, where there is one."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        named = parse_json(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({_first_line(error)}); correct it") from error
    return None if named is None else str(named)


def _describe_class(named: str | None, built: Any | None = None) -> str:
    if named is not None or built is None:
        return f"{CONFIG_FILE} names {named}"
    return f"transformers chooses {type(built).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
