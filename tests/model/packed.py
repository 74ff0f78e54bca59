"""Packed rows for the tests of the model: documents of given lengths side by side, padding at the end of a row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neobert.model.config import ModelConfig
from neobert.model.segments import Segments

ROWS = ((7, 5, 1), (9,), (3, 3, 3, 6))
"""Three rows of at most 16 slots: documents of one token, a row of one document, short neighbours, padding."""


def tiny_config(**changes: object) -> ModelConfig:
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "vocab_size": 50,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.3,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def pack(rows: Sequence[Sequence[int]], row_length: int, num_borders: int = 16) -> tuple[Tensor, Segments]:
    """Positions `[B, S]` and segments of documents of these lengths."""
    ids = torch.zeros(len(rows), row_length, dtype=torch.int32)
    positions = torch.zeros(len(rows), row_length, dtype=torch.int32)
    borders = [0]
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            ids[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
            start += length
            borders.append(row * row_length + start)
        if start < row_length:
            borders.append((row + 1) * row_length)
    borders += [len(rows) * row_length] * (num_borders - len(borders))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    return positions, Segments(ids=ids, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens, max_seqlen=row_length)


def real_slots(segments: Segments) -> Tensor:
    """bool `[B * S]`: slots that are not padding."""
    return segments.ids.flatten() != 0


def random_ids(segments: Segments, vocab_size: int, seed: int = 0) -> Tensor:
    """int32 `[B, S]` tokens; 0 in padding."""
    draw = torch.randint(1, vocab_size, segments.ids.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(segments.ids != 0, draw, 0).int()
