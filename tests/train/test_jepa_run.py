"""Runs that also predict hidden states of the average: resume, what is exported, and several processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import run_in_two
from records import assert_same_run, log_lines
from safetensors.torch import load_file

import neobert
from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.export.write import ExportRequest, export
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
JEPA = ("trainer.objective=mlm_jepa", "trainer.ema_decay=0.9", "model.dropout_prob=0.1")


def test_a_resumed_run_equals_the_uninterrupted_one_and_is_exported_without_its_predictor(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(tiny(whole, *JEPA, "trainer.max_steps=8"))
    pretrain(tiny(parts, *JEPA, "trainer.max_steps=4", "scheduler.total_steps=8"))
    pretrain(tiny(parts, *JEPA, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))
    assert_same_run(parts, whole, step=8, files=("model.safetensors", "ema.safetensors"))
    done = export(ExportRequest(source=str(whole), output=tmp_path / "exported"))
    assert any("predictor.dense.weight" in note for note in done.notes)
    assert not any("predictor" in name for name in load_file(done.folder / "model.safetensors"))
    assert neobert.load(whole, device="cpu").fill_mask(["the [MASK] house"])[0].masks
    first = log_lines(whole, "step")[0]["loss"]
    plain = tmp_path / "plain"
    pretrain(tiny(plain, JEPA[2], "trainer.max_steps=1", "trainer.eval_steps=0"))
    assert first > log_lines(plain, "step")[0]["loss"], "the distances count"


def test_compiled_losses_are_the_eager_ones(tiny: Tiny, tmp_path: Path) -> None:
    keys = [*JEPA[:2], "trainer.max_steps=3", "trainer.eval_steps=0", "trainer.save_model=false"]
    pretrain(tiny(tmp_path / "eager", *keys))
    pretrain(tiny(tmp_path / "compiled", *keys, "trainer.torch_compile=true", "trainer.torch_compile_backend=eager"))
    eager, compiled = ([s["loss"] for s in log_lines(x, "step")] for x in (tmp_path / "eager", tmp_path / "compiled"))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "keys", [JEPA[:2], ["datacollator.clm_steps=2", "datacollator.mlm_rate=random"]], ids=["jepa", "clm, random rates"]
)
def test_two_processes_train_as_one_does(tiny: Tiny, tmp_path: Path, keys: list[str]) -> None:
    common = [*keys, "trainer.max_steps=4", "trainer.eval_steps=4", "trainer.save_model=false"]
    pretrain(tiny(tmp_path / "one", *common))
    config = tiny(tmp_path / "two", *common, "trainer.per_device_train_batch_size=2")
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    one, two = (log_lines(tmp_path / name, "step") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["batch_digest"], a["num_targets"]) == (b["batch_digest"], b["num_targets"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    last = [log_lines(tmp_path / name, "eval")[-1]["loss"] for name in ("one", "two")]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
