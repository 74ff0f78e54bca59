"""tokenizer.json is the truth: whatever class tokenizer_config.json names, text becomes the ids that the file gives."""

import json
from functools import cache
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import SPECIAL_TOKENS, check_mask_token, load_tokenizer
from neobert.errors import DataError
from neobert.export.tokenizer_files import check_class, save_tokenizer

PROBE = "Harbor 1234  double  space\n\nﬁne ½ 日本語 😀 Café [MASK]"
TEXTS = [f"{PROBE} the cat sat on the mat, 2024 times; it's fine"] * 20
SPECIAL = list(SPECIAL_TOKENS.values())
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_bpe(pre_tokenizer=BYTES, normalizer=None):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def wordpiece(normalizer):
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.decoder = normalizer, decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def unigram(normalizer=None):
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def with_template():
    backend = byte_bpe()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def with_more_tokens():
    backend = byte_bpe()
    backend.add_special_tokens(["<|endoftext|>", "<s>"])
    backend.add_tokens(["Harbor"])
    return backend


KINDS = {
    "bytes": byte_bpe,
    "digits": lambda: byte_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
    "nfkc": lambda: byte_bpe(normalizer=normalizers.NFKC()),
    "template": with_template,
    "more tokens": with_more_tokens,
    "wordpiece": lambda: wordpiece(normalizers.BertNormalizer(lowercase=True)),
    "cased wordpiece": lambda: wordpiece(normalizers.BertNormalizer(lowercase=False)),
    "nfkc wordpiece": lambda: wordpiece(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "unigram": unigram,
    "nfkc unigram": lambda: unigram(normalizers.NFKC()),
}
CLASSES = ("GPT2TokenizerFast", "BertTokenizerFast", "XLMRobertaTokenizer")
MORE_CLASSES = (
    None,
    "PreTrainedTokenizerFast",
    "RobertaTokenizer",
    "DistilBertTokenizerFast",
    "AlbertTokenizer",
    "MPNetTokenizer",
    "LlamaTokenizerFast",
    "T5TokenizerFast",
    "DebertaV2Tokenizer",
    "Qwen2Tokenizer",
    "NoSuchTokenizer",
)


@cache
def train(kind):
    return KINDS[kind]().to_str()


def write(folder: Path, backend, class_name=None, **config) -> str:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {} if class_name is None else {"tokenizer_class": class_name}
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS | named | config))
    return str(folder)


def load(path, **settings):
    return load_tokenizer(TokenizerSection(path=str(path), **settings))


@pytest.mark.parametrize("class_name", [*CLASSES, *(pytest.param(x, marks=pytest.mark.full) for x in MORE_CLASSES)])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file_in_training_and_in_an_export(tmp_path, kind, class_name):
    backend = Backend.from_str(train(kind))
    path = write(tmp_path / "t", backend, class_name)
    backend.encode_special_tokens = True
    wanted = backend.encode(PROBE, add_special_tokens=False).ids
    tokenizer = load(path)
    assert tokenizer.encode_batch([PROBE])[0].tolist() == wanted
    assert tokenizer.size == backend.get_vocab_size()
    tokenizer.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert (saved.digest, saved.note) == (tokenizer.digest, None)
    save_tokenizer(Path(path), tmp_path / "out", max_length=64)
    check_class(tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    backend.encode_special_tokens = False
    text = PROBE.removesuffix(" [MASK]")
    wanted = [2, *backend.encode(text, add_special_tokens=False).ids, 4, 3]
    assert plain(f"{text} [MASK]").input_ids == wanted


def test_the_note_names_what_would_have_been_different(tmp_path):
    backend = Backend.from_str(train("nfkc"))
    path = write(tmp_path / "t", backend, "GPT2TokenizerFast")
    note = load(path).note
    assert note.startswith(f"tokenizer.path: {path}: tokenizer_config.json names GPT2TokenizerFast, of which transform")
    assert f"transformers {transformers.__version__} makes another tokenizer: another normaliser; " in note
    assert f"'<|endoftext|>' added as token {backend.get_vocab_size()}; 'ﬁne' is " in note
    assert ". tokenizer.json is used as it is" in note


def test_a_class_that_cannot_hold_the_model_is_named(tmp_path):
    note = load(write(tmp_path / "t", Backend.from_str(train("bytes")), "XLMRobertaTokenizer")).note
    assert "tokenizer_config.json names XLMRobertaTokenizer, which cannot hold it (" in note


@pytest.mark.parametrize(("kind", "class_name"), [("wordpiece", "BertTokenizerFast"), ("bytes", None)])
def test_a_class_that_matches_the_file_is_kept(tmp_path, kind, class_name):
    path = write(tmp_path / "t", Backend.from_str(train(kind)), class_name)
    loaded = load(path)
    assert loaded.note is None
    assert loaded.digest != load(write(tmp_path / "u", wordpiece(normalizers.NFKC()))).digest
    save_tokenizer(Path(path), tmp_path / "out", max_length=64)
    check_class(tmp_path / "out")
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == ("BertTokenizer" if class_name else "PreTrainedTokenizerFast")


def test_an_export_says_that_it_took_another_class(tmp_path):
    path = write(tmp_path / "t", Backend.from_str(train("wordpiece")), "BertTokenizer")
    save_tokenizer(Path(path), tmp_path / "out", max_length=64)
    config = tmp_path / "out" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"BertTokenizer"', '"GPT2Tokenizer"'))
    (change,) = check_class(tmp_path / "out")
    assert change.startswith(
        "the tokenizer's class is PreTrainedTokenizerFast, not GPT2Tokenizer: tokenizer_config.json"
    )


def test_a_special_token_that_the_file_does_not_have_is_an_error_or_added(tmp_path):
    backend = byte_bpe()
    path = write(tmp_path / "t", backend, mask_token="<mask>")
    with pytest.raises(
        DataError, match=r"has no mask_token \('<mask>' is named, and tokenizer.json does not have it\)"
    ):
        load(path)
    tokenizer = load(path, allow_special_token_rewrite=True)
    assert tokenizer.special_tokens["<mask>"] == tokenizer.mask_id == backend.get_vocab_size()


def test_a_run_of_an_earlier_version_had_its_tokenizer_from_here(tmp_path):
    """It trained with what transformers makes of the file, and its checkpoints hold that."""
    path = write(tmp_path / "t", Backend.from_str(train("digits")), "GPT2Tokenizer")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "checkpoint")
    before, now = load(tmp_path / "checkpoint"), load(path)
    assert before.note is None
    assert before.digest != now.digest
    assert now.is_source_of(before.digest)
    assert not before.is_source_of(now.digest)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), GPT2Tokenizer)


