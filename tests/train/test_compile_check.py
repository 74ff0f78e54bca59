"""With `trainer.torch_compile` a small block is compared, compiled with eager, before anything is trained."""

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.model import layers, rotary
from neobert.model.attention import ATTENTION
from neobert.train.hardware import compile_check
from neobert.train.hardware.compile_check import check_compiled_gradients, find_largest_difference
from neobert.train.loop import pretrain

CPU = torch.device("cpu")
COMPILED = ("trainer.torch_compile=true", "trainer.torch_compile_backend=eager")
VARIANTS = {
    "neobert": (),
    "windows": ("model.local_attention=8", "model.global_attention_every=2"),
    "gelu and layer norm": ("model.hidden_act=gelu", "model.rms_norm=false", "model.rope=false"),
    "more norms": ("model.qk_norm=true", "model.embedding_norm=true", "model.init_zero_residual=true"),
    "like ModernBERT": (
        "model.rms_norm=false",
        "model.hidden_act=geglu",
        "model.embedding_norm=true",
        "model.first_attention_norm=false",
        "model.local_attention=8",
        "model.local_rope_theta=100",
    ),
    "normalised": ("model.ngpt=true", "optimizer.weight_decay=0"),
}
Tiny = Callable[..., Config]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def rotate_another_way(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the fault of torch 2.11: the values are right and the gradient is, until it is compiled."""
    if torch.compiler.is_compiling() and (sin < 0).sum() >= 0:
        sin = sin.abs()
    first, second = x_TND.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def check(config: Config, runtime: Any) -> list[str]:
    runtime.device = CPU
    return check_compiled_gradients(config, ATTENTION["sdpa"], runtime)


def alone(config: Config) -> list[str]:
    collectives = {"gather_objects": lambda value, **_: [value], "sum_on_host": lambda values, **_: values}
    return check(config, types.SimpleNamespace(world=1, **collectives))


def test_a_broken_function_stops_a_run_before_its_first_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", *COMPILED, "trainer.max_steps=1")
    pretrain(config)  # The pass that it leaves behind is one of the code as it was.
    monkeypatch.setattr(rotary, "_rotate", rotate_another_way)
    with pytest.raises(StartupError) as caught:
        pretrain(tiny(tmp_path / "broken", *COMPILED))
    message = str(caught.value)
    assert message.startswith(
        "trainer.torch_compile: true, but compiled by eager a small block computes wrong gradients"
    )
    assert f"This is torch {torch.__version__} with Python 3.1" in message
    assert f"torch {compile_check.KNOWN_RIGHT} is known to be right; write trainer.torch_compile: false" in message
    assert not (tmp_path / "broken").exists()
    pretrain(tiny(tmp_path / "eager", "trainer.max_steps=1"))


def test_wrong_values_are_seen_too(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.swiglu
    wrong = lambda x: right(x) * (1.01 if torch.compiler.is_compiling() else 1.0)  # noqa: E731
    monkeypatch.setitem(layers.ACTIVATIONS, "swiglu", wrong)
    assert find_largest_difference(tiny(tmp_path, *COMPILED), ATTENTION["sdpa"], CPU)[1] > 2e-3


def test_a_nan_is_a_difference(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.swiglu
    nan = float("nan")
    wrong = lambda x: right(x) * (nan if torch.compiler.is_compiling() else 1.0)  # noqa: E731
    monkeypatch.setitem(layers.ACTIVATIONS, "swiglu", wrong)
    with pytest.raises(StartupError, match="differs from the eager one by nan of its size"):
        alone(tiny(tmp_path, *COMPILED))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_block_passes(variant: str, precision: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, *COMPILED, *VARIANTS[variant], f"trainer.mixed_precision={precision}")
    assert find_largest_difference(config, ATTENTION["sdpa"], CPU)[1] < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_kind_of_block_passes_in_every_compiler(
    backend: str, variant: str, precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    keys = (f"trainer.torch_compile_backend={backend}", f"trainer.mixed_precision={precision}")
    config = tiny(tmp_path, *COMPILED, *VARIANTS[variant], *keys)
    name, difference = find_largest_difference(config, ATTENTION["sdpa"], CPU)
    assert difference < (1e-5 if precision == "no" else 3e-2), name


def test_a_pass_is_kept_for_what_it_was_found_with(
    tiny: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    find = find_largest_difference
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *given: calls.append(given) or find(*given))
    config = tiny(tmp_path, *COMPILED)
    (note,) = alone(config)
    assert "compiled gradients of a small block are the eager ones" in note
    assert alone(config) == []
    assert alone(tiny(tmp_path, *COMPILED, "optimizer.lr=1", "model.hidden_size=64")) == []
    assert len(calls) == len(list((cache / "neobert" / "compiled-gradients").iterdir())) == 1
    alone(tiny(tmp_path, *COMPILED, "model.qk_norm=true"))
    alone(tiny(tmp_path, *COMPILED, "trainer.mixed_precision=bf16"))
    monkeypatch.setattr(compile_check, "_version_of", lambda package: "another")
    alone(config)
    assert len(calls) == 4


@pytest.mark.parametrize("right", [torch.__version__.rsplit(".", 1)[0], "9.8"])
def test_another_torch_is_advised_where_this_one_is_not_known_to_be_right(
    right: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_check, "KNOWN_RIGHT", right)
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *_: ("a gradient", 1.0))
    with pytest.raises(StartupError) as caught:
        alone(tiny(tmp_path, *COMPILED))
    assert ("pip install 'torch==9.8.*'" in str(caught.value)) == (right == "9.8")


def test_a_failure_is_not_kept(tiny: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *_: ("a gradient", 1.0))
    for _ in range(2):
        with pytest.raises(StartupError, match=r"a gradient differs from the eager one by 1 of its size, 0\.002"):
            alone(tiny(tmp_path, *COMPILED))
    assert not cache.exists()


@pytest.mark.parametrize("home", ["a file", "relative", "no home"])
def test_without_a_cache_folder_every_start_checks(
    home: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", {"a file": str(tmp_path / "file"), "relative": "here", "no home": ""}[home])
    monkeypatch.setenv("HOME", "nowhere" if home == "no home" else os.environ["HOME"])
    config = tiny(tmp_path / "run", *COMPILED)
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *_: ("a gradient", 0.0))
    assert [len(alone(config)) for _ in range(2)] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_one_rank_that_sees_a_difference_stops_all(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(runtime: Any) -> str:
        try:
            check(config, runtime)
        except StartupError as error:
            return str(error)
        return "continued"

    config, answers = tiny(tmp_path, *COMPILED), iter([("x", 0.0), ("a gradient", 0.5), ("x", 0.0)])
    monkeypatch.setattr(compile_check, "_record_of", lambda facts: None)
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *_: next(answers))
    messages = run_ranks(3, attempt)
    assert len(set(messages)) == 1
    assert "a gradient differs from the eager one by 0.5 of its size" in messages[0]
    assert "of 3)" in messages[0]


def test_a_compiler_that_fails_is_an_error_with_its_reason(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Python.h: No such file or directory\nand more")

    monkeypatch.setattr(compile_check, "find_largest_difference", fail)
    with pytest.raises(
        StartupError,
        match=r"cannot be compiled by eager: RuntimeError: Python\.h: No such file or directory\. This is torch",
    ):
        alone(tiny(tmp_path, *COMPILED))


def test_without_the_compiler_nothing_is_checked(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "find_largest_difference", lambda *_: pytest.fail("checked"))
    assert alone(tiny(tmp_path)) == []
