"""`trainer.deterministic`: on a CPU it changes no bit, and what it switches is switched back by the next run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import cpu_only
from records import exact_steps, log_lines

from neobert.config.schema import Config
from neobert.model import attention
from neobert.train.build import choose_compile_options
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]


@cpu_only
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_a_cpu_is_deterministic_with_and_without(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    settings = ["trainer.max_steps=5", "model.dropout_prob=0.1", f"trainer.mixed_precision={precision}"]
    runs = {"on": ["trainer.deterministic=true"], "off": [], "on again": ["trainer.deterministic=true"]}
    for name, more in runs.items():
        pretrain(tiny(tmp_path / name, *settings, *more))
        assert torch.are_deterministic_algorithms_enabled() == bool(more)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark
    pretrain(tiny(tmp_path / "last", *settings))
    assert not torch.are_deterministic_algorithms_enabled()
    assert exact_steps(tmp_path / "on") == exact_steps(tmp_path / "off") == exact_steps(tmp_path / "on again")
    assert log_lines(tmp_path / "on", "eval") == log_lines(tmp_path / "off", "eval")


def test_a_choice_of_workspaces_is_respected(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=1", "trainer.deterministic=true"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_flash_package_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[bool] = []

    def flash(q: torch.Tensor, *rest: object, deterministic: bool, **settings: object) -> torch.Tensor:
        passed.append(deterministic)
        return q

    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash)
    q = torch.zeros(4, 1, 2)
    for on in (True, False):
        torch.use_deterministic_algorithms(on)
        attention.attend_varlen(q, q, q, attention.VarlenPlan(((torch.tensor([0, 4]), 4),), 4, (-1, -1)), scale=1.0)
    assert passed == [True, False]


@cpu_only
def test_the_compiler_chooses_no_kernel_by_the_clock(tiny: Tiny, tmp_path: Path) -> None:
    assert choose_compile_options(tiny(tmp_path / "a")) is None
    assert choose_compile_options(tiny(tmp_path / "b", "trainer.deterministic=true")) == {
        "max_autotune": False,
        "deterministic": True,
    }
    eager = ["trainer.deterministic=true", "trainer.torch_compile_backend=aot_eager"]
    assert choose_compile_options(tiny(tmp_path / "c", *eager)) is None