@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer"])
def test_text_that_spells_a_named_token_is_text_where_the_file_does_not_call_it_special(tmp_path, class_name):
    content = json.loads(train("nfkc"))
    for token in content["added_tokens"]:
        token["special"] = False
    tokenizer = load(write(tmp_path / "t", Backend.from_str(json.dumps(content)), class_name))
    assert tokenizer.mask_id not in tokenizer.encode_batch(["a [MASK]"])[0]
    assert (tokenizer.note is None) == (class_name is None)


def test_a_tokenizer_with_dropout_is_refused(tmp_path):
    content = json.loads(train("bytes"))
    content["model"]["dropout"] = 0.1
    with pytest.raises(
        DataError, match=r"the tokenizer has dropout \(0.1\): .* write null for model.dropout in its tok"
    ):
        load(write(tmp_path / "t", Backend.from_str(json.dumps(content))))


def test_a_tokenizer_config_that_is_no_json_is_named(tmp_path):
    path = Path(write(tmp_path / "t", Backend.from_str(train("bytes"))))
    (path / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(DataError, match=r"tokenizer_config.json is no JSON object \(.*\); correct it"):
        load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = write(tmp_path / "t", Backend.from_str(train("bytes")))
    (tmp_path / "t" / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(
        DataError, match=rf"tokenizer.path: {path} cannot be loaded: .*tokenizer.json cannot be read \("
    ):
        load(path)


def test_a_folder_with_an_older_vocabulary_alone_says_how_to_write_the_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "b"]))
    with pytest.raises(
        DataError, match=r"\(tokenizer.json is missing\); it has vocab.txt: write the file with `AutoTok"
    ):
        load(tmp_path)


@pytest.mark.parametrize("role", ["unk", "pad", "cls", "sep"])
def test_a_mask_that_is_another_special_token_is_an_error_that_names_both(tmp_path, role):
    name = f"{role}_token"
    path = write(tmp_path / "t", Backend.from_str(train("bytes")), mask_token=SPECIAL_TOKENS[name])
    tokenizer = load(path)
    with pytest.raises(DataError) as caught:
        check_mask_token(tokenizer)
    token = SPECIAL_TOKENS[name]
    assert f"mask_token of the tokenizer {path} is {token!r}, which is its {name} too" in str(caught.value)
    assert "tokenizer.allow_special_token_rewrite: true" in str(caught.value)
    rewritten = load(path, allow_special_token_rewrite=True)
    check_mask_token(rewritten)
    assert rewritten.special_tokens["[MASK]"] == rewritten.mask_id


@pytest.mark.parametrize(("word", "kind"), [("the", "wordpiece"), ("2", "bytes"), (",", "wordpiece")])
def test_a_mask_that_is_a_word_of_text_is_an_error(tmp_path, word, kind):
    tokenizer = load(write(tmp_path / "t", Backend.from_str(train(kind)), mask_token=word))
    with pytest.raises(DataError, match="which is a word of ordinary text"):
        check_mask_token(tokenizer)


@pytest.mark.parametrize("shared", [{"pad_token": "[SEP]"}, {"cls_token": "[SEP]"}, {"pad_token": "[UNK]"}])
def test_other_special_tokens_may_be_the_same(tmp_path, shared):
    check_mask_token(load(write(tmp_path / "t", Backend.from_str(train("bytes")), **shared)))
