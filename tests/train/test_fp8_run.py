"""Runs with `trainer.fp8`, emulated: they resume exactly, and what they cannot do is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from records import exact_steps, log_lines

from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
ON = ("trainer.mixed_precision=bf16", "trainer.fp8=emulated")


def test_an_emulated_run_resumes_bit_for_bit_and_differs_from_bf16(tiny: Tiny, tmp_path: Path) -> None:
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    keys = ["trainer.max_steps=8", "trainer.ema_decay=0.9"]
    pretrain(tiny(whole, *keys, *ON, "trainer.bf16_residual=true"))
    resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '4'}"
    pretrain(tiny(parts, *keys, *ON, "trainer.bf16_residual=true", resume))
    assert exact_steps(parts) == exact_steps(whole, after=4)
    pretrain(tiny(plain, *keys, ON[0]))
    with pytest.raises(StartupError, match=r"trainer.fp8 +needs declaring"):
        pretrain(tiny(tmp_path / "other", *keys, ON[0], resume))
    losses = [torch.tensor([line["loss"] for line in log_lines(run, "step")]) for run in (whole, plain)]
    assert 0 < ((losses[0] - losses[1]).abs() / losses[1]).max() < 0.02


def test_what_cannot_run_in_fp8_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.fp8: emulated has no effect .*write trainer.mixed_precision: bf16"):
        tiny(tmp_path, ON[1])
    with pytest.raises(ConfigError, match=r"model.hidden_size: 40 is no multiple of 16.*write trainer.fp8: no"):
        tiny(tmp_path, *ON, "model.hidden_size=40")
    with pytest.raises(ConfigError, match=r"model.intermediate_size: 60, a feed-forward width of 40, is no multiple"):
        tiny(tmp_path, *ON, "model.intermediate_size=60")
    with pytest.raises(StartupError, match=r"trainer.fp8: rowwise needs .*computes on cpu; write no, or emulated"):
        pretrain(tiny(tmp_path / "run", ON[0], "trainer.fp8=rowwise", "trainer.device=cpu"))
    assert not (tmp_path / "run").exists()
