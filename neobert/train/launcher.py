"""What the launcher asked for, as its variables tell, and whether this program gives it.

A process that was started alone looks like a run of one process, and trains as one without a word: `accelerate launch
--cpu --num_processes 2` starts one (only a GPU makes it start several), `srun` and `mpirun` start several that do not
know each other. What they were asked for is in the environment:

| launcher | variable |
|---|---|
| torchrun, `accelerate launch --multi_gpu`, PyTorchJob | `WORLD_SIZE` |
| mpirun | `OMPI_COMM_WORLD_SIZE`, `PMI_SIZE`, `MV2_COMM_WORLD_SIZE` |
| srun | `SLURM_STEP_NUM_TASKS` |
| `accelerate launch` that starts one | `MASTER_ADDR` beside `ACCELERATE_USE_CPU`: only when several were wanted |
"""

import os
from collections.abc import Mapping

from neobert.config.schema import Config
from neobert.train.runtime import COMMANDS, SIZES, StartupError, choose_device_type

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""Variable of `accelerate launch` -> the engine it chooses, none of which is used here."""

SETTINGS = {
    "ACCELERATE_DYNAMO_BACKEND": "trainer.torch_compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "trainer.gradient_accumulation_steps",
    "ACCELERATE_MIXED_PRECISION": "trainer.mixed_precision",
}
"""Variable of `accelerate launch` -> the key that decides instead."""


def check_launcher(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Checks before any work that nothing was asked of the launcher that this program does not do.

    Raises:
        StartupError: with every such variable and its remedy.
    """
    problems = [
        f"{name}: {environment[name]}: {engine} is not supported, every process keeps the whole model; start with "
        f"{COMMANDS}, without a config file of accelerate that chooses it (unset the variable where it was exported)"
        for name, engine in ENGINES.items()
        if environment.get(name, "").lower() in ("true", "1", "yes", "on")
    ]
    for name, key in SETTINGS.items():
        value = environment.get(name, "no").lower()
        if value not in ("no", "1", str(_value_of(config, key)).lower()):
            problems.append(f"{name}: {value} is not read here; write {key} in the config and leave it to the launcher")
    if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and choose_device_type(config) != "cpu":
        problems.append("ACCELERATE_USE_CPU: true, but trainer.use_cpu is false; write trainer.use_cpu: true")
    if _started_one_of_several(environment):
        problems.append(
            "MASTER_ADDR is set beside ACCELERATE_USE_CPU, and no WORLD_SIZE: accelerate launch was asked for several "
            "processes and started one, as it does with --cpu and without a GPU; "
            f"start with {COMMANDS}; where one process is meant, unset MASTER_ADDR or start with python"
        )
    if problems:
        raise StartupError("\n".join(problems))


def _started_one_of_several(environment: Mapping[str, str]) -> bool:
    alone = not any(name in environment for name in (*SIZES, "LOCAL_RANK"))
    return alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment


def _value_of(config: Config, key: str) -> object:
    value: object = getattr(config.trainer, key.removeprefix("trainer."))
    return value
