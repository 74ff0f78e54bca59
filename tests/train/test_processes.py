"""Two processes train on the rows one process would, with equal results."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import ForkedProgram, fork, run_in_two, wait_for
from ports import free_port
from records import log_lines
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from neobert.cli import EXIT_CODES
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.train.loop import pretrain

ROOT = Path(__file__).parents[2]


def test_two_processes_equal_one(tiny: Callable[..., Config], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    batch = ["trainer.global_batch_size=8", "trainer.max_steps=6"]
    pretrain(tiny(one, *batch))
    launch(tmp_path, tiny(two, *batch, "trainer.per_device_train_batch_size=2"))
    check_equal(one, two, after=0)
    for a, b in zip(log_lines(one, "eval"), log_lines(two, "eval"), strict=True):
        assert (a["step"], a["num_targets"], a["num_documents"]) == (b["step"], b["num_targets"], b["num_documents"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # A checkpoint of two processes continues in one, and the other way round.
    in_one, in_two = tmp_path / "continued-in-one", tmp_path / "continued-in-two"
    pretrain(tiny(in_one, *batch, f"trainer.resume_from_checkpoint={two / 'checkpoints' / '4'}"))
    check_equal(one, in_one, after=4)
    resume = f"trainer.resume_from_checkpoint={one / 'checkpoints' / '4'}"
    config = tiny(in_two, *batch, resume, "trainer.per_device_train_batch_size=4")
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    check_equal(one, in_two, after=4)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    **{
        engine: [
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "configs" / "accelerate" / f"{engine}.yaml"),
            "--main_process_port",
        ]
        for engine in ("ddp", "fsdp2")
    },
}
"""Modules and arguments of torchrun, and of accelerate with each of the shipped files, up to the port."""


def launch(folder: Path, config: Config, launcher: str = "torchrun") -> None:
    """The launcher starts forks of itself instead of processes that import everything."""
    config_file = folder / "run.yaml"
    config_file.write_text(config_to_yaml(config))
    module, *flags = LAUNCHERS[launcher]
    words = [*flags, str(free_port()), "scripts/pretraining/pretrain.py", str(config_file)]

    def start() -> int:
        os.chdir(ROOT)
        pytest.MonkeyPatch().setattr(SubprocessHandler, "_popen", lambda self, args, env: ForkedProgram(args, env))
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0

    log = folder / "launched.txt"
    code = wait_for(fork(start, log), 120)
    printed = log.read_text()
    assert code == 0, printed
    assert printed.count("budget") == 1, "only one process speaks"


def check_equal(one: Path, other: Path, *, after: int) -> None:
    for a, b in zip(log_lines(one, "step")[after:], log_lines(other, "step"), strict=True):
        for exact in ("step", "num_tokens", "num_targets", "batch_digest"):
            assert a[exact] == b[exact]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_keep_one_average(tiny: Callable[..., Config], tmp_path: Path, engine: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["trainer.global_batch_size=8", "trainer.max_steps=4", "trainer.ema_decay=0.9"]
    settings.append("trainer.log_statistics=true")
    pretrain(tiny(one, *settings))
    launch(tmp_path, tiny(two, *settings, "trainer.per_device_train_batch_size=2"), launcher=engine)
    assert (two / "checkpoints" / "4" / "optimizer").is_dir() == (engine == "fsdp2")
    averages = [load_file(run / "checkpoints" / "4" / "ema.safetensors") for run in (one, two)]
    assert all(torch.allclose(averages[0][name], averages[1][name], atol=1e-5) for name in averages[0])
    for a, b in zip(log_lines(one, "eval_ema"), log_lines(two, "eval_ema"), strict=True):
        assert (a["step"], a["num_targets"]) == (b["step"], b["num_targets"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    (a, b) = (log_lines(run, "log")[0] for run in (one, two))
    assert a["grad_norm/qkv"] == pytest.approx(b["grad_norm/qkv"], rel=1e-3)
