"""Fewer processes than the launcher was asked for, and engines that are not used here, end a start before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train import machine as launcher
from neobert.train import machine as runtime
from neobert.train.loop import pretrain
from neobert.train.machine import check_launcher, check_world

Tiny = Callable[..., Config]

ALONE = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "OMP_NUM_THREADS": "1",
}
"""What `accelerate launch` gives a process that it starts alone."""

SEVERAL = ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""The same when it was asked for several processes."""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SEVERAL, r"MASTER_ADDR .* was asked for several processes and started one.*--multi_gpu --num_processes N"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"ACCELERATE_USE_FSDP: true: FSDP is not supported.*torchrun"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"ACCELERATE_USE_DEEPSPEED: true: DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"ACCELERATE_USE_MEGATRON_LM: true: Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, r"a parallelism config is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"ACCELERATE_DYNAMO_BACKEND: inductor .* trainer.torch_compile"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"ACCELERATE_MIXED_PRECISION: fp16 .* trainer.mixed_precision"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS: 4 .* trainer.gradient_accumulation_steps",
        ),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_named(
    tiny: Tiny, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        check_launcher(tiny(tmp_path), environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALONE,
        SEVERAL | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        SEVERAL | {"OMPI_COMM_WORLD_SIZE": "2"},
        {"MASTER_ADDR": "node0", "MASTER_PORT": "1"},  # Exported for other programs.
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
    ],
)
def test_usual_environments_pass(tiny: Tiny, tmp_path: Path, environment: dict[str, str]) -> None:
    check_launcher(tiny(tmp_path), environment)


def test_a_launcher_may_ask_for_what_the_config_says(tiny: Tiny, tmp_path: Path) -> None:
    check_launcher(tiny(tmp_path, "trainer.mixed_precision=bf16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_the_cpu_of_a_launcher_is_the_cpu_of_the_config(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "choose_device_type", lambda config: "cuda")
    with pytest.raises(StartupError, match=r"ACCELERATE_USE_CPU: true, .* write trainer.device: cpu"):
        check_launcher(tiny(tmp_path), ALONE)


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
)
def test_fewer_processes_than_were_asked_for(name: str) -> None:
    with pytest.raises(
        StartupError, match=rf"started 4 processes \({name}\), but this one sees 2; start with `torchrun"
    ):
        check_world(2, {name: "4"})
    check_world(4, {name: "4"})
    check_world(8, {name: "4"})  # srun starts one launcher on each of four machines.


def test_a_start_alone_of_several_leaves_no_trace(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path / "run")
    monkeypatch.setattr(runtime, "Accelerator", None)
    for name, value in SEVERAL.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match="started one"):
        pretrain(config)
    assert not (tmp_path / "run").exists()
