"""`trainer.trained_weights: embeddings`: rows of tokens learn, and every other weight keeps its bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train.loop import pretrain
from neobert.weights.vocabulary import VOCABULARY_TENSORS

CASES = {
    "tied": [],
    "untied": ["model.tie_word_embeddings=false", "model.decoder_bias=true", "model.prediction_head=true"],
    "clipped": [
        "optimizer.name=muonclip",
        "optimizer.muon_config.clipping_interval=1",
        "optimizer.muon_config.clipping_threshold=1e-6",
    ],
    "normalised": ["model.ngpt=true", "optimizer.weight_decay=0"],
}


@pytest.mark.parametrize("name", CASES)
def test_only_rows_of_tokens_learn(name: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = ["trainer.trained_weights=embeddings", "trainer.max_steps=3", "trainer.save_steps=1", *CASES[name]]
    pretrain(tiny(run, "trainer.eval_strategy=no", *config))
    first, last = (load_file(run / "checkpoints" / step / "model.safetensors") for step in ("1", "3"))
    changed = {weight for weight in first if not torch.equal(first[weight], last[weight])}
    assert changed == first.keys() & set(VOCABULARY_TENSORS)


def test_it_cannot_change_on_a_resume(tiny: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny(run, "trainer.max_steps=1", "trainer.eval_strategy=no", "trainer.trained_weights=embeddings"))
    again = tiny(run, "trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.resume_from_checkpoint=latest")
    with pytest.raises(StartupError, match=r"trainer\.trained_weights"):
        pretrain(again)
