"""Rules about what changes over a run: the learning rate, and the rows of a step."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config, SchedulerSection

FILL_THE_RUN = ("cosine", "linear")
"""Schedules whose decay takes all the time from the warm-up on; the others may have a cool-down."""


def check_schedule(config: Config) -> Iterator[str]:
    """Errors of `scheduler`."""
    schedule = config.scheduler
    for unit in ("steps", "percent"):
        warmup_key, decay_key = f"scheduler.warmup_{unit}", f"scheduler.decay_{unit}"
        warmup, decay = FIELDS[warmup_key].value_in(config), FIELDS[decay_key].value_in(config)
        wins = unit == "percent" or (schedule.warmup_percent is None and schedule.decay_percent is None)
        if wins and warmup is not None and decay is not None and decay <= warmup:
            yield (
                f"{decay_key}: {decay} is where the decay ends, counted from the start of the run, so it must be"
                f" greater than {warmup_key} = {warmup}"
            )
    yield from _check_cooldown(config)


def _check_cooldown(config: Config) -> Iterator[str]:
    schedule = config.scheduler
    explicit = schedule.cooldown_steps is not None or schedule.cooldown_percent is not None
    if schedule.name == "wsd" and not explicit:
        yield (
            "scheduler.cooldown_percent: null, but scheduler.name: wsd needs the length of its decay; write 10, or"
            " scheduler.cooldown_steps, or scheduler.name: constant for a run without one"
        )
    if explicit and schedule.name not in FILL_THE_RUN:
        yield from _check_room(schedule)


def _check_room(schedule: SchedulerSection) -> Iterator[str]:
    if schedule.cooldown_percent is not None:
        if schedule.warmup_percent is not None:
            end = 100 if schedule.decay_percent is None else schedule.decay_percent
            if schedule.cooldown_percent + schedule.warmup_percent > end:
                yield (
                    f"scheduler.cooldown_percent: {schedule.cooldown_percent} + scheduler.warmup_percent ="
                    f" {schedule.warmup_percent} is more than the end of the decay, {end}; lower one of them"
                )
    elif schedule.cooldown_steps is not None and schedule.warmup_percent is None and schedule.decay_percent is None:
        end_step = schedule.decay_steps
        if end_step is not None and schedule.cooldown_steps + schedule.warmup_steps > end_step:
            yield (
                f"scheduler.cooldown_steps: {schedule.cooldown_steps} + scheduler.warmup_steps ="
                f" {schedule.warmup_steps} is more than scheduler.decay_steps = {end_step}, where the decay ends; lower"
                " one of them"
            )


def warn_about_schedule(config: Config, steps: int | None) -> Iterator[str]:
    """What of the schedule does not fit into a run of `steps`; nothing when their number is not known."""
    schedule = config.scheduler
    if steps is None:
        return
    reference = schedule.total_steps or steps
    key, warmup = "scheduler.warmup_steps", schedule.warmup_steps
    if schedule.warmup_percent is not None:
        key, warmup = "scheduler.warmup_percent", int(reference * schedule.warmup_percent / 100)
    if warmup > steps:
        yield (
            f"{key}: the warm-up takes {warmup} steps but the run has {steps}: the learning rate never reaches"
            " optimizer.lr; lower it, or write scheduler.warmup_percent"
        )
    end = int(reference * schedule.decay_percent / 100) if schedule.decay_percent is not None else schedule.decay_steps
    end = end if end is not None else reference
    decays = schedule.name in FILL_THE_RUN or schedule.cooldown_steps or schedule.cooldown_percent
    if end > steps and warmup <= steps and decays:
        yield (
            f"scheduler: the decay ends at step {end} but the run has {steps} steps: the learning rate will not reach"
            " optimizer.lr * scheduler.final_lr_ratio"
        )
    cooldown, room = schedule.cooldown_steps, end - min(warmup, reference)
    if cooldown is not None and schedule.cooldown_percent is None and cooldown > room and warmup <= steps:
        yield (
            f"scheduler.cooldown_steps: {cooldown}, but there are only {room} steps between the warm-up and the end of"
            f" the decay at step {end}: the cool-down is cut to them; lower it, or write scheduler.cooldown_percent"
        )


def check_batch_warmup(config: Config) -> Iterator[str]:
    """Errors of `trainer.batch_size_warmup_*`."""
    trainer = config.trainer
    start, rows = trainer.batch_size_warmup_start, trainer.per_device_train_batch_size
    if start is None or start < 1:
        return
    if rows != "auto" and rows >= 1 and start % rows:
        yield (
            f"trainer.batch_size_warmup_start: {start} is not a multiple of trainer.per_device_train_batch_size ="
            f" {rows}; write {-(-start // rows) * rows}"
        )
    total = trainer.global_batch_size
    if total is not None and start >= total:
        yield (
            f"trainer.batch_size_warmup_start: {start} rows are no fewer than trainer.global_batch_size = {total};"
            " lower it, or remove the warm-up"
        )
