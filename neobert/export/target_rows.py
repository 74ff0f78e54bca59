"""How far what an exported file says is from our model: one row of a table for each file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.export.compare import TOLERANCE, build_model, our_states
from neobert.export.heads import find_head
from neobert.export.samples import sample_documents, wrap_texts
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import VectorSettings
from neobert.objectives.late_interaction import TOKENS
from neobert.weights.encoder_weights import EncoderWeights


class Outputs(NamedTuple):
    """What an opened file says of some texts."""

    ids: list[list[int]]
    """Tokens of each text, [CLS] and [SEP] included."""

    values: dict[str, list[Tensor]]
    """`states` `[n, H]`, `vector` `[H]` (of a model that keeps the vectors of all tokens `[n, H]`) or `logits` of each
    text, whichever the file gives."""


class Opened(NamedTuple):
    """A file that its program has loaded."""

    by: str
    """The program and its version."""

    run: Callable[[Sequence[str], Sequence[str] | None], Outputs]
    """Outputs for texts and, of a model of pairs, their second texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRow:
    """One file of an exported folder."""

    target: str
    opened_by: str
    ids_equal: bool | None
    """None where the program has no tokenizer."""

    max_error: float
    relative_error: float
    """Of the largest value of ours."""

    cosine: float
    """The smallest of any text, between all numbers of ours and all of theirs."""

    num_bytes: int
    tokens_per_second: float | None
    """None where the program is not the one that will serve the file."""

    passed: bool

    def cells(self) -> tuple[str, ...]:
        """The columns of HEADINGS."""
        ids = {True: "yes", False: "NO", None: "not compared"}[self.ids_equal]
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        error = f"{self.max_error:.1e} ({self.relative_error:.0e})"
        return (self.target, self.opened_by, ids, error, f"{self.cosine:.6f}", f"{self.num_bytes / 1e6:,.1f}", speed)


HEADINGS = ("file", "opened by", "ids equal", "largest difference (relative)", "least cosine", "MB", "tokens/s")


def describe_rows(rows: Sequence[TargetRow]) -> str:
    """The rows as a table of Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """Our model, and what it says of TEXTS."""

    weights: EncoderWeights
    """As they are stored in the folder."""

    tokenizer: Tokenizer
    sentences: VectorSettings
    outputs: Outputs
    vector_ids: list[list[int]]
    """Tokens of TEXTS, cut at the length for vectors."""


@torch.inference_mode()
def build_reference(weights: EncoderWeights, tokenizer: Tokenizer, sentences: VectorSettings) -> Reference:
    """What our model says, all texts packed into one row."""
    model, head = build_model(weights), find_head(weights)
    documents = sample_documents(tokenizer, head, weights.config.max_position_embeddings)
    states = our_states(model, documents)
    vector_ids = wrap_texts(tokenizer, sentences.max_length)
    hidden = [x[-2] for x in our_states(model, vector_ids)]
    values = {
        "states": [x[-2] for x in states],
        "logits": [x[-1] for x in states],
        "vector": [_pool(x, sentences.pooling) for x in hidden],
    }
    return Reference(
        weights=weights,
        tokenizer=tokenizer,
        sentences=sentences,
        outputs=Outputs(documents, values),
        vector_ids=vector_ids,
    )


def _pool(states: Tensor, pooling: str) -> Tensor:
    if pooling == TOKENS:
        return torch.nn.functional.normalize(states, dim=1)
    return choose_pooling(pooling)(states, torch.tensor([len(states)]))[0]


def compare_tensors(pairs: Sequence[tuple[Tensor, Tensor]], least_cosine: float | None) -> dict[str, Any]:
    """Errors and cosine of pairs (ours, theirs), and whether they pass, as fields of TargetRow."""
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return {"max_error": math.inf, "relative_error": math.inf, "cosine": 0.0, "passed": False}
    flat = [(a.double().flatten(), b.double().flatten()) for a, b in pairs]
    max_error = max(float((a - b).abs().max()) for a, b in flat)
    relative = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in flat)
    cosine = min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in flat)
    equal = max_error <= TOLERANCE or relative <= TOLERANCE
    passed = equal if least_cosine is None else cosine >= least_cosine
    return {"max_error": max_error, "relative_error": relative, "cosine": cosine, "passed": passed}
