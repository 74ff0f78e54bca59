"""Fewer processes than the launcher was asked for, and engines that are not used here, end a start before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train.hardware import machine as runtime
from neobert.train.loop import pretrain
from neobert.train.processes.launcher import bind_launcher, check_world

Tiny = Callable[..., Config]

ALONE = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "OMP_NUM_THREADS": "1",
}
"""What `accelerate launch` gives a process that it starts alone."""

OPEN = ["dataset.path=texts", "tokenizer.path=tokenizer", "trainer.max_steps=1"]
"""A config that says nothing of the machine."""

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

SEVERAL = ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""The same when it was asked for several processes."""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SEVERAL, r"MASTER_ADDR .* was asked for several processes and started one.*--multi_gpu --num_processes N"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP_VERSION: 1: FSDP1 is not supported.*trainer.parallel: fsdp2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, r"FSDP_OFFLOAD_PARAMS: true: .*fsdp_offload_params: false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"ACCELERATE_USE_DEEPSPEED: true: DeepSpeed .* trainer.parallel: fsdp2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"ACCELERATE_USE_MEGATRON_LM: true: Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, r"a parallelism config is not read.*trainer.parallel: hsdp"),
        ({"ACCELERATE_DYNAMO_BACKEND": "IPEX"}, r"ACCELERATE_DYNAMO_BACKEND: ipex is not .* trainer.torch_compile"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"ACCELERATE_MIXED_PRECISION: fp16 is not .* trainer.mixed_precision"),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            r"ACCELERATE_MIXED_PRECISION: bf16, but trainer.mixed_precision is no",
        ),
        (
            FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
            r"FSDP_RESHARD_AFTER_FORWARD: false, but trainer.reshard_after_forward is true",
        ),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_named(
    tiny: Tiny, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        bind_launcher(tiny(tmp_path), environment)


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
    config = tiny(tmp_path)
    assert bind_launcher(config, environment) == (config, [])


def test_a_launcher_may_ask_for_what_the_config_says(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, "trainer.mixed_precision=bf16", "trainer.parallel=hsdp", "trainer.shard_size=2")
    assert bind_launcher(config, FSDP2 | {"ACCELERATE_MIXED_PRECISION": "bf16"}) == (config, [])


def test_what_the_config_leaves_open_is_the_launchers() -> None:
    config = load_config(None, OPEN)
    asked = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    trainer, notes = (found := bind_launcher(config, FSDP2 | asked))[0].trainer, found[1]
    assert (trainer.device, trainer.parallel, trainer.reshard_after_forward) == ("cpu", "fsdp2", False)
    assert (trainer.torch_compile, trainer.torch_compile_backend) == (True, "aot_eager")
    assert (trainer.gradient_accumulation_steps, trainer.gradient_checkpointing) == (4, True)
    assert "FSDP_VERSION: 2: trainer.parallel is fsdp2" in notes
    with pytest.raises(StartupError, match=r"FSDP_VERSION: 2, but trainer.parallel is ddp; write trainer.parallel: f"):
        bind_launcher(load_config(None, [*OPEN, "trainer.parallel=ddp"]), FSDP2)


def test_what_the_launcher_chooses_is_checked_with_the_rest(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"does not fit what accelerate launch was asked for:\n  .*bf16_residual"):
        bind_launcher(tiny(tmp_path, "trainer.mixed_precision=bf16", "trainer.bf16_residual=true"), FSDP2)


def test_the_cpu_of_a_launcher_is_the_cpu_of_the_config() -> None:
    config = load_config(None, [*OPEN, "trainer.device=cuda"])
    with pytest.raises(StartupError, match=r"ACCELERATE_USE_CPU: True, but trainer.device is cuda; .*: cpu"):
        bind_launcher(config, ALONE)


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
