"""The normalised model in a whole run: every checkpoint is on the sphere, and a skipped step moves nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from poison import poison, rows_of_step
from safetensors.torch import load_file

from neobert.config.schema import Config
from neobert.train.loop import pretrain


def test_every_checkpoint_is_normalised_and_a_skipped_step_keeps_every_bit(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, [rows_of_step(3)[2]], "loss")
    keys = ["model.ngpt=true", "optimizer.weight_decay=0", "model.tie_word_embeddings=false"]
    pretrain(tiny(tmp_path / "run", *keys, "trainer.max_steps=4", "trainer.save_steps=1", "trainer.eval_steps=0"))
    saved = [load_file(tmp_path / "run" / "checkpoints" / str(n) / "model.safetensors") for n in (1, 2, 3, 4)]
    for weights in saved:
        for name, weight in weights.items():
            if weight.ndim == 2:
                dim = 0 if name.endswith((".out.weight", ".down.weight")) else 1
                torch.testing.assert_close(weight.norm(dim=dim), torch.ones(weight.shape[1 - dim]))
    assert all(torch.equal(saved[1][name], saved[2][name]) for name in saved[1]), "step 3 was skipped"
    for before, after in ((saved[0], saved[1]), (saved[2], saved[3])):
        assert not any(torch.equal(before[name], after[name]) for name in before)
