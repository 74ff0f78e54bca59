"""Late interaction: a text is the vectors of all its tokens, and MaxSim compares two texts.

The similarity of an anchor and a candidate is the mean, over the anchor's tokens, of the largest cosine with a token of
the candidate: ColBERT's (Khattab & Zaharia, arXiv 2004.12832, equation 3) divided by the number of the anchor's tokens.
The ranking of an anchor's candidates is the same, and temperature and margins mean what they mean for single vectors.
[CLS] and [SEP] count like every other token.

The functions at the end take either single vectors, tensors `[N, D]`, or `TokenVectors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS = "tokens"
"""The pooling that keeps the vectors of all tokens."""

_PRODUCTS = 2**24
"""Products of tokens that exist at once; a backward computes them again."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenVectors:
    """The tokens of some texts side by side, of length 1."""

    tokens_TD: Tensor
    lengths_N: Tensor
    """int64: tokens of each text, at least one."""

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, numbers: Tensor | slice) -> "TokenVectors":
        """Some of the texts, in that order."""
        lengths = self.lengths_N[numbers]
        starts = (self.lengths_N.cumsum(0) - self.lengths_N)[numbers]
        shifts = starts - (lengths.cumsum(0) - lengths)
        index = torch.arange(int(lengths.sum()), device=lengths.device) + shifts.repeat_interleave(lengths)
        return TokenVectors(self.tokens_TD[index], lengths)

    def split(self, size: int) -> list["TokenVectors"]:
        """Texts in blocks of `size`."""
        lengths = self.lengths_N.split(size)
        tokens = self.tokens_TD.split([int(block.sum()) for block in lengths])
        return [TokenVectors(*block) for block in zip(tokens, lengths)]


Units = Tensor | TokenVectors
"""Vectors of length 1: one a text, or one a token."""


def _max_sim(anchors: TokenVectors, candidates: TokenVectors) -> Tensor:
    products_TS = candidates.tokens_TD @ anchors.tokens_TD.T
    best_MS = torch.segment_reduce(products_TS, "max", lengths=candidates.lengths_N, unsafe=True)
    return torch.segment_reduce(best_MS.T.contiguous(), "mean", lengths=anchors.lengths_N, unsafe=True)


def max_sim(anchors: TokenVectors, candidates: TokenVectors) -> Tensor:
    """The similarities of N anchors and M candidates, `[N, M]`."""
    most = len(anchors.tokens_TD) * int(candidates.lengths_N.max())
    if most > _PRODUCTS and len(anchors) > 1:
        return torch.cat([max_sim(part, candidates) for part in anchors.split(-(-len(anchors) // 2))])
    blocks = candidates.split(max(1, _PRODUCTS // most))
    if len(blocks) == 1:
        return _max_sim(anchors, candidates)
    found = [checkpoint(_max_sim, anchors, x, use_reentrant=False, preserve_rng_state=False) for x in blocks]
    return torch.cat(found, dim=1)


def shorten(vectors: Units, width: int) -> Units:
    """The first `width` coordinates, of length 1."""
    if isinstance(vectors, TokenVectors):
        return TokenVectors(F.normalize(vectors.tokens_TD[:, :width], dim=1), vectors.lengths_N)
    return F.normalize(vectors[:, :width], dim=1)


def join_tokens(parts: Sequence[TokenVectors]) -> TokenVectors:
    """The texts of all parts, one part after the other."""
    return TokenVectors(torch.cat([x.tokens_TD for x in parts]), torch.cat([x.lengths_N for x in parts]))


def join(parts: Sequence[Units]) -> Units:
    """The same of either kind; all parts are of one."""
    tokens = [x for x in parts if isinstance(x, TokenVectors)]
    return join_tokens(tokens) if tokens else torch.cat([x for x in parts if isinstance(x, Tensor)])


def compare(anchors: Units, candidates: Units) -> Tensor:
    """The similarities of N anchors and M candidates, `[N, M]`."""
    if isinstance(anchors, TokenVectors):
        assert isinstance(candidates, TokenVectors), "of one kind"
        return max_sim(anchors, candidates)
    assert isinstance(candidates, Tensor), "of one kind"
    return anchors @ candidates.T


def compare_pairs(anchors: Units, others: Units) -> Tensor:
    """The similarity of each anchor and the text at its index, `[N]`."""
    if isinstance(anchors, TokenVectors):
        return torch.cat([compare(a, b).flatten() for a, b in zip(anchors.split(1), others.split(1))])
    assert isinstance(others, Tensor), "of one kind"
    return (anchors * others).sum(dim=1)
