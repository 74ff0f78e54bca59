"""`neobert doctor`: a healthy machine has neither problems nor advice, and each planted fault has its own."""

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from neobert.benchmark import doctor, hub_access, installed
from neobert.benchmark.gpu import gpu_kernels
from neobert.benchmark.write_speed import find_existing, measure_write
from neobert.commands import doctor_command
from neobert.config.schema import Config
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.train.hardware import device, micro_batch

Tiny = Callable[..., Config]
Patch = pytest.MonkeyPatch

AUTO = ("trainer.mixed_precision=auto", "trainer.per_device_train_batch_size=auto", "trainer.global_batch_size=4")
RATES = {torch.float32: 2e11, torch.bfloat16: 1e11}


@pytest.fixture(autouse=True)
def healthy(tmp_path: Path, monkeypatch: Patch) -> None:
    """A compiler, a fast disk, as many threads as CPUs, and products whose rates are known."""
    (tmp_path / "bin").mkdir()
    for name in ("gcc", "g++"):
        (tmp_path / "bin" / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor, "available_cpus", torch.get_num_threads)
    monkeypatch.setattr(doctor, "measure_write", lambda folder: (1e9, 10**12))
    monkeypatch.setattr(doctor, "SECONDS", 1e9)  # However busy the machine of the tests is.
    for module in (device, doctor):
        monkeypatch.setattr(module, "measure_product", lambda rows, inner, outer, dtype: RATES[dtype])


def examine(config: Config) -> doctor.Diagnosis:
    return doctor.examine(config, network=False)


def test_a_healthy_machine(tiny: Tiny, tmp_path: Path) -> None:
    seen = examine(tiny(tmp_path / "run", *AUTO))
    assert (seen.problems, seen.advice, seen.can_start) == ([], [], True)
    assert seen.values["choices"] == {
        "mixed_precision": "no",
        "compile": False,
        "attention": "sdpa",
        "kernel": "torch",
        "per_device_train_batch_size": 4,
    }
    assert seen.values["matrix products"] == {"fp32": 2e11, "bf16": 1e11}
    for name in ("attention sdpa", "loss kernel torch"):
        assert 0 <= seen.values[f"{name} against its definition"]["difference"] < 1e-4, "fp32, as the run computes"
    text = seen.describe("mine")
    assert "attention flex: cannot run here, it cannot train on cpu" in text
    assert "loss kernel torch: can run" in text
    assert "trainer.mixed_precision: auto is no: products" in text
    assert text.endswith("a training with mine can start here")
    assert not (tmp_path / "run").exists(), "nothing is left"


def test_what_is_configured_is_what_is_tested(tiny: Tiny, tmp_path: Path) -> None:
    seen = examine(tiny(tmp_path / "run", "trainer.mixed_precision=no", "model.attn_backend=sdpa"))
    assert "trainer.per_device_train_batch_size: 4" in seen.lines
    assert "model.attn_backend: sdpa is sdpa (document by document)" in seen.lines
    assert (seen.problems, seen.advice) == ([], [])


# ---- planted faults ----


def no_compiler(patch: Patch) -> None:
    patch.setenv("PATH", "/nowhere")


def unusable_gpu(patch: Patch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (device, gpu_kernels):
        patch.setattr(module, "find_unused_gpu", lambda: "there is a GPU and an old driver: update the driver")


def driver_that_crashes(patch: Patch) -> None:
    def crash() -> str:
        raise RuntimeError("no such ioctl\nand more")

    patch.setattr(gpu_kernels, "_describe_driver", crash)


def wrong_attention(patch: Patch) -> None:
    right = ATTENTION["sdpa"]
    wrong = replace(right, attend=lambda q, k, v, prepared, *, scale: right.attend(q, k, v, prepared, scale=2 * scale))
    patch.setitem(ATTENTION, "sdpa", wrong)


def nan_in_attention(patch: Patch) -> None:
    wrong = replace(ATTENTION["sdpa"], attend=lambda q, k, v, prepared, *, scale: (q + k + v) * float("nan"))
    patch.setitem(ATTENTION, "sdpa", wrong)


def attention_that_raises(patch: Patch) -> None:
    def attend(*given: Any, **more: Any) -> Any:
        raise NotImplementedError("no kernel image")

    patch.setitem(ATTENTION, "sdpa", replace(ATTENTION["sdpa"], attend=attend))


def wrong_loss(patch: Patch) -> None:
    right = KERNELS["torch"]

    def double(hidden: Any, weight: Any, targets: Any, **more: Any) -> Any:
        loss, *others = right(hidden, weight, targets, **more)
        return 2 * loss, *others

    patch.setitem(KERNELS, "torch", double)


def full_disk(patch: Patch) -> None:
    patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))  # type: ignore[attr-defined]


def read_only_disk(patch: Patch) -> None:
    def refuse(folder: Path) -> Any:
        raise OSError(30, "Read-only file system")

    patch.setattr(doctor, "measure_write", refuse)


def slow_disk(patch: Patch) -> None:
    patch.setattr(doctor, "measure_write", lambda folder: (1e6, 10**12))


