"""Where words begin, for each kind of tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neobert.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from neobert.data.words import build_word_edges
from neobert.errors import DataError

TEXT = "Unbelievable, isn't it? The unhappiest cats' naïve 42nd re-reading"
WORDS = ["Unbelievable", ",", "isn", "'", "t", "it", "?", "The", "unhappiest", "cats", "'", "naïve", "42nd", "re", "-"]
WORDS.append("reading")


def wrap(backend: Backend) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS))


def unigram() -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=list(SPECIAL_TOKENS.values()), unk_token="[UNK]", show_progress=False
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    return wrap(backend)


def with_suffix() -> Tokenizer:
    backend = Backend(models.BPE(end_of_word_suffix="</w>", unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        special_tokens=list(SPECIAL_TOKENS.values()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    return wrap(backend)


def glue(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """The words of a text as lists of tokens."""
    edges, words = build_word_edges(tokenizer), []
    for token in tokenizer.encode_batch([text])[0].tolist():
        if words and edges.continues[token] and edges.is_continued[words[-1][-1]]:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def spell(tokenizer: Tokenizer, words: list[list[int]]) -> list[str]:
    names = {number: token for token, number in tokenizer.vocabulary.items()}
    spelled = []
    for word in words:
        text = "".join(names[token] for token in word)
        for mark in ("##", "Ġ", "▁", "</w>"):
            text = text.replace(mark, "")
        spelled.append(text)
    return [word for word in spelled if word]


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram", "suffix"])
def test_words_are_those_of_the_text(kind: str) -> None:
    make = {"unigram": unigram, "suffix": with_suffix}
    size = 310 if kind == "byte_bpe" else 50
    tokenizer = make[kind]() if kind in make else train_tokenizer(iter([TEXT] * 3), kind, size)  # type: ignore[arg-type]
    words = glue(tokenizer, TEXT)
    assert max(map(len, words)) > 1, "some words have several tokens"
    wanted = " ".join(WORDS)
    if kind == "byte_bpe":
        wanted = wanted.replace("isn ' t", "isn 't").replace("ï", "Ã¯")  # Its own rule; two bytes as it spells them.
    if kind == "wordpiece":
        wanted = wanted.lower().replace("ï", "i")
    assert " ".join(spell(tokenizer, words)) == wanted


def test_a_piece_that_starts_inside_a_word_and_special_tokens() -> None:
    tokenizer = train_tokenizer(iter([TEXT] * 3), "wordpiece", 200)
    edges = build_word_edges(tokenizer)
    assert len(edges.continues) == len(edges.is_continued) == tokenizer.size
    special = list(tokenizer.special_ids)
    assert not edges.continues[special].any()
    assert not edges.is_continued[special].any()
    names = {number: token for token, number in tokenizer.vocabulary.items()}
    assert {names[number].startswith("##") for number in np.flatnonzero(edges.continues).tolist()} == {True}


def test_whole_words_have_no_parts(tokenizer: Tokenizer) -> None:
    edges = build_word_edges(tokenizer)
    assert not edges.continues.any()
    assert not edges.is_continued.any()


def test_a_tokenizer_that_does_not_tell() -> None:
    backend = Backend(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    with pytest.raises(DataError, match=r"datacollator\.mask_units: .*\(BPE\) marks neither .* write tokens, or use"):
        build_word_edges(wrap(backend))
