"""The masked-token loss of a model on any text, with masks that are the same every time.

By tokens. Documents are split, masked and scored as in the evaluation of training: masks are a function of (seed,
document, position), 80% [MASK], 10% random, 10% unchanged. The loss is in nats per masked token. Models with one
tokenizer can be compared; with different tokenizers they cannot, since they are asked for different things: a model
that cuts words into more tokens sees the rest of a word whose part it guesses.

By words. Words, here runs of characters without white space, are chosen by (seed, document, position in the text), so
all models are asked for the same ones. Documents are first cut at white space into pieces of so many characters, so all
models see the same context too. Every token of a chosen word is replaced by [MASK], their losses are added up, and the
total is divided by the UTF-8 bytes of the words: bits per byte. What is still not equal: the number of masks shows each
model the length of the word in its own tokens, the tokens of a word are guessed without each other, and a tokenizer
that drops case or accents, or has an unknown token for what it cannot spell, has less to guess.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.collate import Collator, build_row
from neobert.data.rows.lanes import IntArray, Window
from neobert.data.rows.order import extend_keys, key, mask_hashes, uniforms
from neobert.data.rows.packing import Piece, best_fit, max_segments_per_row, split_documents
from neobert.data.source.text import cut_text
from neobert.disk import only_writer, write_text
from neobert.errors import DataError
from neobert.inference.jobs import TextJob, Throughput, check_absent, cut_in_groups, progress_file
from neobert.inference.packed import BATCH_TOKENS
from neobert.inference.scorer import Scorer
from neobert.inference.texts import InputRecord, Texts
from neobert.objectives.masking import MaskPolicy
from neobert.splitmix import Hashes
from neobert.types import Corruption, PackedBatch, PackedRow

_BLOCK_DOCUMENTS = 512
_BLOCK_CHARS = 1 << 22
_ENCODE_CHARS = 1_000_000
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """What is masked. Raises ValueError for numbers that make no sense."""

    mlm_probability: float = 0.15
    mask_all: bool = False
    """Always [MASK], never a random or unchanged token. By words this is always so."""

    seed: int = 0
    max_length: int | None = None
    """Tokens of a piece, [CLS] and [SEP] included; None is the model's length."""

    truncate: bool = False
    """Score the first `max_length` tokens of a document and leave out the rest, instead of cutting it in pieces. Not by
    words, whose pieces are of characters."""

    min_length: int = 5
    """Documents and tails with fewer tokens are left out."""

    whole_words: bool = False
    piece_chars: int = 1000
    """By words: characters of a piece."""

    max_documents: int | None = None
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"--mlm-probability: {self.mlm_probability} is outside (0, 1]; write a fraction such as 0.15"
            )
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(f"--max-length: {self.max_length}; write 3 or more, [CLS] and [SEP] included")
        if self.truncate and self.whole_words:
            raise ValueError("--truncate: cuts by tokens, and --whole-words is to see the same text for every model")
        for name in ("piece_chars", "batch_tokens", "max_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {value}; write a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class MlmLoss:
    """The result of one model on one input."""

    loss: float
    """Mean cross entropy in nats per masked token."""

    accuracy: float
    num_targets: int
    num_tokens: int
    num_documents: int
    num_words: int | None = None
    num_bytes: int | None = None
    """Of the masked words, UTF-8."""

    bits_per_byte: float | None = None

    def describe(self) -> str:
        """The result in a line or two."""
        lines = [
            f"loss {self.loss:.4f} nats per masked token (perplexity {math.exp(self.loss):.2f}), accuracy "
            f"{self.accuracy:.4f}; {self.num_targets:,} masked of {self.num_tokens:,} tokens, {self.num_documents:,} "
            "documents"
        ]
        if self.bits_per_byte is not None:
            lines.append(
                f"{self.bits_per_byte:.4f} bits per byte of {self.num_words:,} masked words ({self.num_bytes:,} bytes)"
            )
        return "\n".join(lines)


class _Block(NamedTuple):
    """Documents that are packed and scored together."""

    documents: NDArray[np.int64]
    """Number of each document in the input."""

    tokens: list[IntArray]
    masked: list[NDArray[np.int64]] | None
    """By words: the positions in each document that are masked."""

    num_words: int
    num_bytes: int


class _ListedMasks:
    """Hides the tokens it was built with, one draw after the other."""

    is_causal = False

    def __init__(self, mask_id: int, masked: Iterator[NDArray[np.int64]]) -> None:
        self._mask_id, self._masked = mask_id, masked

    def corrupt(
        self, tokens: IntArray, hashes: Hashes, offset: float, *, step: int
    ) -> tuple[IntArray, NDArray[np.int64]]:
        selected = next(self._masked) + 1  # after [CLS]
        corrupted = tokens.copy()
        corrupted[selected] = self._mask_id
        return corrupted, selected

    def max_targets(self, num_slots: int) -> int:
        return num_slots


def mlm_loss(scorer: Scorer, texts: Texts, settings: LossSettings) -> MlmLoss:
    """Scores an input; see the head of this module.

    Raises:
        DataError: no document is long enough, or, by words, a piece has more tokens than the model takes.
    """
    return measure_mlm_loss(scorer, texts, settings, None)[0]


def measure_mlm_loss(
    scorer: Scorer, texts: Texts, settings: LossSettings, output: Path | None
) -> tuple[MlmLoss, Throughput]:
    """The same, and how fast; with `output` the result is also written there, as one JSON object, and the same call
    continues where an earlier one was killed.

    Raises:
        JobError: the output exists, or belongs to an unfinished job with other settings.
        DataError: as of `mlm_loss`; or another process is writing this output.
    """
    with nullcontext() if output is None else only_writer(output):
        if output is not None:
            check_absent(output)
        job = _start_job(scorer, texts, settings, output)
        throughput = _score_all(scorer, job, settings)
        result = _summarize(job, settings)
        if output is not None:
            write_text(output, json.dumps(asdict(result)) + "\n")
        job.finish()
    return result, throughput


def _start_job(scorer: Scorer, texts: Texts, settings: LossSettings, output: Path | None) -> TextJob:
    zeros = dict.fromkeys(("loss", "num_correct", "num_targets", "num_documents", "num_words", "num_bytes"), 0)
    if output is None:
        return TextJob(texts, None, {}, **zeros)
    return TextJob(texts, progress_file(output), {**asdict(settings), "model": scorer.digest()}, **zeros)


def _score_all(scorer: Scorer, job: TextJob, settings: LossSettings) -> Throughput:
    limit = min(settings.max_length or scorer.max_length, scorer.max_length)
    build = _build_word_block if settings.whole_words else _build_block
    done = job.done

    def score(group: Sequence[InputRecord]) -> None:
        texts = [record.text for record in group if record.text is not None]
        block, num_numbered = build(scorer, texts, settings, limit, done["num_texts"])
        done["num_texts"] += num_numbered
        if not block.tokens:
            return
        for batch in _batches(scorer, block, settings, limit):
            sums = scorer.score(batch)
            done["loss"] += sums.loss
            done["num_correct"] += sums.num_correct
            done["num_targets"] += batch.num_targets
            done["num_tokens"] += batch.num_tokens
        done["num_words"] += block.num_words
        done["num_bytes"] += block.num_bytes
        done["num_documents"] = int(block.documents[-1]) + 1

    def groups() -> Iterator[list[InputRecord]]:
        """Until there are as many documents as asked for."""
        most = math.inf if settings.max_documents is None else settings.max_documents
        if done["num_texts"] >= most:
            return
        for group in cut_in_groups(job.records(), _BLOCK_DOCUMENTS, _BLOCK_CHARS):
            yield group
            if done["num_texts"] >= most:
                return

    return job.run("documents", groups(), score, most=settings.max_documents)


def _summarize(job: TextJob, settings: LossSettings) -> MlmLoss:
    done, by_words = job.done, settings.whole_words
    if not done["num_targets"]:
        job.finish()
        raise DataError(
            f"{job.texts.label} has no document of {settings.min_length} tokens or more to mask; check the file and "
            "--text-column, or lower --min-length"
        )
    return MlmLoss(
        loss=done["loss"] / done["num_targets"],
        accuracy=done["num_correct"] / done["num_targets"],
        num_targets=done["num_targets"],
        num_tokens=done["num_tokens"],
        num_documents=done["num_documents"],
        num_words=done["num_words"] if by_words else None,
        num_bytes=done["num_bytes"] if by_words else None,
        bits_per_byte=done["loss"] / math.log(2) / done["num_bytes"] if by_words else None,
    )


def _build_block(
    scorer: Scorer, texts: Sequence[str], settings: LossSettings, limit: int, number: int
) -> tuple[_Block, int]:
    """By tokens: the documents, numbered from `number`, and how many got a number. Those too short to use get none, as
    in the evaluation of training."""
    parts = [list(cut_text(text, _ENCODE_CHARS)) for text in texts]
    encoded = iter(scorer.tokenizer.encode_batch([part for document in parts for part in document]))
    tokens = [np.concatenate([next(encoded) for _ in document]) for document in parts]
    usable = [ids for ids in tokens if len(ids) >= max(1, settings.min_length)]
    if settings.max_documents is not None:
        usable = usable[: settings.max_documents - number]
    return _Block(np.arange(number, number + len(usable)), usable, None, 0, 0), len(usable)


def _build_word_block(
    scorer: Scorer, texts: Sequence[str], settings: LossSettings, limit: int, number: int
) -> tuple[_Block, int]:
    """By words. Every text is a document, whatever its length in tokens, so that numbers do not depend on them."""
    if settings.max_documents is not None:
        texts = texts[: settings.max_documents - number]
    documents: list[int] = []
    tokens: list[IntArray] = []
    masked: list[NDArray[np.int64]] = []
    num_words = num_bytes = 0
    for document, text in enumerate(texts, number):
        start = 0
        for piece in cut_text(text, settings.piece_chars):
            chosen = choose_words(piece, document, start, settings)
            ((ids, offsets),) = scorer.tokenizer.encode_with_offsets([piece])
            _check_piece(len(ids) + 2, limit, settings)
            start += len(piece)
            if chosen:
                documents.append(document)
                tokens.append(ids)
                masked.append(tokens_of_words(offsets, chosen))
            num_words += len(chosen)
            num_bytes += sum(len(piece[begin:end].encode()) for begin, end in chosen)
    return _Block(np.array(documents), tokens, masked, num_words, num_bytes), len(texts)


def choose_words(piece: str, document: int, start: int, settings: LossSettings) -> list[tuple[int, int]]:
    """Characters [begin, end) of the words of a piece that are masked: a function of the text, not of a tokenizer.

    Args:
        start: characters of the document before the piece.
    """
    words = [match.span() for match in _WORD.finditer(piece)]
    keys = extend_keys(extend_keys(key(settings.seed, "masks"), [0]), [document])
    drawn = uniforms(mask_hashes(keys, np.array([begin + start for begin, _ in words], dtype=np.int64)))
    return [word for word, value in zip(words, drawn) if value < settings.mlm_probability]


def tokens_of_words(offsets: NDArray[np.int64], words: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Tokens that hold a character of one of the words, ascending; a token on a border counts whole.

    >>> tokens_of_words(np.array([[0, 3], [3, 5], [5, 9], [9, 10]]), [(4, 9)]).tolist()
    [1, 2]
    """
    inside = np.zeros(len(offsets), dtype=bool)
    for begin, end in words:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    return np.flatnonzero(inside)


def _check_piece(num_tokens: int, limit: int, settings: LossSettings) -> None:
    if num_tokens > limit:
        smaller = max(1, settings.piece_chars * limit // (2 * num_tokens))
        raise DataError(
            f"--piece-chars: {settings.piece_chars} characters have {num_tokens} tokens, and the model takes {limit}; "
            f"write for example --piece-chars {smaller}, for every model that is compared"
        )


def _batches(scorer: Scorer, block: _Block, settings: LossSettings, limit: int) -> Iterator[PackedBatch]:
    lengths = np.array([len(ids) for ids in block.tokens], dtype=np.int64)
    shortest = 1 if block.masked is not None else settings.min_length
    pieces, _ = split_documents(lengths, limit, shortest, truncate=settings.truncate)
    slots = [piece.length + 2 for piece in pieces]
    if scorer.packed:
        plan = best_fit(slots, limit, max_segments_per_row(limit, packed=True))
    else:
        plan = [[item] for item in np.argsort(-np.array(slots), kind="stable").tolist()]
    window = Window(
        rows=[],
        get=lambda piece: block.tokens[piece.document][piece.start : piece.start + piece.length],
        documents=block.documents,
        sources=np.zeros(len(lengths), dtype=np.int64),
        next_state={},
    )
    first = 0
    while first < len(plan):
        longest = sum(slots[item] for item in plan[first])
        chosen = plan[first : first + scorer.batch_rows(longest, settings.batch_tokens)]
        first += len(chosen)
        rows = [_build_row(scorer, [pieces[item] for item in items], window) for items in chosen]
        order = [pieces[item] for items in chosen for item in items]
        yield _build_collator(scorer, block, settings, limit, order)(rows)


def _build_row(scorer: Scorer, pieces: Sequence[Piece], window: Window) -> PackedRow:
    return build_row(pieces, window, 0, cls_id=scorer.tokenizer.cls_id, sep_id=scorer.tokenizer.sep_id)


def _build_collator(
    scorer: Scorer, block: _Block, settings: LossSettings, limit: int, order: Sequence[Piece]
) -> Collator:
    tokenizer = scorer.tokenizer
    masks: Corruption
    if block.masked is not None:
        masks = _ListedMasks(tokenizer.mask_id, iter([block.masked[piece.document] for piece in order]))
    else:
        masks = MaskPolicy(
            probability=settings.mlm_probability,
            mask_all=settings.mask_all,
            mask_token_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            random_ids=tokenizer.random_ids,
        )
    return Collator(
        policy=masks,
        seed=settings.seed,
        draw="document",
        max_seq_length=limit,
        max_segments=max_segments_per_row(limit, packed=scorer.packed),
        pad_id=tokenizer.pad_id,
        pad_to_multiple_of=8,
    )