def too_many_threads(patch: Patch) -> None:
    patch.setattr(doctor, "available_cpus", lambda: 2)
    patch.setattr(torch, "get_num_threads", lambda: 8)
    patch.setattr(torch, "set_num_threads", lambda count: None)


def no_memory(patch: Patch) -> None:
    patch.setattr(doctor, "available_bytes", lambda: 1000)


def no_memory_for_a_row(patch: Patch) -> None:
    patch.setattr(micro_batch, "cpu_limit", lambda: 1)


def no_gpu(patch: Patch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def nothing(patch: Patch) -> None:
    """The fault is in the config."""


ON_GPU = "trainer.use_cpu=false"
PROBLEMS: list[tuple[Callable[[Patch], None], tuple[str, ...], tuple[str, ...]]] = [
    (no_compiler, ("trainer.torch_compile=true",), ("trainer.torch_compile: true", "C++ compiler", "install g++")),
    (unusable_gpu, (ON_GPU,), ("trainer.device: auto, but there is a GPU", "update the driver")),
    (unusable_gpu, (ON_GPU, "trainer.device=cuda"), ("trainer.device: cuda, but there is a GPU",)),
    (driver_that_crashes, (), ("machine: RuntimeError: no such ioctl",)),
    (wrong_attention, (), ("attention sdpa computes wrong results", "differ from the definition by", "install")),
    (nan_in_attention, (), ("attention sdpa computes wrong results", "by nan")),
    (attention_that_raises, (), ("attention sdpa fails (NotImplementedError: no kernel image)", "install")),
    (wrong_loss, (), ("loss kernel torch computes wrong results", "install")),
    (full_disk, (), ("trainer.output_dir: ", "has 10 bytes free", "choose another trainer.output_dir")),
    (read_only_disk, (), ("trainer.output_dir: ", "Read-only file system", "choose another")),
    (no_memory_for_a_row, AUTO, ("trainer.per_device_train_batch_size: auto: not even one row", "smaller")),
    (no_gpu, (ON_GPU, "model.kernel_backend=liger"), ("model.kernel_backend: 'liger' needs", "auto")),
    (no_gpu, (ON_GPU, "model.attn_backend=flex"), ("model.attn_backend: 'flex' cannot train on cpu", "auto")),
]
ADVICE: list[tuple[Callable[[Patch], None], tuple[str, ...], tuple[str, ...]]] = [
    (no_compiler, (), ("C++ compiler", "install g++")),
    (unusable_gpu, (), ("there is a GPU and an old driver", "update the driver")),
    (slow_disk, (), ("trainer.output_dir: ", "writes 1.0 MB/s", "trainer.async_save: true")),
    (too_many_threads, (), ("8 threads", "2 CPUs", "trainer.cpu_threads to 2")),
    (no_memory, (), ("memory: 0.0 GiB are free", "smaller model")),
    (nothing, ("trainer.mixed_precision=bf16",), ("trainer.mixed_precision: bf16 is no faster", "write auto")),
    (nothing, ("tokenizer.path=null", "tokenizer.name=a/b"), ("HF_HUB_OFFLINE is set", "a/b", "HF_ENDPOINT")),
]


@pytest.mark.parametrize(("plant", "keys", "words"), PROBLEMS)
def test_a_fault_that_keeps_a_training_from_starting(
    tiny: Tiny, tmp_path: Path, monkeypatch: Patch, plant: Any, keys: tuple[str, ...], words: tuple[str, ...]
) -> None:
    config = tiny(tmp_path / "run", *keys)
    plant(monkeypatch)
    seen = examine(config)
    assert len(seen.problems) == 1, seen.problems
    assert [word for word in words if word not in seen.problems[0]] == [], seen.problems
    assert seen.advice == []
    assert f"problem: {seen.problems[0]}" in seen.describe("mine")
    assert seen.describe("mine").endswith("a training with mine cannot start here: see the problems")


@pytest.mark.parametrize(("plant", "keys", "words"), ADVICE)
def test_a_fault_that_costs_something(
    tiny: Tiny, tmp_path: Path, monkeypatch: Patch, plant: Any, keys: tuple[str, ...], words: tuple[str, ...]
) -> None:
    config = tiny(tmp_path / "run", *keys)
    plant(monkeypatch)
    seen = examine(config)
    assert seen.problems == []
    assert len(seen.advice) == 1, seen.advice
    assert [word for word in words if word not in seen.advice[0]] == [], seen.advice
    assert f"advice: {seen.advice[0]}" in seen.describe("mine")


def test_a_folder_with_a_run_and_a_file_in_its_place(tiny: Tiny, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "measure_write", measure_write)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    problems = examine(tiny(tmp_path / "run")).problems
    assert len(problems) == 1
    assert f"{tmp_path}/run has log.jsonl" in problems[0]
    assert "choose another trainer.output_dir" in problems[0]
    (tmp_path / "file").touch()
    problems = examine(tiny(tmp_path / "file" / "run")).problems
    assert len(problems) == 1
    assert f"trainer.output_dir: {tmp_path}/file cannot be written" in problems[0]


def test_what_takes_too_long_is_left_to_the_run(tiny: Tiny, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    seen = examine(tiny(tmp_path / "run", *AUTO))
    assert "per_device_train_batch_size" not in seen.values["choices"]
    assert any("trainer.per_device_train_batch_size: auto: the start of a run measures it" in x for x in seen.lines)
    assert (seen.problems, seen.advice) == ([], [])


# ---- the disk and the hub ----


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    speed, free = measure_write(tmp_path)
    assert speed > 0
    assert free > 0
    assert sorted(tmp_path.iterdir()) == before
    assert find_existing(tmp_path / "a" / "b") == tmp_path == find_existing(tmp_path)


def test_the_hub_is_asked_for_a_connection_alone(tiny: Tiny, tmp_path: Path, monkeypatch: Patch) -> None:
    config = tiny(tmp_path / "run", "tokenizer.path=null", "tokenizer.name=a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = f"http://user:secret@127.0.0.1:{port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        line, values, advice = hub_access.HubAccess(config, network=True).describe()
        assert f"127.0.0.1:{port} can be reached; HF_ENDPOINT names 127.0.0.1" in line
        assert "secret" not in line + json.dumps(values)
        assert (values["problem"], values["names"], advice) == (None, ["tokenizer.name a/b"], [])
        connection, _ = server.accept()
        with connection:
            assert connection.recv(10) == b""
        assert "not tried" in hub_access.HubAccess(config, network=False).describe()[0]
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
        monkeypatch.setattr(hub_access, "getproxies", lambda: {"http": f"http://me:secret@127.0.0.1:{port}"})
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
        line, *_ = hub_access.HubAccess(config, network=True).describe()
        assert f"127.0.0.1:{port} can be reached; HF_ENDPOINT names hub.invalid, through a proxy" in line
    advice = hub_access.HubAccess(config, network=True).describe()[2]
    assert len(advice) == 1
    assert f"127.0.0.1:{port} cannot be reached" in advice[0]
    assert "a/b" in advice[0]
    without = hub_access.HubAccess(tiny(tmp_path / "run"), network=True).describe()
    assert "cannot be reached" in without[0]
    assert without[2] == [], "nothing of this config is on the hub"


def test_names_on_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    def names(*keys: str) -> list[str]:
        return hub_access.list_hub_names(tiny(tmp_path / "run", *keys))

    assert names() == []
    assert names("dataset.path=null", "dataset.name=python_stdlib") == []
    assert names("dataset.path=null", "dataset.name=a/b") == ["dataset a/b"]
    assert names("model.init_from=owner/model") == ["model.init_from owner/model"]
    assert names(f"model.init_from={tmp_path}") == []


# ---- packages ----


def test_packages_are_compared_with_what_is_needed(tmp_path: Path, monkeypatch: Patch) -> None:
    needed = installed.read_requirements()
    assert needed["torch"].startswith(">=2.11")
    assert installed.find_package_problems({"numpy": needed["numpy"], "pyyaml": needed["pyyaml"]}) == []
    monkeypatch.setattr(installed, "_MODULES", {"torch": "no_such_module"})
    missing, old, broken = installed.find_package_problems(
        {"no-such-package": "", "numpy": ">=99", "torch": needed["torch"]}
    )
    assert missing == "the package no-such-package is not installed; run `pip install 'no-such-package'`"
    assert "numpy" in old
    assert "numpy>=99 is needed; run `pip install 'numpy>=99'`" in old
    assert "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')" in broken
    assert "--force-reinstall" in broken
    monkeypatch.setattr(installed, "requires", lambda name: ["torch<2.14,>=2.11", 'triton; extra == "dev"', "fsspec"])
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'another'\ndependencies = ['torch>=1']\n")
    for project in (tmp_path / "none", tmp_path / "pyproject.toml"):
        assert installed.read_requirements(project) == {"torch": "<2.14,>=2.11", "fsspec": ""}


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.11.0+cpu", ">=2.11,<2.14", True),
        ("2.9.1", ">=2.11,<2.14", False),
        ("2.14", ">=2.11,<2.14", False),
        ("2", ">=2.0", True),
        ("6.0.1", ">=6.0.1", True),
        ("1.0", "", True),
    ],
)
def test_versions_within_bounds(version: str, bounds: str, fits: bool) -> None:
    assert installed.is_within(version, bounds) is fits


# ---- the command ----


def test_the_command(tiny: Tiny, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--no-network", "--trainer.output_dir", str(tmp_path / "run"), "--trainer.device", "cpu"]
    assert doctor_command.doctor("neobert doctor", words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["can_start"], answer["problems"], answer["advice"]) == (True, [], [])
    assert answer["values"]["choices"]["per_device_train_batch_size"] == 64
    full_disk(monkeypatch)
    assert doctor_command.doctor("neobert doctor", [*words[1:], "--trainer.per_device_train_batch_size", "16"]) == 2
    assert "a training with quickstart cannot start here: see the problems" in capsys.readouterr().out
    monkeypatch.setattr(installed, "find_package_problems", lambda needed: ["torch is not there"])
    assert doctor_command.doctor("neobert doctor", ["--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"can_start": False, "problems": ["torch is not there"]}
