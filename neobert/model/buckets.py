"""Documents of about one length, padded to the length of their bucket, on devices other than a CPU; see `segmented`."""

import torch
from torch import Tensor

_SHORTEST_BUCKET = 16


def bucket_length(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is not less than `length`."""
    bucket = _SHORTEST_BUCKET
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return bucket


def plan_buckets(borders: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For segments that begin and end at `borders` `[2, N]`, both on the host and int64:

    - `[2, K]`, length and number of documents of every bucket, shortest first, then zeros;
    - the slots of every bucket's documents `[B, L]`, flat, one bucket after the other, then zeros.

    Beyond its end a document repeats its last token, so that slots count on only within a document. The sizes depend
    on the number of tokens and borders alone.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for start, end in borders.T.tolist():
        if start < end:
            found.setdefault(bucket_length(end - start), []).append((start, end))
    table = torch.zeros(2, 2 * max(num_tokens, 1).bit_length(), dtype=torch.int64)
    slots = torch.zeros(num_tokens + num_tokens // 2 + _SHORTEST_BUCKET * borders.shape[1], dtype=torch.int64)
    first = 0
    for number, (bucket, documents) in enumerate(sorted(found.items())):
        table[:, number] = torch.tensor([bucket, len(documents)])
        starts, ends = torch.tensor(documents).T[..., None]
        part = torch.minimum(starts + torch.arange(bucket), ends - 1).flatten()
        slots[first : first + len(part)] = part
        first += len(part)
    return table, slots
