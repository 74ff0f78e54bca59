"""One forward pass over documents of any lengths, side by side in one row: all but no slots are padding.

Documents are put into batches by a budget of tokens, longest first, so that the documents of a batch have about the
same length and a batch takes about the same memory whatever it holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.data.rows.lanes import IntArray
from neobert.model.segments import Segments
from neobert.objectives.base import ObjectiveModule

BATCH_TOKENS = 8192
"""Tokens of a batch when nothing else is asked for."""

_WIDTH_MULTIPLE = 64
"""Rows are filled up to a multiple of this: in bf16 torch keeps code and memory for every shape a CPU has multiplied,
some megabytes each, and batches of texts would have hundreds of shapes."""

LOGITS_BYTES = 64 * 2**20
"""fp32 logits that exist at once."""


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Item numbers in batches of at most `max_tokens`, longest first; an item longer than that is alone.

    >>> plan_batches([3, 9, 4, 20], max_tokens=12)
    [[3], [1], [2, 0]]
    """
    batches: list[list[int]] = []
    free = 0
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if not batches or lengths[item] > free:
            batches.append([])
            free = max_tokens
        batches[-1].append(item)
        free -= lengths[item]
    return batches


def hidden_states(model: ObjectiveModule, documents: Sequence[IntArray]) -> Tensor:
    """Hidden states `[T, H]` of documents in one row, on the model's device, without dropout and gradients.

    T is the number of tokens of all of them, in the order given. `[CLS]` and `[SEP]` must be in the documents.
    """
    device = model.head_weight.device
    input_ids, positions, segments = _side_by_side(documents, model.encoder.config.pad_token_id, causal=model.is_causal)
    with evaluating(model), torch.no_grad(), precision(model):
        hidden = model.encoder(input_ids.to(device), positions.to(device), segments.to(device))
    return hidden[: sum(map(len, documents))]


def vocabulary_logits(model: ObjectiveModule, hidden: Tensor, size: int) -> Tensor:
    """fp32 logits `[M, size]` of hidden states `[M, H]`. Rows of the weight beyond `size` are padding and left out."""
    filled_up = F.pad(hidden, (0, 0, 0, -len(hidden) % _WIDTH_MULTIPLE))
    with torch.no_grad(), precision(model):
        return model.logits(filled_up)[: len(hidden), :size].float()


def token_losses(model: ObjectiveModule, hidden: Tensor, targets: Tensor, size: int) -> Tensor:
    """Negative log likelihood in nats, fp32 `[M]`, of tokens `[M]` given hidden states `[M, H]`; softmax over the
    first `size` rows of the vocabulary. Logits exist for a stretch of rows at a time."""
    step = max(1, LOGITS_BYTES // (4 * size))
    losses = [
        F.cross_entropy(vocabulary_logits(model, hidden[i : i + step], size), targets[i : i + step], reduction="none")
        for i in range(0, len(targets), step)
    ]
    return torch.cat(losses) if losses else hidden.new_empty(0, dtype=torch.float32)


def precision(model: ObjectiveModule) -> AbstractContextManager[object]:
    """The dtype of the weights, or bf16 where the blocks hold bf16 or the model's attention cannot compute in fp32.

    In bf16 the residual stream and the norms stay fp32, as in training with `trainer.mixed_precision: bf16`.
    """
    weight = model.encoder.block_weight
    is_wide = weight.dtype == torch.float32
    if is_wide and model.encoder.attention.problem(weight.device, weight.dtype) is None:
        return nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)


@contextmanager
def evaluating(model: ObjectiveModule) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _side_by_side(documents: Sequence[IntArray], pad_id: int, *, causal: bool) -> tuple[Tensor, Tensor, Segments]:
    """Token ids `[1, T]`, positions `[1, T]` and segments of the documents and a little padding in one row."""
    num_tokens = sum(map(len, documents))
    num_padding = -num_tokens % _WIDTH_MULTIPLE
    lengths = np.array([*(len(tokens) for tokens in documents), num_padding], dtype=np.int64)
    numbers = np.arange(1, len(lengths) + 1, dtype=np.int32)
    numbers[-1] = 0
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    borders = torch.tensor([0, *accumulate(lengths.tolist())], dtype=torch.int32)
    segments = Segments(
        ids=torch.from_numpy(np.repeat(numbers, lengths))[None],
        cu_seqlens=borders,
        cu_seqlens_cpu=borders,
        max_seqlen=int(lengths.max()),
        causal=causal,
    )
    tokens = np.concatenate([*documents, np.full(num_padding, pad_id)]).astype(np.int32, copy=False)
    return torch.from_numpy(tokens)[None], torch.from_numpy(positions.astype(np.int32))[None], segments
