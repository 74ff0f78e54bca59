"""Rows of the embedding (and of an untied vocabulary projection) for tokens that are added to a vocabulary.

Every old row keeps its bits. How a new row starts is one entry of `INITIAL_ROWS`:

    fvt      the mean of the rows of the old tokens that the new one was made of (Gee et al., arXiv 2402.09977)
    nearest  the mean of the rows of the old tokens that are spelled most alike, by groups of three characters
    mean     the mean of all old rows
    random   normal, with the mean and the deviation that each column of the old rows has
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neobert.weights.vocabulary import remap_rows

NUM_NEAREST = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTokens:
    """Tokens after the last old one."""

    texts: Sequence[str]
    """As the vocabulary spells them."""

    parts: Sequence[tuple[int, ...]]
    """Ids of the old tokens that each was made of."""

    old: Mapping[str, int]
    """Text to id of the old tokens, without the special ones."""

    num_old: int
    """Old ids; the added ones follow."""

    seed: int


def add_rows(weight: Tensor, added: AddedTokens, way: str, num_rows: int) -> Tensor:
    """`[num_rows, H]` of `weight` `[old rows, H]`: the rows of old tokens, then of those that are added, then the mean
    of the old ones. A vector `[old rows]` gives one `[num_rows]`.

    Args:
        way: a key of INITIAL_ROWS.
    """
    result = remap_rows(weight, {number: number for number in range(added.num_old)}, num_rows)
    old = weight[: added.num_old].float()
    new = INITIAL_ROWS[way](old, added)
    result[added.num_old : added.num_old + len(new)] = new.to(weight.dtype)
    return result


def _mean_of_parts(old: Tensor, added: AddedTokens) -> Tensor:
    return _mean_of(old, added.parts)


def _mean_of(old: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([old[torch.tensor(numbers)].mean(0) for numbers in rows])


def _mean_of_nearest(old: Tensor, added: AddedTokens) -> Tensor:
    chosen = find_nearest(added.texts, added.old)
    # A text that shares nothing with any other has its parts.
    return _mean_of(old, [near or parts for near, parts in zip(chosen, added.parts)])


def _mean_of_all(old: Tensor, added: AddedTokens) -> Tensor:
    return old.mean(0).expand(len(added.texts), *old.shape[1:])


def _draw(old: Tensor, added: AddedTokens) -> Tensor:
    # Other noise for each matrix: rows of the embedding and of an untied projection are not the same tokens' twice.
    digest = hashlib.sha256(old.numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed((added.seed + int.from_bytes(digest[:4])) % 2**63)
    drawn = torch.randn(len(added.texts), *old.shape[1:], generator=generator)
    return old.mean(0) + drawn * old.std(0)


INITIAL_ROWS: dict[str, Callable[[Tensor, AddedTokens], Tensor]] = {
    "fvt": _mean_of_parts,
    "nearest": _mean_of_nearest,
    "mean": _mean_of_all,
    "random": _draw,
}
"""How rows start: `fn(fp32 old rows, what is added) -> fp32 new rows`."""


def find_nearest(texts: Sequence[str], old: Mapping[str, int], count: int = NUM_NEAREST) -> list[list[int]]:
    """Ids of the old tokens whose groups of three characters are most like those of each text, by cosine; none for a
    text that shares no group with any.

    >>> find_nearest(["Ġwalking"], {"Ġwalk": 7, "Ġking": 8, "sea": 9}, 1)
    [[7]]
    """
    holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
    lengths: dict[int, float] = {}
    for text, number in old.items():
        groups = _groups(text)
        lengths[number] = sum(times**2 for times in groups.values()) ** 0.5
        for group, times in groups.items():
            holders[group].append((number, times))
    found = []
    for text in texts:
        products: Counter[int] = Counter()
        for group, times in _groups(text).items():
            for number, others in holders.get(group, ()):
                products[number] += times * others
        ranked = sorted(products, key=lambda number: (-products[number] / lengths[number], number))
        found.append(ranked[:count])
    return found


def _groups(text: str) -> Counter[str]:
    padded = f"^{text}$"
    return Counter(padded[start : start + 3] for start in range(len(padded) - 2))
