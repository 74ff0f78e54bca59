"""Engines for several processes: losses, weights and optimizer state of one process, whatever keeps them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import run_on
from records import log_lines
from safetensors.torch import load_file

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]

ROWS = 12
"""Of a step: what 1, 2 and 3 processes share evenly."""


def train_on(world: int, config: Config, folder: Path) -> None:
    if world == 1:
        assert pretrain(config).reason == "finished"
    else:
        run_on(world, lambda: EXIT_CODES[pretrain(config).reason], folder)


def build(tiny: Tiny, out: Path, world: int, *more: str, accumulation: int = 1) -> Config:
    rows = ROWS // world // accumulation
    batch = [f"trainer.global_batch_size={ROWS}", f"trainer.per_device_train_batch_size={rows}"]
    return tiny(out, "trainer.max_steps=4", "trainer.save_steps=2", *batch, *more)


def check_same_run(one: Path, other: Path) -> None:
    for a, b in zip(log_lines(one, "step")[-2:], log_lines(other, "step")[-2:], strict=True):
        for exact in ("step", "num_tokens", "num_targets", "batch_digest"):
            assert a[exact] == b[exact]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    evaluations = (log_lines(run, "eval")[-1] for run in (one, other))
    (a, b) = evaluations
    assert (a["step"], a["num_targets"], a["num_documents"]) == (b["step"], b["num_targets"], b["num_documents"])
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for name in ("model.safetensors", "ema.safetensors"):
        files = [run / "checkpoints" / "4" / name for run in (one, other)]
        if files[0].exists() or files[1].exists():
            weights = [load_file(file) for file in files]
            assert weights[0].keys() == weights[1].keys()
            for key, weight in weights[0].items():
                torch.testing.assert_close(weights[1][key], weight, atol=1e-5, rtol=0)


def test_fsdp2_equals_one_process(tiny: Tiny, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train_on(1, build(tiny, one, 1), tmp_path)
    train_on(2, build(tiny, two, 2, "trainer.parallel=fsdp2"), tmp_path)
    check_same_run(one, two)


CASES = [
    ("fsdp2", 2, 3, ["datacollator.pack_sequences=false", "optimizer.name=stable_adamw"]),
    ("fsdp2", 2, 1, ["trainer.objective=replaced_token"]),
    ("fsdp2", 2, 1, ["trainer.mixed_precision=bf16"]),
    ("hsdp", 4, 1, []),
    ("fsdp2", 2, 1, ["trainer.mixed_precision=bf16", "trainer.fp8=emulated"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{'-'.join(case[3])}")
def test_cases(tiny: Tiny, tmp_path: Path, case) -> None:
    engine, world, accumulation, more = case
    one, other = tmp_path / "one", tmp_path / "other"
    own = [x for x in more if "shard" not in x]
    train_on(1, build(tiny, one, 1, *own), tmp_path)
    train_on(world, build(tiny, other, world, f"trainer.parallel={engine}", *more, accumulation=accumulation), tmp_path)
    check_same_run(one, other)
    assert (other / "checkpoints/4/optimizer").exists() == (engine != "ddp")
