"""New pieces for a tokenizer, learned from text, beside old ones that stay as they are.

The words of the text, cut as the tokenizer cuts them, are sequences of old tokens. The two neighbours that occur
together most often become one piece, again and again: each new piece saves more tokens of the text than any other pair
of neighbours would (the merges of byte-pair encoding, Sennrich et al., arXiv 1508.07909, which begin at the vocabulary
that is there instead of at characters).

| model | what is written | so a word is cut |
|---|---|---|
| BPE | the pieces, and their merges after all old ones | by the old merges, then by the new ones |
| WordPiece | the pieces | at the longest pieces from the left |
| Unigram | the pieces, with log(count / tokens) | at the likeliest pieces; no piece is less likely than its parts |

WordPiece and Unigram need no piece that only led to a longer one: those that no word of the text has are left out.
"""

import heapq
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.data.tokenizer_file import FILE
from neobert.disk import write_text
from neobert.errors import DataError

MIN_COUNT = 5
"""Times that a new piece occurs in the text at least: rows of rarer ones would hardly learn."""

Pair = tuple[str, str]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD = re.compile(r"\S+")


class NewPiece(NamedTuple):
    """A token that is added."""

    text: str
    """As the vocabulary spells it (`##ing`, `Ġthe`)."""

    parts: tuple[int, ...]
    """Ids of the old tokens that it was made of, from left to right."""

    uses: int
    """In the words of the text, under all new pieces; of one that only leads to longer ones 0."""

    score: float = 0.0
    """Of Unigram: its log-probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewPieces:
    """What was learned."""

    pieces: tuple[NewPiece, ...]
    """In the order of their ids, which follow the last old one."""

    merges: tuple[Pair, ...]
    """Neighbours that became one, in order."""

    num_tokens: int
    """Of the text, under the old tokens."""

    num_saved: int
    """Of these, how many fewer there are with the new ones, as the merges count them."""


def learn_pieces(tokenizer: Tokenizer, texts: Iterable[str], num_pieces: int) -> NewPieces:
    """The `num_pieces` pieces that save most tokens of the texts; fewer where no more occur `MIN_COUNT` times.

    Raises:
        DataError: the tokenizer cannot be extended, or the texts give no piece.
    """
    check_extensible(tokenizer)
    definition = tokenizer.definition
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    counts = _count_words(backend, texts)
    if not counts:
        raise DataError("--text: there is no word in it to learn new tokens from; name other text")
    merging = _Merging(backend, _JOIN[tokenizer.model_name], _read_prefix(definition), _find_frozen(tokenizer))
    needs_all = tokenizer.model_name == "BPE"
    scores = _read_scores(definition) if tokenizer.model_name == "Unigram" else None
    merging.add_words(counts, scores)
    merging.run(num_pieces, needs_all=needs_all)
    new = [text for text in merging.parts if text not in merging.old]
    pieces = tuple(
        NewPiece(text, merging.parts[text], merging.uses[text], 0.0 if scores is None else merging.scores[text])
        for text in new
        if needs_all or merging.uses[text] >= MIN_COUNT
    )
    if not pieces:
        raise DataError(
            f"--text: no two tokens within its {sum(counts.values()):,} words are neighbours {MIN_COUNT} times, so "
            "there is no token to add; name more text, or text that is unlike what the tokenizer knows"
        )
    return NewPieces(
        pieces=pieces,
        merges=tuple(merging.merges),
        num_tokens=merging.num_tokens,
        num_saved=merging.num_saved,
    )


def check_extensible(tokenizer: Tokenizer) -> None:
    """Raises where pieces cannot be added to a tokenizer so that it is right.

    Raises:
        DataError: with the reason.
    """
    definition, kind = tokenizer.definition, tokenizer.model_name
    reason = None
    if kind not in _JOIN:
        reason = f"its model is {kind}; pieces are added to {', '.join(_JOIN)}"
    elif definition["pre_tokenizer"] is None:
        reason = "it has no pre-tokenizer, which cuts text into words, so that pieces would reach over several words"
    elif kind == "BPE" and (_read_prefix(definition) or definition["model"].get("end_of_word_suffix")):
        reason = "its BPE marks the inside or the end of words in its pieces, which byte-level and metaspace BPE do not"
    elif kind == "Unigram" and tokenizer.size > len(definition["model"]["vocab"]):
        reason = "ids of added tokens follow those of its Unigram vocabulary, where the new ones would have to be"
    if reason is not None:
        raise DataError(f"{tokenizer.label} cannot be extended: {reason}; train on it as it is, with neobert pretrain")


def _join_wordpiece(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


def _join_plain(left: str, right: str, prefix: str) -> str:
    return left + right


_JOIN: dict[str, Callable[[str, str, str], str]] = {
    "WordPiece": _join_wordpiece,
    "BPE": _join_plain,
    "Unigram": _join_plain,
}
"""Models that can be extended -> how two pieces are spelled as one."""


def _read_prefix(definition: Mapping[str, Any]) -> str:
    return definition["model"].get("continuing_subword_prefix") or ""


def _read_scores(definition: Mapping[str, Any]) -> dict[str, float]:
    return {text: float(score) for text, score in definition["model"]["vocab"]}


def _find_frozen(tokenizer: Tokenizer) -> set[str]:
    """Tokens that are part of no other: special ones, and bytes that stand alone."""
    bytes_alone = {text for text in tokenizer.vocabulary if _BYTE.fullmatch(text)}
    unknown = tokenizer.definition["model"].get("unk_token")
    return {*tokenizer.special_tokens, *bytes_alone, *([unknown] if isinstance(unknown, str) else [])}


def _count_words(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return counts


@dataclass(slots=True)
class _Merging:
    """Words as sequences of pieces, while neighbours become one."""

    backend: tokenizers.Tokenizer
    join: Callable[[str, str, str], str]
    prefix: str
    frozen: set[str]
    """Pieces that join no other."""

    words: list[list[str]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Old ids of every piece that was met."""

    old: frozenset[str] = frozenset()
    """The whole old vocabulary."""

    uses: Counter[str] = field(default_factory=Counter)
    pairs: Counter[Pair] = field(default_factory=Counter)
    where: dict[Pair, set[int]] = field(default_factory=dict)
    """Words that have a pair, or had it."""

    queue: list[tuple[int, Pair]] = field(default_factory=list)
    """Pairs with minus their counts; entries of an older count are left in it and skipped."""

    merges: list[Pair] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    """Of Unigram: log-probabilities."""

    num_tokens: int = 0
    num_saved: int = 0

    def add_words(self, counts: Mapping[str, int], scores: Mapping[str, float] | None) -> None:
        """Cuts every word into old tokens."""
        self.old = frozenset(self.backend.get_vocab(with_added_tokens=True))
        self.scores = dict(scores or {})
        for word, count in sorted(counts.items()):
            tokens = self.backend.model.tokenize(word)
            for token in tokens:
                self.parts[token.value] = (token.id,)
                if self.backend.token_to_id(token.value) != token.id:  # What the vocabulary cannot spell.
                    self.frozen.add(token.value)
            self.words.append([token.value for token in tokens])
            self.counts.append(count)
            self.num_tokens += count * len(tokens)
            self.uses.update({text: count * times for text, times in Counter(self.words[-1]).items()})
        for number in range(len(self.words)):
            self._count_pairs(number, 1)
        self.queue = [(-count, pair) for pair, count in self.pairs.items()]
        heapq.heapify(self.queue)

    def _count_pairs(self, number: int, sign: int) -> set[Pair]:
        word, changed = self.words[number], set()
        for pair in pairwise(word):
            if self.frozen.isdisjoint(pair):
                self.pairs[pair] += sign * self.counts[number]
                self.where.setdefault(pair, set()).add(number)
                changed.add(pair)
        return changed

    def run(self, num_pieces: int, *, needs_all: bool) -> None:
        """Merges until there are so many new pieces: all of them, or those that a word has."""
        live: set[str] = set()
        while len(live) < num_pieces and self.queue:
            negative, pair = heapq.heappop(self.queue)
            if self.pairs[pair] != -negative:
                continue
            if -negative < MIN_COUNT:
                return
            text = self.join(*pair, self.prefix)
            if text in self.old or not self._is_likelier(text, pair):
                continue
            self._merge(pair, text)
            touched = {text} if needs_all else {text, *pair} - self.old
            live -= touched
            live |= {piece for piece in touched if needs_all or self.uses[piece] >= MIN_COUNT}

    def _is_likelier(self, text: str, pair: Pair) -> bool:
        if not self.scores:
            return True
        score = math.log(self.pairs[pair] / self.num_tokens)
        if score <= sum(self.scores[part] for part in pair):
            return False
        self.scores.setdefault(text, score)
        return True

    def _merge(self, pair: Pair, text: str) -> None:
        self.merges.append(pair)
        self.parts.setdefault(text, self.parts[pair[0]] + self.parts[pair[1]])
        changed: set[Pair] = set()
        for number in sorted(self.where.pop(pair)):
            changed |= self._count_pairs(number, -1)
            times = self._replace(self.words[number], pair, text) * self.counts[number]
            self.uses.update({text: times})
            self.uses.subtract({pair[0]: times})
            self.uses.subtract({pair[1]: times})
            self.num_saved += times
            changed |= self._count_pairs(number, 1)
        for other in changed - {pair}:
            heapq.heappush(self.queue, (-self.pairs[other], other))

    @staticmethod
    def _replace(word: list[str], pair: Pair, text: str) -> int:
        """Makes every such pair of a word one, from the left; how many there were."""
        index, found = 0, 0
        while index < len(word) - 1:
            if (word[index], word[index + 1]) == pair:
                word[index : index + 2] = [text]
                found += 1
            index += 1
        return found


