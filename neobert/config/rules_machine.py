"""Rules over several keys about devices, processes and trackers; see `rules`."""

from collections.abc import Iterator

from neobert.config.schema import Config
from neobert.config.schema_trainer import TRACKER_NAMES
from neobert.key import show_value


def check_device(config: Config) -> Iterator[str]:
    """What a device cannot do."""
    backend, kernel = config.model.attn_backend, config.model.kernel_backend
    trainer = config.trainer
    on_cpu = "trainer.use_cpu is true" if trainer.use_cpu else "trainer.device is cpu"
    if trainer.use_cpu and trainer.device in ("cuda", "mps"):
        yield f"trainer.device: {trainer.device}, but trainer.use_cpu is true; remove one of them"
    if trainer.means_cpu:
        if backend in ("flash_attn_varlen", "flex"):
            remedy = "write model.attn_backend: auto"
            yield f"model.attn_backend: {backend} needs a GPU, but {on_cpu}; {remedy}"
        if kernel == "liger":
            remedy = "write model.kernel_backend: auto"
            yield f"model.kernel_backend: liger needs a GPU, but {on_cpu}; {remedy}"
    elif backend == "flash_attn_varlen" and config.trainer.mixed_precision == "no":
        yield (
            "model.attn_backend: flash_attn_varlen needs trainer.mixed_precision: bf16, it is no;"
            " write model.attn_backend: auto"
        )
    if config.dataset.pin_memory and trainer.means_cpu:
        yield f"dataset.pin_memory: true needs a GPU, but {on_cpu}; write null"


def check_parallel(config: Config) -> Iterator[str]:
    """What sharded weights cannot do."""
    engine, remedy = config.trainer.parallel, "write trainer.parallel: ddp, or"
    if engine not in ("fsdp2", "hsdp"):
        return
    if config.contrastive.learn_temperature:
        yield (
            f"contrastive.learn_temperature: true trains a single number, and trainer.parallel: {engine} splits every "
            f"weight by rows; {remedy} contrastive.learn_temperature: false"
        )
    if config.trainer.bf16_residual:
        yield (
            f"trainer.bf16_residual: true keeps a bf16 copy of all weights, and trainer.parallel: {engine} gathers "
            f"them in bf16 block by block; {remedy} trainer.bf16_residual: false"
        )
    if config.wandb.watch != "off":
        yield (
            f"wandb.watch: {config.wandb.watch} needs whole gradients, and trainer.parallel: {engine} leaves a process "
            f"a part of each; {remedy} wandb.watch: off and trainer.log_statistics: true"
        )


def check_trackers(config: Config) -> Iterator[str]:
    """What `trainer.report_to` names."""
    names = config.trainer.report_to
    if names is None:
        return
    key = f"trainer.report_to: {show_value(names)}"
    for name in names:
        if name not in ("none", "all", *TRACKER_NAMES):
            yield f"trainer.report_to: {name!r} is not one of none, all, {', '.join(TRACKER_NAMES)}"
    for alone in ("none", "all"):
        if alone in names and len(names) > 1:
            yield f"{key} has {alone} beside other names; write {alone}, or the names"
    if config.wandb.enabled and not {"wandb", "all"} & set(names):
        yield f"wandb.enabled: true, but {key} leaves wandb out; write wandb.enabled: false, or add wandb to the list"
