"""The tokenizer: loaded from the hub or a folder, or trained, and used through one narrow wrapper.

Special tokens enter a sequence only where this package puts them: documents are encoded without them, and text that
spells one, say `[MASK]` in a page about BERT, is tokenised as ordinary text.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from neobert.config.schema import TokenizerSection
from neobert.data.rows.lanes import IntArray
from neobert.data.tokenizer_file import FILE, load_as_written
from neobert.errors import DataError

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

    Args:
        note: What transformers would have made of it instead of what its tokenizer.json says.
        rebuilt: That other tokenizer.
        added: Ids of special tokens that it lacked.

    Raises:
        DataError: it lacks one of them, or tokenises by chance.
    """

    def __init__(
        self,
        hf: Any,
        *,
        note: str | None = None,
        rebuilt: tokenizers.Tokenizer | None = None,
        added: frozenset[int] = frozenset(),
    ) -> None:
        missing = [name for name in REQUIRED if getattr(hf, name) is None]
        if missing:
            raise DataError(f"the tokenizer has no {', '.join(missing)}")
        self._hf = hf
        self._backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
        if isinstance(self._backend.model, models.BPE) and self._backend.model.dropout:
            raise DataError(
                f"the tokenizer has dropout ({self._backend.model.dropout:g}): the same text would become other tokens "
                f"each time, and no run could resume; write null for model.dropout in its {FILE}"
            )
        self.digest: str = _digest(self._backend)
        """Of the canonical tokenizer.json: equal digests tokenise equally."""
        self.note = note
        self.added = added
        self._source = str(hf.name_or_path)
        self._rebuilt_digest = None if rebuilt is None else _digest(rebuilt)
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
        self.longest: int = hf.model_max_length
        """Tokens of the longest text that it is meant for, special tokens included; a huge number where none is."""
        self.pair_separators: int = _count_separators(self._backend, self.sep_id)
        """[SEP] tokens between the two texts of a pair: 1, or 2 for RoBERTa."""
        self.random_ids: IntArray = np.setdiff1d(np.array(ids, dtype=np.int32), np.array(self.special_ids, np.int32))
        """Ids that may replace a masked token: all but the special ones."""

    def is_source_of(self, digest: str) -> bool:
        """Whether a run that has a tokenizer of this digest can have had it from here.

        Versions before tokenizer.json counted trained with what transformers makes of it; their runs keep that.
        """
        return digest in (self.digest, self._rebuilt_digest)

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """Token ids of whole texts, without special tokens; one call uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[IntArray, NDArray[np.int64]]]:
        """Token ids as `encode_batch` gives them, and for each token the characters [begin, end) it covers."""
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
        return {self.spell(i): i for i in self.special_ids}

    @property
    def label(self) -> str:
        """The tokenizer as text: with the folder or name it was loaded from, where there is one."""
        return f"the tokenizer {self._source}" if self._source else "the tokenizer"

    def spell(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return str(self._backend.id_to_token(token_id))

    @property
    def model_name(self) -> str:
        """`BPE`, `WordPiece`, ..."""
        return type(self._backend.model).__name__


def _count_separators(backend: tokenizers.Tokenizer, sep_id: int) -> int:
    """As its own template puts them; 1 where it has none for pairs."""
    return max(1, backend.encode("a", "a").ids.count(sep_id) - 1)


def _digest(backend: tokenizers.Tokenizer) -> str:
    """Of what tokenises; leaves the backend without truncation and padding, which are no part of it."""
    backend.no_truncation()
    backend.no_padding()
    canonical = json.dumps(json.loads(backend.to_str()), sort_keys=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def check_mask_token(tokenizer: Tokenizer) -> None:
    """Raises when text holds the mask token: then a word of it looks like a mask that hides nothing.

    Raises:
        DataError: the mask is another special token too, or a word of ordinary text.
    """
    same = [name for name, number in tokenizer.roles.items() if name != "mask" and number == tokenizer.mask_id]
    token = tokenizer.spell(tokenizer.mask_id)
    if same:
        both = " and ".join(f"{name}_token" for name in same)
        raise DataError(
            f"mask_token of {tokenizer.label} is {token!r}, which is its {both} too: such tokens would look like masks "
            f"that hide nothing; {_OWN_MASK}"
        )
    word = token.strip("\u2581\u0120#")  # What marks a start or a continuation.
    if word.isalnum() or len(word) == 1:
        (ids,) = tokenizer.encode_batch([word])
        if tokenizer.mask_id in ids:
            raise DataError(
                f"mask_token of {tokenizer.label} is {token!r}, which is a word of ordinary text; {_OWN_MASK}"
            )


_OWN_MASK = (
    "name a token of its own in tokenizer_config.json, one that tokenizer.json has, or set "
    "tokenizer.allow_special_token_rewrite: true for a fresh run to add one"
)


def limit_threads(num_threads: int | None) -> None:
    """Sets how many threads tokenise; None takes all cores.

    The tokenizer's thread pool reads this once, when the process tokenises for the first time: call it before.
    """
    if num_threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(num_threads)


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
    if section.path is not None and not (Path(section.path) / FILE).is_file():
        raise DataError(f"{where} is no folder with a tokenizer ({FILE} is missing); {_write_file(Path(section.path))}")
    try:
        loaded = load_as_written(
            str(section.path or section.name),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{where} cannot be loaded: {_first_line(error)}. Check the spelling and the connection, or save it to a "
            "folder and name that in tokenizer.path"
        ) from error
    hf = loaded.hf
    if not hf.is_fast:
        raise DataError(f"{where} has no fast implementation ({FILE}); convert it, or choose another one")
    missing = [name for name in REQUIRED if getattr(hf, name) is None]
    if missing and not section.allow_special_token_rewrite:
        named = [
            f"{name} ({loaded.dropped[name]!r} is named, and {FILE} does not have it)"
            if name in loaded.dropped
            else name
            for name in missing
        ]
        raise DataError(
            f"{where} has no {', '.join(named)}; choose a tokenizer made for masked language modelling, or set "
            "tokenizer.allow_special_token_rewrite: true to add them"
        )
    if "mask_token" not in missing and section.allow_special_token_rewrite and _shares_mask(hf):
        missing.append("mask_token")
    known = set(hf.get_vocab().values())
    if missing:
        hf.add_special_tokens({name: loaded.dropped.get(name, SPECIAL_TOKENS[name]) for name in missing})
        _add_template(hf)
    return Tokenizer(
        hf,
        note=None if loaded.note is None else f"{where}: {loaded.note}",
        rebuilt=loaded.rebuilt,
        added=frozenset(hf.get_vocab().values()) - known,
    )


def _shares_mask(hf: Any) -> bool:
    return any(hf.mask_token == token for name, token in hf.special_tokens_map.items() if name != "mask_token")


def _write_file(folder: Path) -> str:
    """What to do about a folder without tokenizer.json."""
    older = [name for name in _OLDER_FILES if (folder / name).is_file()]
    if not older:
        return "correct tokenizer.path, or use tokenizer.name for one from the hub"
    return (
        f"it has {', '.join(older)}: write the file with "
        f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})` of transformers"
    )


_OLDER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""What transformers can make a tokenizer.json of."""


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
        raise DataError(
            "tokenizer.train: true, but there are no documents to train on; check dataset.path, and that "
            "dataset.eval_samples leaves some"
        )
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