# ---- the extended tokenizer ----


def write_extended(tokenizer: Tokenizer, new: NewPieces, folder: Path) -> Tokenizer:
    """Writes the tokenizer with the new pieces to `folder`, and loads it.

    Raises:
        DataError: it would not be the old one for all that was there.
    """
    tokenizer.save(folder)
    definition = extend_definition(tokenizer, new)
    write_text(folder / FILE, json.dumps(definition, ensure_ascii=False, indent=1) + "\n")
    extended = load_tokenizer(TokenizerSection(path=str(folder)))
    check_extended(tokenizer, extended, new)
    return extended


def extend_definition(tokenizer: Tokenizer, new: NewPieces) -> dict[str, Any]:
    """The content of tokenizer.json with the new pieces after the last old id."""
    definition = tokenizer.definition
    model = definition["model"]
    if tokenizer.model_name == "Unigram":
        model["vocab"] += [[piece.text, piece.score] for piece in new.pieces]
        return definition
    # An added token that the model does not have would get another id, since the vocabulary before it grows.
    model["vocab"] |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    model["vocab"] |= {piece.text: tokenizer.size + number for number, piece in enumerate(new.pieces)}
    if tokenizer.model_name == "BPE":
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in new.merges]
    return definition


def check_extended(old: Tokenizer, extended: Tokenizer, new: NewPieces) -> None:
    """Raises where the extended tokenizer is not the old one with more tokens.

    Raises:
        DataError: an old or a special token has another id, or text that spells a special token would become one.
    """
    expected = old.vocabulary | {piece.text: old.size + number for number, piece in enumerate(new.pieces)}
    problems = [
        ("an old token would have another id", extended.vocabulary != expected),
        ("special tokens would change", (extended.special_tokens, extended.roles) != (old.special_tokens, old.roles)),
        ("text that spells a special token would become one", _spelled(extended) != _spelled(old)),
    ]
    for problem, is_there in problems:
        if is_there:
            raise DataError(f"{old.label} cannot be extended: {problem}; train on it as it is, with neobert pretrain")


