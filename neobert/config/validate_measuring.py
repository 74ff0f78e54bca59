"""Rules about what a run measures: the profiler, and the batch size that it chooses by the memory it finds."""

from collections.abc import Iterator

from neobert.config.schema import Config


def check_automatic_batch(config: Config) -> Iterator[str]:
    """The machine may decide about micro-batches, never about what is trained on."""
    if config.trainer.per_device_train_batch_size != "auto":
        return
    if config.task == "contrastive":
        yield (
            "trainer.per_device_train_batch_size: auto measures steps of pretraining; write the rows that go through"
            " the encoder at once with task: contrastive"
        )
    if config.trainer.global_batch_size is None:
        yield (
            "trainer.per_device_train_batch_size: auto needs trainer.global_batch_size, or the memory of the machine"
            " would decide how many rows a step has; set it, or write a number"
        )
    if config.datacollator.pack_sequences and not config.trainer.enforce_full_packed_batches:
        yield (
            "trainer.per_device_train_batch_size: auto needs trainer.enforce_full_packed_batches: true, since without"
            " it each micro-batch is packed by itself; write true there, or a number here"
        )


def check_profiler(config: Config) -> Iterator[str]:
    """Both keys or none, and a first step that the run makes."""
    trainer = config.trainer
    start, steps = trainer.profiler_steps_start, trainer.profiler_steps
    if (start is None) == (steps >= 1):
        missing, given = "trainer.profiler_steps", f"trainer.profiler_steps_start = {start}"
        if start is None:
            missing, given = "trainer.profiler_steps_start", f"trainer.profiler_steps = {steps}"
        yield f"{missing}: is needed with {given}; give both, or none to profile nothing"
    elif start is not None and trainer.max_steps is not None and start > trainer.max_steps:
        yield (
            f"trainer.profiler_steps_start: {start} is after the last step, trainer.max_steps = {trainer.max_steps};"
            " choose an earlier one"
        )


def late_profiler(config: Config, total_steps: int | None) -> Iterator[str]:
    """Warns of a window behind the end of a run whose length is known only when its data is."""
    start = config.trainer.profiler_steps_start
    if start is not None and total_steps is not None and start > total_steps:
        yield (
            f"trainer.profiler_steps_start: {start} is after the last step of the run, {total_steps}; nothing will be"
            " profiled"
        )
