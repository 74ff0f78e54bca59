"""Optimizers in a run: clipping is logged, groups can be divided again on a resume, replicas stay equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_in_two
from records import exact_steps, log_lines
from safetensors.torch import load_file, save_file

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.config.schema_optimizer import GroupSection, GroupsSection, OptimizerSection
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.optim.groups import build_parameter_groups
from neobert.train import loop
from neobert.train.checkpoint.identity import describe_groups
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
MUON = "optimizer.name=muonclip"
CLIPPING = (MUON, "optimizer.muon_config.clipping_interval=2", "optimizer.muon_config.clipping_threshold=0.02")


def keep_weights(folder: Path) -> None:
    """From here on, every rank of a run writes its weights at the end."""
    finish = loop.finish

    def keep(run: Any, state: Any, **job: Any) -> None:
        weights = {name: tensor.contiguous() for name, tensor in run.module.state_dict().items()}
        save_file(weights, folder / f"rank-{run.runtime.rank}.safetensors")
        finish(run, state, **job)

    loop.finish = keep


def test_clipping_is_logged_and_changes_what_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    clipped, alone, off = tmp_path / "clipped", tmp_path / "alone", tmp_path / "off"
    pretrain(tiny(clipped, *CLIPPING))
    lines = log_lines(clipped, "log")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["clipped_heads"] > 0 for line in lines] == [line["max_attention_logit"] > 0.02 for line in lines]
    assert sum(line["clipped_heads"] for line in lines) > 0
    # Measuring alone changes nothing, to the bit.
    pretrain(tiny(alone, MUON, "optimizer.muon_config.clipping_interval=1"))
    pretrain(tiny(off, MUON, "optimizer.muon_config.enable_clipping=false"))
    assert all(line["clipped_heads"] == 0 for line in log_lines(alone, "log"))
    assert "clipped_heads" not in log_lines(off, "log")[0]
    assert exact_steps(alone) == exact_steps(off)
    assert exact_steps(clipped)[:4] == exact_steps(off)[:4]
    assert exact_steps(clipped)[4:] != exact_steps(off)[4:]


@pytest.mark.parametrize(
    "section",
    [
        OptimizerSection(),
        OptimizerSection(groups=GroupsSection(vectors=GroupSection(lr=1.0), matrices=GroupSection(weight_decay=0.1))),
        OptimizerSection(name="normuon"),
    ],
)
def test_checkpoints_of_two_groups_are_recognised_however_the_groups_are_divided(section: OptimizerSection) -> None:
    config = ModelConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        vocab_size=20,
        pad_token_id=0,
        rope=False,
        tie_word_embeddings=False,
    )
    module = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    groups = build_parameter_groups(module, section)
    # As the first version wrote it into train_state.json.
    assert describe_groups(groups) == "5+5 tensors, 090f24167a8d43f9"


def test_a_resumed_run_may_divide_its_groups_again(tiny: Tiny, whole_run: Callable[..., Path], tmp_path: Path) -> None:
    whole, divided = whole_run(), tmp_path / "divided"
    resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '4'}"
    same = ["optimizer.groups.vectors.lr=1e-2", "optimizer.groups.matrices.lr=1e-2"]
    pretrain(tiny(divided, resume, *same))
    groups = torch.load(divided / "checkpoints/8/optimizer.bin", weights_only=True)["param_groups"]
    assert [group["roles"] for group in groups] == [["matrices"], ["embeddings"], ["vectors"]]
    assert exact_steps(divided) == exact_steps(whole, after=4)
    other = tmp_path / "other"
    pretrain(tiny(other, resume, "optimizer.groups.embeddings.lr=1e-3"))
    assert exact_steps(other) != exact_steps(whole, after=4)
    assert [x["lr"] for x in log_lines(other, "step")] == [x["lr"] for x in log_lines(whole, "step")[4:]]


def test_another_optimizer_is_refused_on_resume_and_its_settings_are_declared(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, MUON, "trainer.max_steps=4"))
    latest = "trainer.resume_from_checkpoint=latest"
    with pytest.raises(StartupError, match=r'optimizer.name +fixed +"muonclip" -> "adamw"'):
        pretrain(tiny(out, latest))
    beta = "optimizer.muon_config.muon_beta"
    with pytest.raises(StartupError, match=rf"{beta} +needs declaring +0.95 -> 0.9"):
        pretrain(tiny(out, MUON, latest, f"{beta}=0.9"))
    longer = [MUON, latest, "trainer.max_steps=6"]
    assert pretrain(tiny(out, *longer, f"{beta}=0.9", f"trainer.resume_allow=[{beta}]")).state.step == 6


def test_replicas_stay_equal_with_muonclip_and_clipping(tiny: Tiny, tmp_path: Path) -> None:
    one = tmp_path / "one"
    options = [*CLIPPING, "trainer.global_batch_size=8", "trainer.max_steps=20", "trainer.eval_steps=0"]
    options += ["optimizer.muon_config.muon_decay=0.01"]
    pretrain(tiny(one, *options))
    config = tiny(tmp_path / "two", *options, "trainer.per_device_train_batch_size=2")

    def train() -> int:
        keep_weights(tmp_path)
        return EXIT_CODES[pretrain(config).reason]

    run_in_two(train, tmp_path)
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    alone = load_file(one / "checkpoints/20/model.safetensors")
    assert sum(line["clipped_heads"] for line in log_lines(tmp_path / "two", "log")) > 0
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-4)
    for a, b in zip(log_lines(one, "log"), log_lines(tmp_path / "two", "log"), strict=True):
        assert a["max_attention_logit"] == pytest.approx(b["max_attention_logit"], rel=1e-3)
        assert a["clipped_heads"] == b["clipped_heads"]


@pytest.mark.parametrize("name", ["adamw", "normuon"])
def test_cautious_decay_momentum_heads_and_drawn_mask_rates_resume_exactly(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    keys = [f"optimizer.name={name}", "optimizer.cautious_weight_decay=true", "datacollator.mlm_rate=diffusion"]
    keys += ["datacollator.mlm_rate_range=[0.02,1.0]", "trainer.eval_steps=0"]
    if name == "normuon":
        muon = "optimizer.muon_config"
        keys += [f"{muon}.muon_decay=0.1", f"{muon}.split_heads=true", f"{muon}.muon_beta_start=0.7"]
        keys += [f"{muon}.muon_beta_warmup_steps=3", f"{muon}.muon_beta_cooldown_steps=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(tiny(whole, *keys, "trainer.max_steps=8"))
    pretrain(tiny(parts, *keys, "trainer.max_steps=4", "scheduler.total_steps=8"))
    pretrain(tiny(parts, *keys, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(parts) == exact_steps(whole)
    counts = [step["num_targets"] / step["num_tokens"] for step in log_lines(whole, "step")]
    assert max(counts) > 1.5 * min(counts), "each row draws its rate"