def _spelled(tokenizer: Tokenizer) -> list[set[int]]:
    """Special tokens that texts which spell one become."""
    encoded = tokenizer.encode_batch(sorted(tokenizer.special_tokens))
    return [set(ids.tolist()) & set(tokenizer.special_ids) for ids in encoded]


def check_round_trip(old: Tokenizer, extended: Tokenizer, texts: Sequence[str]) -> None:
    """Raises when tokens of the extended tokenizer spell another text than the old ones do.

    Raises:
        DataError: with the first piece of text that differs.
    """
    for text, before, after in zip(texts, old.encode_batch(texts), extended.encode_batch(texts)):
        if old.decode(before) != extended.decode(after):
            raise DataError(
                f"{old.label} cannot be extended: {text[:60]!r} would be another text after encoding and decoding; "
                "train on it as it is, with neobert pretrain"
            )


# ---- fertility ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Fertility:
    """How finely a tokenizer cuts a text."""

    num_tokens: int
    num_words: int
    """Runs of characters without white space."""

    @property
    def tokens_per_word(self) -> float:
        return self.num_tokens / max(1, self.num_words)


def measure_fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> Fertility:
    """Of whole texts, without special tokens."""
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return Fertility(num_tokens=num_tokens, num_words=sum(len(_WORD.findall(text)) for text in texts))
