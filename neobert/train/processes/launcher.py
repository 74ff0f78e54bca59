"""What the launcher of this process asked for: how many processes there are, and the settings of `accelerate launch`.

A process that was started alone looks like a run of one process, and silently trains as one: `accelerate launch
--cpu --num_processes 2` starts one (only a GPU makes it start several), `srun` and `mpirun` start several that do not
know each other. What they were asked for is in the environment:

| launcher | variable |
|---|---|
| torchrun, `accelerate launch --multi_gpu`, PyTorchJob | `WORLD_SIZE` |
| mpirun | `OMPI_COMM_WORLD_SIZE`, `PMI_SIZE`, `MV2_COMM_WORLD_SIZE` |
| srun | `SLURM_STEP_NUM_TASKS` |
| `accelerate launch` that starts one | `MASTER_ADDR` beside `ACCELERATE_USE_CPU`: only when several were requested |

`accelerate launch`, its flags and its config file are read from the environment too: each setting is the value of a
key (`REQUESTS`). A key that the config leaves open takes it; a key that is set to something else is an error, and so is
what nothing here does. A precision of `no` and one accumulated batch are what the launcher writes when nobody asked.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from neobert.config.fields import FIELDS
from neobert.config.rules import validate
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.key import show_value

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables with the number of processes that were asked for."""

START = (
    "torchrun --nproc_per_node N SCRIPT CONFIG, or accelerate launch --multi_gpu --num_processes N SCRIPT CONFIG (on a "
    "CPU too)"
)
"""What starts N processes that know each other."""

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; its ZeRO stages are trainer.parallel: fsdp2 here",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; trainer.parallel: fsdp2 shards a model here",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config is not read, and only data is split here; write "
    "trainer.parallel: hsdp with trainer.shard_size for replicas of shards",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker is not supported",
}
"""Variable of `accelerate launch` -> why it is refused, with the replacement."""

REQUESTS: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "ACCELERATE_MIXED_PRECISION": ("trainer.mixed_precision", {"bf16": ("bf16",)}),
    "ACCELERATE_USE_CPU": ("trainer.device", {"true": ("cpu",)}),
    "ACCELERATE_DYNAMO_BACKEND": (
        "trainer.torch_compile_backend",
        {name: (name,) for name in ("inductor", "aot_eager", "eager")},
    ),
}
"""Variable -> key -> what each of its values may be there, the one that an open key takes first."""

FSDP_REQUESTS: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "FSDP_VERSION": ("trainer.parallel", {"2": ("fsdp2", "hsdp")}),
    "FSDP_RESHARD_AFTER_FORWARD": ("trainer.reshard_after_forward", {"true": (True,), "false": (False,)}),
    "FSDP_ACTIVATION_CHECKPOINTING": ("trainer.gradient_checkpointing", {"true": (True,)}),
}
"""The same beside `ACCELERATE_USE_FSDP: true`."""

FSDP_UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": "weights stay on the device; write fsdp_offload_params: false and use more processes",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activations stay on the device; write false",
    "FSDP_IGNORED_MODULES": "every weight is sharded; remove it",
}
"""The same for settings of FSDP; what else there is (how modules are wrapped, prefetching, loading, types of state
dicts) has no counterpart: every block is a unit, and a checkpoint holds whole weights and sharded optimizer state."""

_NOTHING = ("", "no", "none", "false", "0", "off")


