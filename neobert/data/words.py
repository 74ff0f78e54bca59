"""Where words begin, read off the spelling of a vocabulary's tokens: two tables by token id, made once.

| tokenizer | a token continues with the word before it when |
|---|---|
| WordPiece, or BPE with such a prefix | it starts with the prefix (`##`) |
| BPE with an end-of-word suffix | the token before has no suffix |
| byte-level BPE, metaspace | it has no mark of a space (`Ġ`, `▁`), starts with a letter or digit and follows one |
| one token a word (WordLevel) | never |

Bytes above 127 count as letters: they are parts of characters. Scripts without spaces are one long word there.
"""

import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError
from neobert.types import WordEdges

_METASPACE = "▁"


def build_word_edges(tokenizer: Tokenizer) -> WordEdges:
    """The tables of a tokenizer; special tokens belong to no word.

    Raises:
        DataError: its tokens do not show where words begin.
    """
    definition, vocabulary = tokenizer.definition, tokenizer.vocabulary
    model = definition["model"]
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    continues = np.zeros(tokenizer.size, dtype=bool)
    is_continued = np.zeros(tokenizer.size, dtype=bool)
    begins_inside, ends_inside = _choose_rules(definition, vocabulary, prefix, suffix)
    for token, number in vocabulary.items():
        continues[number], is_continued[number] = begins_inside(token), ends_inside(token)
    special = list(tokenizer.special_ids)
    continues[special] = is_continued[special] = False
    return WordEdges(continues=continues, is_continued=is_continued)


_Rule = Callable[[str], bool]


def _choose_rules(
    definition: dict[str, Any], vocabulary: dict[str, int], prefix: str | None, suffix: str | None
) -> tuple[_Rule, _Rule]:
    """Whether a token can continue with a word, and whether a word can continue after a token."""
    if prefix:
        return (lambda token: token.startswith(prefix)), (lambda token: True)
    if suffix:
        return (lambda token: True), (lambda token: not token.endswith(suffix))
    if definition["model"]["type"] == "WordLevel":
        return (lambda token: False), (lambda token: False)
    if "ByteLevel" in _kinds(definition["pre_tokenizer"]):
        return (lambda token: _is_letter_byte(token[0])), (lambda token: _is_letter_byte(token[-1]))
    if any(token.startswith(_METASPACE) for token in vocabulary):
        return (lambda token: _is_letter(token, 0)), (lambda token: _is_letter(token, -1))
    raise DataError(
        f"datacollator.mask_units: words and spans need to know where words begin, and this tokenizer "
        f"({definition['model']['type']}) marks neither continuations (##) nor spaces (Ġ, ▁); write tokens, or use "
        "another tokenizer"
    )


def _kinds(part: Any) -> Iterator[str]:
    """The types of a pre-tokenizer and of those in it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for below in part.get("pretokenizers", []):
            yield from _kinds(below)


_SPELLED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _SPELLED} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _SPELLED)
}
"""Byte-level tokenizers spell every byte as one visible character."""


def _is_letter_byte(character: str) -> bool:
    byte = _BYTES.get(character, 0)
    return byte >= 128 or chr(byte).isalnum()


def _is_letter(token: str, index: int) -> bool:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # A byte instead of a character.
        byte = int(token[3:5], 16)
        return byte >= 128 or chr(byte).isalnum()
    return unicodedata.category(token[index])[0] in "LMN"
