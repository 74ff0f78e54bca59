"""The tokenizer: loaded from the hub or a folder, or trained, and used through one narrow wrapper.

Special tokens enter a sequence only where this package puts them: documents are encoded without them, and text that
spells one, say `[MASK]` in a page about BERT, is tokenised as ordinary text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neobert.config.schema import TokenizerSection
from neobert.data.errors import DataError
from neobert.data.lanes import IntArray

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""Special tokens of a trained tokenizer, in the order of their ids."""

REQUIRED = ("pad_token", "cls_token", "sep_token", "mask_token")

DEFAULT_VOCAB_SIZE = 32768
VOCAB_MULTIPLE = 128


class Tokenizer:
    """A Hugging Face fast tokenizer that has [CLS], [SEP], [MASK] and padding tokens.

    Raises:
        DataError: it lacks one of them.
    """

    def __init__(self, hf: Any) -> None:
        missing = [name for name in REQUIRED if getattr(hf, name) is None]
        if missing:
            raise DataError(f"the tokenizer has no {', '.join(missing)}")
        self._hf = hf
        self._backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        self._backend.encode_special_tokens = True
        self.cls_id: int = hf.cls_token_id
        self.sep_id: int = hf.sep_token_id
        self.mask_id: int = hf.mask_token_id
        self.pad_id: int = hf.pad_token_id
        self.unk_id: int | None = hf.unk_token_id
        self.special_ids: tuple[int, ...] = tuple(sorted(set(hf.all_special_ids)))
        ids = sorted(set(self._backend.get_vocab(with_added_tokens=True).values()))
        self.size: int = max(len(hf), ids[-1] + 1)
        """Smallest vocabulary that holds every id."""
        self.random_ids: IntArray = np.setdiff1d(np.array(ids, dtype=np.int32), np.array(self.special_ids, np.int32))
        """Ids that may stand in for a masked token: all but the special ones."""
        self.digest: str = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
        """Of the canonical tokenizer.json: equal digests tokenise equally."""

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """Token ids of whole texts, without special tokens; one call uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[IntArray, NDArray[np.int64]]]:
        """Token ids as `encode_batch` gives them, and for each token the characters [begin, end) it stands for."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_token(self, token_id: int) -> str:
        """The text of one token; a continuation keeps its mark (`##ing`), a leading space is kept."""
        return self.decode([token_id])

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer` reads."""
        self._hf.save_pretrained(str(folder))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, as the vocabulary spells it (`##ing`, `Ġthe`), and its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def definition(self) -> dict[str, Any]:
        """The content of tokenizer.json: normalizer, pre-tokenizer, model and the rest."""
        return json.loads(self._backend.to_str())

    @property
    def roles(self) -> dict[str, int]:
        """Ids by what they are for: cls, sep, mask, pad, and unk where there is one."""
        ids = {"cls": self.cls_id, "sep": self.sep_id, "mask": self.mask_id, "pad": self.pad_id}
        return ids if self.unk_id is None else ids | {"unk": self.unk_id}

    @property
    def special_tokens(self) -> dict[str, int]:
        """The text and id of every special token."""
        return {str(self._backend.id_to_token(i)): i for i in self.special_ids}

    @property
    def model_name(self) -> str:
        """`BPE`, `WordPiece`, ..."""
        return type(self._backend.model).__name__


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, else of `tokenizer.name`.

    Raises:
        DataError: it cannot be loaded, has no fast implementation, or lacks special tokens.
    """
    if section.path is None and section.name is None:
        raise DataError(
            "no tokenizer is named: set tokenizer.name (hub) or tokenizer.path (folder), or tokenizer.train: true"
        )
    where = f"tokenizer.name: {section.name}" if section.path is None else f"tokenizer.path: {section.path}"
    if section.path is not None and not (Path(section.path) / "tokenizer.json").is_file():
        raise DataError(
            f"{where} is no folder with a tokenizer (tokenizer.json is missing); correct tokenizer.path, or use "
            "tokenizer.name for one from the hub"
        )
    try:
        hf = AutoTokenizer.from_pretrained(
            section.path or section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{where} cannot be loaded: {_first_line(error)}. Check the spelling and the connection, or save it to a "
            "folder and name that in tokenizer.path"
        ) from error
    if not hf.is_fast:
        raise DataError(f"{where} has no fast implementation (tokenizer.json); convert it, or choose another one")
    missing = [name for name in REQUIRED if getattr(hf, name) is None]
    if missing and not section.allow_special_token_rewrite:
        raise DataError(
            f"{where} has no {', '.join(missing)}; choose a tokenizer made for masked language modelling, or set "
            "tokenizer.allow_special_token_rewrite: true to add them"
        )
    if missing:
        hf.add_special_tokens({name: SPECIAL_TOKENS[name] for name in missing})
        _add_template(hf)
    return Tokenizer(hf)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _add_template(hf: Any) -> None:
    """`[CLS] text [SEP]` for users who encode with the saved tokenizer itself."""
    cls, sep = hf.cls_token, hf.sep_token
    hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, hf.cls_token_id), (sep, hf.sep_token_id)],
    )


def train_tokenizer(
    texts: Iterable[str], algorithm: Literal["byte_bpe", "wordpiece"], vocab_size: int | None = None
) -> Tokenizer:
    """Trains a tokenizer on texts; memory grows with the number of different words, not with the corpus.

    `byte_bpe` keeps every byte and gives the same file for the same texts. `wordpiece` lowers the case as BERT does;
    its training breaks ties by chance, so its vocabulary is sorted, and a run reloads it instead of training again.

    Raises:
        DataError: `vocab_size` cannot hold the alphabet, or there are no texts.
    """
    train = {"byte_bpe": _train_byte_bpe, "wordpiece": _train_wordpiece}[algorithm]
    size = vocab_size or DEFAULT_VOCAB_SIZE
    smallest = len(SPECIAL_TOKENS) + (256 if algorithm == "byte_bpe" else 1)
    if size <= smallest:
        raise DataError(f"tokenizer.vocab_size: {size} is too small for {algorithm}; give more than {smallest}")
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise DataError("tokenizer.train: true, but the training split has no documents; check dataset.path")
    backend = train(_chain(first, iterator), size)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **SPECIAL_TOKENS
    )
    _add_template(hf)
    return Tokenizer(hf)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _train_byte_bpe(texts: Iterator[str], size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_wordpiece(texts: Iterator[str], size: int) -> tokenizers.Tokenizer:
    special = list(SPECIAL_TOKENS.values())
    trained = _wordpiece(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    trained.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    words = sorted(set(trained.get_vocab(with_added_tokens=False)) - set(special))
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    return _wordpiece(models.WordPiece(vocab=vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))


def _wordpiece(model: models.WordPiece) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint records about its tokenizer (tokenizer_info.json)."""
    return {
        "model": tokenizer.model_name,
        "vocab_size": tokenizer.size,
        "pad_token_id": tokenizer.pad_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
        "mask_token_id": tokenizer.mask_id,
        "unk_token_id": tokenizer.unk_id,
        "special_tokens": tokenizer.special_tokens,
        "digest": tokenizer.digest,
    }


def padded_vocab_size(config_vocab_size: int | None, tokenizer_size: int) -> int:
    """Rows of the embedding: `model.vocab_size`, or the tokenizer's size rounded up to a multiple of 128.

    Raises:
        DataError: `model.vocab_size` is smaller than the tokenizer.
    """
    if config_vocab_size is None:
        return -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if config_vocab_size < tokenizer_size:
        raise DataError(
            f"model.vocab_size: {config_vocab_size} is smaller than the tokenizer, which has {tokenizer_size} tokens; "
            f"leave it null for {padded_vocab_size(None, tokenizer_size)}, or give a larger number"
        )
    return config_vocab_size
