"""Two processes train on the rows one process would, and agree with it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from records import log_lines

from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.train.loop import pretrain

ROOT = Path(__file__).parents[2]


def test_two_processes_equal_one(tiny: Callable[..., Config], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    batch = ["trainer.global_batch_size=8", "trainer.max_steps=6"]
    pretrain(tiny(one, *batch))
    config_file = tmp_path / "two.yaml"
    config_file.write_text(config_to_yaml(tiny(two, *batch, "trainer.per_device_train_batch_size=2")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    script = ["scripts/pretraining/pretrain.py", str(config_file)]
    done = subprocess.run([*launch, *script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("budget") == 1, "only one process speaks"
    for a, b in zip(log_lines(one, "step"), log_lines(two, "step"), strict=True):
        assert (a["num_tokens"], a["num_targets"], a["batch_digest"]) == (
            b["num_tokens"],
            b["num_targets"],
            b["batch_digest"],
        )
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for a, b in zip(log_lines(one, "eval"), log_lines(two, "eval"), strict=True):
        assert (a["step"], a["num_targets"], a["num_documents"]) == (b["step"], b["num_targets"], b["num_documents"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # A checkpoint of two processes continues in one.
    resume = f"trainer.resume_from_checkpoint={two / 'checkpoints' / '4'}"
    continued = tmp_path / "continued"
    pretrain(tiny(continued, *batch, resume))
    for a, b in zip(log_lines(one, "step")[4:], log_lines(continued, "step"), strict=True):
        assert a["batch_digest"] == b["batch_digest"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
