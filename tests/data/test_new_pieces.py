"""A tokenizer is extended from text: the old one with more tokens, or a sentence why it cannot be."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import make_texts
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neobert.data.new_pieces import (
    MIN_COUNT,
    check_extended,
    learn_pieces,
    measure_fertility,
    write_extended,
)
from neobert.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from neobert.errors import DataError

WORDS = ["myocardial", "infarction", "tachycardia", "stenosis", "the", "patient", "naïve", "[MASK]", "with"]


def make_own(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=20)) + "." for _ in range(40)]


def wrap(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([token for token in SPECIAL_TOKENS.values() if backend.token_to_id(token) is None])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS))


def make_unigram(specials: list[str]) -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=specials,
        unk_token="[UNK]",
        show_progress=False,
        initial_alphabet=["ï", "[", "]"],
    )
    backend.train_from_iterator([*make_texts(200), "z q x j ï [ ] M A S K"], trainer)
    return wrap(backend)


def make_late_specials() -> Tokenizer:
    """Byte-level BPE whose special tokens were added after its vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(make_texts(200), trainer)
    return wrap(backend)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": lambda: train_tokenizer(iter(make_texts(200)), "byte_bpe", 340),
    "late_specials": make_late_specials,
    "wordpiece": lambda: train_tokenizer(iter([*make_texts(200), *"abcdefghijklmnopqrstuvwxyz"]), "wordpiece", 200),
    "unigram": lambda: make_unigram(list(SPECIAL_TOKENS.values())),
}


@pytest.fixture(scope="module", params=MAKERS)
def old(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def test_an_extended_tokenizer_is_the_old_one_with_more_tokens(old: Tokenizer, tmp_path: Path) -> None:
    own, general = make_own(), make_texts(20, seed=5)
    count = 30 if old.model_name == "BPE" else 6  # Of others, what only leads to a word is no token.
    new = learn_pieces(old, own, count)
    extended = write_extended(old, new, tmp_path)
    assert len(new.pieces) == count
    assert old.vocabulary.items() <= extended.vocabulary.items()
    assert [extended.spell(old.size + n) for n in range(count)] == [piece.text for piece in new.pieces]
    assert (extended.roles, extended.special_tokens) == (old.roles, old.special_tokens)
    before, after = measure_fertility(old, own), measure_fertility(extended, own)
    assert (before.num_words, before.num_tokens) == (after.num_words, new.num_tokens)
    assert after.num_tokens < 0.8 * before.num_tokens
    if old.model_name == "BPE":
        assert before.num_tokens - after.num_tokens == new.num_saved, "the merges are those of the tokenizer"
    used = [piece.text for piece in new.pieces if piece.uses >= MIN_COUNT]
    assert old.model_name == "BPE" or len(used) == count, "no row for a piece that only leads to others"
    ids = {int(number) for tokens in extended.encode_batch(own) for number in tokens}
    assert {extended.vocabulary[text] for text in used} <= ids
    for text in own + general:
        assert extended.decode(extended.encode_batch([text])[0]) == old.decode(old.encode_batch([text])[0])


def test_a_new_piece_is_made_of_old_tokens_that_spell_it(old: Tokenizer) -> None:
    for piece in learn_pieces(old, make_own(), 20).pieces:
        assert all(part < old.size for part in piece.parts)
        assert len(piece.parts) > 1
        first, *rest = [old.spell(part) for part in piece.parts]
        assert piece.text == first + "".join(part.removeprefix("##") for part in rest)


def test_pieces_that_save_most_come_first() -> None:
    tokenizer = MAKERS["byte_bpe"]()
    new = learn_pieces(tokenizer, ["xq" + " xq" * 7 + " wz" * 5 + " vj" * (MIN_COUNT - 1)], 9)
    assert [piece.text for piece in new.pieces] == ["xq", "Ġxq", "wz", "Ġwz"], (
        "by tokens saved; the rare one is left out"
    )
    assert [piece.uses for piece in new.pieces] == [1, 7, 0, 5]


def test_text_without_new_pieces_is_refused() -> None:
    tokenizer = MAKERS["byte_bpe"]()
    with pytest.raises(DataError, match=r"--text: no two tokens within its 2 words are neighbours 5 times.*more text"):
        learn_pieces(tokenizer, ["zebra quilt"], 5)
    with pytest.raises(DataError, match="--text: there is no word"):
        learn_pieces(tokenizer, [], 5)


def make_wordlevel() -> Tokenizer:
    backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(backend)


def make_without_words() -> Tokenizer:
    return wrap(Backend(models.BPE({"a": 0, "b": 1}, [])))


def make_with_suffix() -> Tokenizer:
    backend = Backend(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(backend)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_wordlevel, "its model is WordLevel; pieces are added to WordPiece, BPE, Unigram"),
        (make_without_words, "it has no pre-tokenizer"),
        (make_with_suffix, "its BPE marks the inside or the end of words"),
        (lambda: make_unigram(["[UNK]"]), "ids of added tokens follow those of its Unigram vocabulary"),
    ],
)
def test_what_cannot_be_extended_is_refused_with_the_reason(make: Callable[[], Tokenizer], reason: str) -> None:
    with pytest.raises(DataError, match=rf"cannot be extended: {reason}.*neobert pretrain"):
        learn_pieces(make(), make_own(), 5)


def test_another_tokenizer_is_no_extension(tmp_path: Path) -> None:
    old = MAKERS["byte_bpe"]()
    new = learn_pieces(old, make_own(), 5)
    write_extended(old, new, tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    one, two = new.pieces[0].text, new.pieces[1].text
    vocabulary = definition["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    backend = Backend.from_str(json.dumps(definition))
    changed = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS))
    with pytest.raises(DataError, match="cannot be extended: an old token would have another id"):
        check_extended(old, changed, new)
