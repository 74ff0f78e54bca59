"""Embeddings that follow their tokens into another vocabulary."""

import pytest
import torch

from neobert.weights.vocabulary import match_tokens, remap_rows


def test_tokens_are_matched_by_text_and_special_ones_by_role() -> None:
    old = {"<s>": 0, "<mask>": 1, "the": 2, "cat": 3, "[SEP]": 4}
    new = {"cat": 0, "[CLS]": 1, "[MASK]": 2, "dog": 3, "[SEP]": 4}
    pairs = match_tokens(old, new, {"cls": 0, "mask": 1}, {"cls": 1, "mask": 2, "pad": 3})
    assert pairs == {0: 3, 1: 0, 2: 1, 4: 4}


def test_shared_rows_are_copied_and_others_start_at_their_mean() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    expected = [[5.0, 9.0], [3.0, 5.5], [1.0, 2.0], [3.0, 5.5]]
    assert remap_rows(weight, {0: 2, 2: 0}, 4).tolist() == expected


def test_vocabularies_without_a_common_token_are_an_error() -> None:
    with pytest.raises(ValueError, match="no token in common"):
        remap_rows(torch.ones(2, 2), {}, 3)
