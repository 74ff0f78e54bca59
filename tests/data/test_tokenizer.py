import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import load_tokenizer, padded_vocab_size, tokenizer_info, train_tokenizer
from neobert.errors import DataError

TEXTS = ["def cut(line):\n    return line.split()  # café 😀\n", "the cat sees the red door. " * 20] * 5


@pytest.fixture(scope="module")
def byte_bpe():
    return train_tokenizer(TEXTS, "byte_bpe", 300)


def save_without_special_tokens(folder, **special):
    words = ["a", "b", "c", *special.values()]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


def test_byte_bpe_keeps_every_byte(byte_bpe):
    text = "  tab\tnewline\n\né😀 \x00 ∑"
    assert byte_bpe.decode(byte_bpe.encode_batch([text])[0]) == text
    assert byte_bpe.size == 300
    assert [byte_bpe.pad_id, byte_bpe.unk_id, byte_bpe.cls_id, byte_bpe.sep_id, byte_bpe.mask_id] == [0, 1, 2, 3, 4]


def test_byte_bpe_is_the_same_from_run_to_run(byte_bpe):
    assert train_tokenizer(iter(TEXTS), "byte_bpe", 300).digest == byte_bpe.digest
    assert train_tokenizer(TEXTS[:1], "byte_bpe", 300).digest != byte_bpe.digest


@pytest.mark.parametrize("algorithm", ["byte_bpe", "wordpiece"])
def test_saved_tokenizers_come_back_equal(algorithm, tmp_path):
    trained = train_tokenizer(TEXTS, algorithm, 280)
    trained.save(tmp_path / "t")
    loaded = load_tokenizer(TokenizerSection(path=str(tmp_path / "t")))
    assert loaded.digest == trained.digest
    assert tokenizer_info(loaded) == tokenizer_info(trained)
    assert [t.tolist() for t in loaded.encode_batch(TEXTS)] == [t.tolist() for t in trained.encode_batch(TEXTS)]
    ids = AutoTokenizer.from_pretrained(tmp_path / "t")("the cat")["input_ids"]
    assert [ids[0], ids[-1]] == [trained.cls_id, trained.sep_id]
    assert json.loads(json.dumps(tokenizer_info(loaded)))["special_tokens"]["[MASK]"] == loaded.mask_id


def test_wordpiece_vocabulary_is_sorted():
    trained = train_tokenizer(TEXTS, "wordpiece", 60)
    words = [trained.decode_token(i) for i in range(5, trained.size)]
    assert words == sorted(words)
    assert trained.decode(trained.encode_batch(["The CAT sees"])[0]) == "the cat sees"


@pytest.mark.parametrize("algorithm", ["byte_bpe", "wordpiece"])
def test_text_that_spells_a_special_token_is_text(algorithm):
    tokenizer = train_tokenizer([*TEXTS, "[mask] [MASK] [CLS]"], algorithm, 300)
    (ids,) = tokenizer.encode_batch(["the [MASK] and [CLS] [SEP][PAD]"])
    assert not set(ids.tolist()) & {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}


def test_no_special_tokens_and_no_truncation(byte_bpe, tmp_path):
    byte_bpe.save(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    config["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(config))
    loaded = load_tokenizer(TokenizerSection(path=str(tmp_path / "t")))
    ids = loaded.encode_batch(["the cat sees the red door", ""])
    assert len(ids[0]) > 4
    assert len(ids[1]) == 0
    assert loaded.digest == byte_bpe.digest


def test_replacements_are_never_special(byte_bpe):
    assert len(byte_bpe.random_ids) == 295
    assert not set(byte_bpe.random_ids.tolist()) & set(byte_bpe.special_ids)


def test_continuations_and_spaces_show_in_single_tokens(byte_bpe):
    tokens = [byte_bpe.decode_token(i) for i in byte_bpe.encode_batch(["the cat"])[0]]
    assert "".join(tokens) == "the cat"
    assert any(token.startswith(" ") for token in tokens)


def test_missing_special_tokens_are_an_error_or_added(tmp_path):
    path = save_without_special_tokens(tmp_path / "t", cls_token="<s>")
    with pytest.raises(DataError) as failure:
        load_tokenizer(TokenizerSection(path=path))
    message = str(failure.value)
    assert f"tokenizer.path: {path} has no pad_token, sep_token, mask_token" in message
    assert "tokenizer.allow_special_token_rewrite: true" in message
    tokenizer = load_tokenizer(TokenizerSection(path=path, allow_special_token_rewrite=True))
    assert tokenizer.special_tokens == {"<s>": 3, "[PAD]": 4, "[SEP]": 5, "[MASK]": 6}
    assert tokenizer.size == 7
    assert tokenizer.encode_batch(["b c [MASK]"])[0].tolist() == [1, 2, 0]


def test_tokenizers_that_are_not_there():
    with pytest.raises(DataError, match=r"tokenizer.path: /nowhere is no folder with a tokenizer.*tokenizer.name"):
        load_tokenizer(TokenizerSection(path="/nowhere"))
    with pytest.raises(DataError, match=r"no tokenizer is named: set tokenizer.name"):
        load_tokenizer(TokenizerSection())


def test_a_hub_tokenizer_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("nobody/nothing is not a local folder\nmore text")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(DataError, match=r"tokenizer.name: nobody/nothing cannot be loaded: .*local folder\. Check"):
        load_tokenizer(TokenizerSection(name="nobody/nothing"))


def test_training_that_cannot_work():
    with pytest.raises(DataError, match=r"tokenizer.vocab_size: 200 is too small for byte_bpe; give more than 261"):
        train_tokenizer(TEXTS, "byte_bpe", 200)
    with pytest.raises(DataError, match="no documents"):
        train_tokenizer([], "byte_bpe", 300)


@pytest.mark.parametrize(
    ("asked", "size", "padded"), [(None, 1, 128), (None, 128, 128), (None, 129, 256), (200, 129, 200)]
)
def test_padded_vocab_size(asked, size, padded):
    assert padded_vocab_size(asked, size) == padded


def test_a_vocabulary_smaller_than_the_tokenizer_is_an_error():
    with pytest.raises(DataError, match=r"model.vocab_size: 100 is smaller than the tokenizer, which has 130.*256"):
        padded_vocab_size(100, 130)
