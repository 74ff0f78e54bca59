"""Hard negatives: for every anchor, texts that an encoder takes for its positive although they are not.

All anchors and all different positives of a set are embedded, and every anchor is compared with every positive. Its
negatives are the most similar ones, without

- its own positives, and texts that are equal to the anchor,
- the first `skip` of the rest: the very nearest ones are often answers that nobody marked,
- those whose similarity is above that of the positive, less `margin` (Moreira et al., arXiv 2407.15831, name this and
  the fraction of the positive's similarity as the filters that work).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neobert.cli import explicit_values
from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.evaluate import choose_prefixes, embed_unit, load_encoder_of
from neobert.contrastive.examples import Example
from neobert.contrastive.reading import open_source
from neobert.disk import replacing
from neobert.errors import DataError
from neobert.inference.text_encoder import check_max_length
from neobert.objectives.late_interaction import TOKENS, TokenVectors

_ANCHORS = 256
"""Anchors compared with the whole collection at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MineSettings:
    """What counts as a hard negative."""

    num_negatives: int = 5
    margin: float = 0.05
    """A negative is less similar to the anchor than its positive by at least this."""

    skip: int = 0


def mine(
    anchors_ND: NDArray[np.float32],
    positives_ND: NDArray[np.float32],
    documents_CD: NDArray[np.float32],
    excluded: Sequence[set[int]],
    settings: MineSettings,
) -> Iterator[list[int]]:
    """Numbers of the documents that are negatives of each anchor, the hardest first; vectors are of length 1.

    Args:
        positives_ND: the positive of each anchor.
        excluded: documents that are never negatives of an anchor.
    """
    for start in range(0, len(anchors_ND), _ANCHORS):
        block = slice(start, start + _ANCHORS)
        similarity = anchors_ND[block] @ documents_CD.T
        limits = (anchors_ND[block] * positives_ND[block]).sum(axis=1) - settings.margin
        for row, limit, own in zip(similarity, limits, excluded[block]):
            row = row.copy()
            row[list(own)] = -np.inf
            order = np.argsort(-row, kind="stable")[: settings.skip + settings.num_negatives + len(row[row > limit])]
            rest = [number for number in order.tolist() if np.isfinite(row[number])][settings.skip :]
            yield [number for number in rest if row[number] <= limit][: settings.num_negatives]


def mine_examples(
    examples: Sequence[Example],
    embed_anchors: NDArray[np.float32],
    embed_positives: NDArray[np.float32],
    documents: Sequence[str],
    settings: MineSettings,
) -> Iterator[Example]:
    """Examples with the negatives found instead of those they had.

    Args:
        embed_anchors: vectors of the examples' anchors.
        embed_positives: vectors of `documents`, the different positives of all examples.
    """
    index = {text: number for number, text in enumerate(documents)}
    answers: dict[str, set[int]] = {}
    for example in examples:
        own = answers.setdefault(example.anchor, {index[example.anchor]} if example.anchor in index else set())
        own.add(index[str(example.positive)])
    positives = embed_positives[[index[str(example.positive)] for example in examples]]
    excluded = [answers[example.anchor] for example in examples]
    for example, found in zip(examples, mine(embed_anchors, positives, embed_positives, excluded, settings)):
        yield Example(
            anchor=example.anchor, positive=example.positive, negatives=tuple(documents[number] for number in found)
        )


def mine_file(args: argparse.Namespace) -> tuple[int, int]:
    """Reads pairs and writes them with their negatives as JSON lines; the numbers of negatives and of pairs.

    Raises:
        DataError: the set, the output or the arguments cannot be used.
    """
    if args.output.exists():
        raise DataError(f"--output: {args.output} exists already; choose another name, or remove it")
    settings = MineSettings(**explicit_values(args, MineSettings))
    if settings.num_negatives < 1 or settings.skip < 0:
        raise DataError("--num-negatives must be at least 1, and --skip not negative")
    check_max_length(args.max_length)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output: {args.output} cannot be made ({error.strerror})") from error
    opened = open_source(PairSource(name=args.pairs, split=args.split))
    if opened.form != "pairs":
        raise DataError(f"{opened.label} has no pairs; name a set with anchors and positives")
    examples, encoder = list(opened.examples), load_encoder_of(args)
    if encoder.settings.pooling == TOKENS:
        raise DataError(
            f"--pooling: {args.model} keeps a vector for every token, and negatives are found with one a text; write "
            "--pooling mean"
        )
    documents = list(dict.fromkeys(str(example.positive) for example in examples))
    anchor_prefix, positive_prefix = choose_prefixes(args, encoder)
    anchors = embed_unit(encoder, [example.anchor for example in examples], anchor_prefix)
    vectors = embed_unit(encoder, documents, positive_prefix)
    assert not isinstance(anchors, TokenVectors), "refused above"
    assert not isinstance(vectors, TokenVectors), "refused above"
    written = total = 0
    with replacing(args.output) as temporary, temporary.open("w", encoding="utf-8") as out:
        for example in mine_examples(examples, anchors, vectors, documents, settings):
            row = {"anchor": example.anchor, "positive": example.positive, "negatives": list(example.negatives)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            written, total = written + len(example.negatives), total + 1
    return written, total
