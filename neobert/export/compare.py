"""Outputs of our model, and how far another implementation of the same encoder is from them.

Ours runs all documents packed into one row; the other side runs them padded, one by one, or as it likes. Only the slots
of real tokens are compared. Errors are measured per layer: the embeddings, the output of each block but the last, the
normalised output of the last, the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from neobert.export.heads import find_head
from neobert.model.attention import ATTENTION
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.classification import LabelModule
from neobert.objectives.table import OBJECTIVES
from neobert.weights.encoder_weights import EncoderWeights

TOLERANCE = 1e-5
"""Largest error that counts as equal, as a fraction of the largest value of the layer (but at least of 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """How far two versions of one layer are apart."""

    layer: str
    max_error: float
    relative_error: float
    """`max_error` by the largest value of ours."""

    @property
    def passed(self) -> bool:
        return self.max_error <= TOLERANCE or self.relative_error <= TOLERANCE


def build_model(weights: EncoderWeights) -> ObjectiveModule:
    """Our model with these weights, fp32, on the CPU, in evaluation mode; with a head on labels where they have one."""
    encoder = Encoder(weights.config, ATTENTION["sdpa"])
    if find_head(weights) is None:
        model, tensors = ObjectiveModule(encoder), weights.tensors
    else:
        model = OBJECTIVES[weights.objective].build_trained(encoder, weights.head)
        tensors = {**weights.tensors, **weights.training_only}
    model.load_state_dict(tensors, strict=True)
    model.check_tied()
    return model.eval()


@torch.inference_mode()
def our_states(model: ObjectiveModule, documents: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """For each document its states, `[n, H]` for each layer, then logits: `[n, V]` of tokens of the vocabulary, or of
    labels `[n, C]` or, for sequence classification, `[1, C]`. Computed packed in one row."""
    lengths = [len(document) for document in documents]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1, dtype=torch.int32), torch.tensor(lengths))
    segments = Segments(ids=numbers[None], cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=max(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    states: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in model.encoder.layers]
    try:
        hidden = model.encoder(torch.tensor([t for d in documents for t in d])[None], positions[None], segments)
    finally:
        for hook in hooks:
            hook.remove()
    spans = list(zip(borders.tolist(), lengths))
    logits = _split_logits(model, hidden, spans)
    return [[*(layer[start : start + n] for layer in (*states, hidden)), own] for (start, n), own in zip(spans, logits)]


def _split_logits(model: ObjectiveModule, hidden_TH: Tensor, spans: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    if not isinstance(model, LabelModule):
        return model.logits(hidden_TH).split([n for _, n in spans])
    if model.head.kind == "tokens":
        every_slot = torch.arange(len(hidden_TH))
        return model.label_logits(hidden_TH, torch.tensor([]), every_slot).split([n for _, n in spans])
    no_words = torch.empty(0, dtype=torch.int64)
    return model.label_logits(hidden_TH, torch.tensor([n for _, n in spans]), no_words).split(1)


def layer_errors(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> list[LayerError]:
    """Errors of every layer over all documents; both sides are documents x layers.

    Raises:
        ValueError: the two sides have different numbers of layers, or layers of different shapes.
    """
    count = len(ours[0])
    names = ["embeddings", *(f"block {number}" for number in range(1, count - 2)), "last hidden state", "logits"]
    result = []
    for index, name in enumerate(names):
        pairs = [(a[index].float(), b[index].float()) for a, b in zip(ours, theirs, strict=True)]
        if any(a.shape != b.shape for a, b in pairs) or any(len(b) != count for b in theirs):
            raise ValueError(f"{name}: the two models have different shapes")
        error = max(float((a - b).abs().max()) for a, b in pairs)
        largest = max(float(a.abs().max()) for a, _ in pairs)
        # A NaN compares as false everywhere: made infinite, it cannot pass for equal.
        error = error if error == error else float("inf")
        result.append(LayerError(layer=name, max_error=error, relative_error=error / max(largest, 1e-30)))
    return result


def random_documents(config_length: int, num_tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Documents of random tokens: the longest the model takes (at most 128), and shorter ones down to one token."""
    longest = min(config_length, 128)
    lengths = sorted({longest, longest // 2 + 1, longest // 5 + 1, 7 if longest > 7 else 1, 1}, reverse=True)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(num_tokens, (n,), generator=generator).tolist() for n in lengths]
