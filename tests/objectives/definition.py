"""What tests of objectives share: rows of packed documents, and the comparison of a loss with its definition."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neobert.objectives.masking import MaskPolicy
from neobert.types import PackedRow

VOCABULARY = 50
MASKS = MaskPolicy(
    probability=0.3,
    mask_all=False,
    mask_token_id=4,
    special_ids=(0, 1, 2, 3, 4),
    random_ids=np.arange(5, VOCABULARY, dtype=np.int32),
)


def rows(*documents: tuple[int, ...], seed: int = 0) -> list[PackedRow]:
    """Rows with documents of so many tokens, `[CLS]` and `[SEP]` included."""
    rng = np.random.default_rng(seed)
    made = []
    for number, lengths in enumerate(documents):
        texts = [np.array([1, *rng.integers(5, VOCABULARY, length - 2), 2]) for length in lengths]
        count = len(lengths)
        made.append(
            PackedRow(
                tokens=np.concatenate(texts).astype(np.int32),
                lengths=lengths,
                documents=tuple(range(number * 10, number * 10 + count)),
                offsets=(0,) * count,
                sources=(0,) * count,
                key=number,
            )
        )
    return made


def assert_is_definition(module: nn.Module, found: Tensor, expected: Tensor) -> None:
    """The same loss, with the same gradient of every weight."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = dict(module.named_parameters())
    gradients = torch.autograd.grad(found, list(weights.values()))
    for name, a, b in zip(weights, gradients, torch.autograd.grad(expected, list(weights.values()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
