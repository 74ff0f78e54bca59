"""`trainer.log_statistics`: what is logged, that it is right, and that training does not notice."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from records import exact_steps, log_lines
from safetensors.torch import load_file
from test_host_sync import WaitsForTheDevice, model_and_batch

from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.config.schema_optimizer import OptimizerSection
from neobert.optim.optimizers import build_optimizer
from neobert.train.loop import pretrain
from neobert.train.record.statistics import Statistics
from neobert.train.step import train_step
from neobert.types import IGNORE_INDEX

Tiny = Callable[..., Config]
GROUPS = ["embedding", "vectors", "qkv", "out", "gate_up", "down"]
NAMES = [f"grad_norm/{g}" for g in GROUPS] + ["logsumexp/mean", "logsumexp/max", "logit/max"]
NAMES += [f"weight_norm/{g}" for g in GROUPS]


def test_a_run_logs_them_and_is_the_run_without_them(tiny: Tiny, tmp_path: Path) -> None:
    settings = ["model.dropout_prob=0.1", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=7"]
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    pretrain(tiny(plain, *settings))
    pretrain(tiny(watched, *settings, "trainer.log_statistics=true"))
    assert exact_steps(watched) == exact_steps(plain)
    lines = log_lines(watched, "log")
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines[:2]:
        assert set(NAMES) <= line.keys()
        total = sum(line[f"grad_norm/{g}"] ** 2 for g in GROUPS) ** 0.5
        of_the_step = next(x for x in log_lines(watched, "step") if x["step"] == line["step"])["grad_norm"]
        assert total == pytest.approx(of_the_step, rel=1e-5)
        assert sum(line[f"weight_norm/{g}"] ** 2 for g in GROUPS) ** 0.5 == pytest.approx(line["weight_norm"], rel=1e-5)
        assert line["logsumexp/mean"] <= line["logsumexp/max"]
        assert line["logit/max"] < line["logsumexp/max"]
    assert not set(NAMES) & lines[2].keys(), "the last step ends no interval and was not watched"
    assert not set(NAMES) & log_lines(plain, "log")[0].keys()
    same = [load_file(run / "checkpoints/7/model.safetensors") for run in (plain, watched)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_the_metrics_are_those_of_the_definitions() -> None:
    module, batch = model_and_batch()
    optimizer = build_optimizer(module, OptimizerSection(lr=1e-3))
    statistics = Statistics(module)
    hidden = module.encoder(batch.input_ids, batch.positions, batch.segments)
    chosen = batch.masked_index[batch.targets != IGNORE_INDEX]
    logits = module.logits(hidden[chosen]).detach()
    norms: dict[str, float] = {}

    def remember() -> None:
        norms["qkv"] = sum(float(layer.qkv.weight.grad.norm()) ** 2 for layer in module.encoder.layers) ** 0.5

    step = partial(train_step, module, optimizer, [batch], lr=0, scale=1, gradient_clipping=0.1)
    step(observe=remember)  # The first step builds the optimizer's state.
    with statistics.watching(batch) as observe, WaitsForTheDevice() as mode:
        step(observe=observe)
    assert mode.found == []
    found = statistics.read()
    assert found["grad_norm/qkv"] == pytest.approx(norms["qkv"], rel=1e-5)
    assert found["logsumexp/mean"] == pytest.approx(float(logits.logsumexp(-1).mean()), abs=1e-5)
    assert found["logsumexp/max"] == pytest.approx(float(logits.logsumexp(-1).max()), abs=1e-5)
    assert found["logit/max"] == pytest.approx(float(logits.max()), abs=1e-5)
    embedding = module.encoder.embedding.weight.detach()
    assert found["weight_norm/embedding"] == pytest.approx(float(embedding.norm()), rel=1e-6)
    assert not module.encoder._forward_hooks, "nothing is left behind"


def test_without_log_lines_there_is_nowhere_to_put_them(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.log_statistics: true has no effect without trainer.logging_steps"):
        tiny(tmp_path / "run", "trainer.log_statistics=true", "trainer.logging_steps=0")