def check_world(world: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raises when fewer processes found each other than the launcher was asked for: it started unconnected ones.

    Raises:
        StartupError: with the variable, both numbers and the remedy.
    """
    for name in SIZES:
        asked = environment.get(name, "1")
        if asked.isdecimal() and int(asked) > world:
            raise StartupError(
                f"the launcher started {asked} processes ({name}), but this one sees {world}; start with `{START}`, "
                f"one launcher on every machine; where one process is meant, unset {name}"
            )


def bind_launcher(config: Config, environment: Mapping[str, str] = os.environ) -> tuple[Config, list[str]]:
    """The config with what was asked of `accelerate launch`, and what to say about it. Before any work.

    Raises:
        StartupError: it asked for what the config does not say or this program does not do; with every such variable
            and its remedy.
    """
    problems = list(_find_unsupported(environment))
    taken: dict[str, Any] = {}
    notes = []
    for name, key, values in _find_requests(environment):
        value, now = values[0], FIELDS[key].value_in(config)
        if now in values or (key == "trainer.device" and config.trainer.means_cpu):
            continue
        if is_open(config, key):
            taken[key] = value
            notes.append(f"{name}: {environment[name]}: {key} is {show_value(value)}")
        else:
            problems.append(
                f"{name}: {environment[name]}, but {key} is {show_value(now)}; write {key}: {show_value(value)}, or "
                "leave it to the launcher by removing the key"
            )
    if _started_one_of_several(environment):
        problems.append(
            "MASTER_ADDR is set beside ACCELERATE_USE_CPU, and no WORLD_SIZE: accelerate launch was asked for several "
            "processes and started one, as it does with --cpu and without a GPU; "
            f"start with {START}; where one process is meant, unset MASTER_ADDR or start with python"
        )
    if problems:
        raise StartupError("\n".join(problems))
    if not taken:
        return config, []
    fields = {key.removeprefix("trainer."): value for key, value in taken.items()}
    bound = replace(config, trainer=replace(config.trainer, **fields), explicit=config.explicit | taken.keys())
    if errors := validate(bound):
        raise StartupError("\n  ".join(["the config does not fit what accelerate launch was asked for:", *errors]))
    return bound, notes


def is_open(config: Config, key: str) -> bool:
    """Whether a config leaves a key to the launcher: it is auto or null, or was not written."""
    value = FIELDS[key].value_in(config)
    return value in (None, "auto") or (key not in config.explicit and value == FIELDS[key].default)


def _find_unsupported(environment: Mapping[str, str]) -> Iterator[str]:
    for name, why in (*UNSUPPORTED.items(), *(FSDP_UNSUPPORTED.items() if _uses_fsdp(environment) else ())):
        if environment.get(name, "").lower() not in _NOTHING:
            yield (
                f"{name}: {environment[name]}: {why}; start with {START}, without a config file of accelerate that "
                "chooses it (unset the variable where it was exported)"
            )
    for name, (key, values) in _list_requests(environment):
        value = environment.get(name, "").lower()
        if value not in (*values, *_NOTHING) and name != "FSDP_VERSION":
            yield f"{name}: {value} is not supported; {key} may be asked for as {' or '.join(values)}, or in the config"
    if _uses_fsdp(environment) and environment.get("FSDP_VERSION", "1") != "2":
        yield (
            "ACCELERATE_USE_FSDP: true with FSDP_VERSION: 1: FSDP1 is not supported, FSDP2 replaces it; write "
            "fsdp_version: 2 in the config file of accelerate (or --fsdp_version 2), or start without FSDP there and "
            "write trainer.parallel: fsdp2"
        )


def _find_requests(environment: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Variable, key, and the values of the key that it means."""
    for name, (key, values) in _list_requests(environment):
        value = environment.get(name, "").lower()
        if value in values:
            yield name, key, values[value]
            if key == "trainer.torch_compile_backend":
                yield name, "trainer.torch_compile", (True,)
    batches = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if batches.isdecimal() and batches != "1":
        yield "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "trainer.gradient_accumulation_steps", (int(batches),)


def _list_requests(environment: Mapping[str, str]) -> list[tuple[str, tuple[str, dict[str, tuple[Any, ...]]]]]:
    return [*REQUESTS.items(), *(FSDP_REQUESTS.items() if _uses_fsdp(environment) else ())]


def _uses_fsdp(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_FSDP", "").lower() not in _NOTHING


def _started_one_of_several(environment: Mapping[str, str]) -> bool:
    alone = not any(name in environment for name in (*SIZES, "LOCAL_RANK"))
    return alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
