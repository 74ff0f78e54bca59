"""A run continues without its console, and its record is complete."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import wait_for
from poison import fork_run

from neobert.config.schema import Config


def gone_pipe() -> int:
    """The writing end of a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("target", ["pipe", "/dev/full"])
def test_a_run_outlives_its_console(tiny: Callable[..., Config], tmp_path: Path, target: str) -> None:
    """A run that is started from Python, whose console is gone from the first line on."""
    out = tmp_path / "run"

    def lose_the_console() -> None:
        descriptor = gone_pipe() if target == "pipe" else os.open(target, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="ascii", closefd=False)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="ascii", closefd=False)  # type: ignore[misc]

    texts = "trainer.fill_mask_texts=['naïve [MASK] über']"
    child = fork_run(
        tiny(out, "trainer.max_steps=3", "trainer.eval_strategy=no", texts), tmp_path / "log", lose_the_console
    )
    assert wait_for(child) == 0
    written = (out / "training.log").read_text(encoding="utf-8")
    assert "train step       3 |" in written
    assert "naïve" in written
    assert (out / "checkpoints" / "3" / "train_state.json").is_file()
