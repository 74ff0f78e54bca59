"""Embeddings for another vocabulary: rows of the tokens that both have are copied, all others start at their mean.

Tokens are matched by their text, and [CLS], [SEP], [MASK] and padding also by their role, whatever they are called.
The mean of the copied rows is neutral: a row of a new token has the scale of the model, predicts no token in
particular, and is distinguished by its gradient (Hewitt, "Initializing new word embeddings", 2021).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

VOCABULARY_TENSORS = ("encoder.embedding.weight", "decoder.weight", "decoder_bias", "logit_scale")
"""Names of our tensors that have a row for each token."""


def match_tokens(
    old: Mapping[str, int], new: Mapping[str, int], old_roles: Mapping[str, int], new_roles: Mapping[str, int]
) -> dict[int, int]:
    """New id -> old id, for every token of the new vocabulary that the old one has.

    Args:
        old: Text to id.
        new: Text to id.
        old_roles: Role (`cls`, `mask`, ...) to id.
        new_roles: Role to id; a role decides before the text does.
    """
    pairs = {number: old[text] for text, number in new.items() if text in old}
    return pairs | {number: old_roles[role] for role, number in new_roles.items() if role in old_roles}


def remap_rows(weight: Tensor, pairs: Mapping[int, int], num_rows: int) -> Tensor:
    """`[num_rows, H]`: row `pairs[i]` of `weight` `[old rows, H]` at i, the mean of the copied rows elsewhere.

    A vector `[old rows]` gives one `[num_rows]`.

    Raises:
        ValueError: no token is shared.
    """
    if not pairs:
        raise ValueError("the two vocabularies have no token in common")
    new = torch.tensor(sorted(pairs))
    copied = weight[torch.tensor([pairs[i] for i in sorted(pairs)])]
    result = copied.float().mean(0).to(weight.dtype).expand(num_rows, *weight.shape[1:]).clone()
    result[new] = copied
    return result
