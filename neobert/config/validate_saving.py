"""Rules about what a run keeps: its checkpoints, going on from them or back to them, the average of its weights."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.resume_rules import ALLOWED, FIXED
from neobert.config.schema import Config


def check_saving(config: Config) -> Iterator[str]:
    """Keys about checkpoints that no checkpoint is written for."""
    trainer = config.trainer
    writes_steps = trainer.save_model and trainer.save_strategy == "steps"
    for key, given in (
        ("trainer.save_milestone_steps", bool(trainer.save_milestone_steps)),
        ("trainer.save_milestone_every", trainer.save_milestone_every is not None),
        ("trainer.save_best", trainer.save_best),
        ("trainer.async_save", trainer.async_save),
    ):
        if given and not writes_steps:
            reason = "trainer.save_model is false" if not trainer.save_model else "trainer.save_strategy is no"
            yield f"{key}: {FIELDS[key].value_in(config)} has no effect, {reason}; remove one of the two"
    evaluates = trainer.eval_strategy == "steps" and trainer.eval_steps >= 1
    saves = trainer.save_best and writes_steps and trainer.save_steps >= 1
    if saves and not (evaluates and trainer.save_steps % trainer.eval_steps == 0):
        yield (
            f"trainer.save_best: true needs an evaluation at every save, but trainer.save_steps = {trainer.save_steps}"
            f" is not a multiple of trainer.eval_steps = {trainer.eval_steps if evaluates else 0}; make it one"
        )


def check_rollback(config: Config) -> Iterator[str]:
    """Going back needs checkpoints on the way."""
    trainer = config.trainer
    if trainer.rollback_steps is None:
        return
    for key, never in (
        ("trainer.save_model", not trainer.save_model),
        ("trainer.save_strategy", trainer.save_strategy == "no"),
        ("trainer.save_steps", trainer.save_steps == 0),
    ):
        if never:
            yield (
                f"trainer.rollback_steps: {trainer.rollback_steps} goes back to a checkpoint, but"
                f" {key} = {FIELDS[key].value_in(config)} writes none on the way; write null for it or save more often"
            )
            return


def check_resume_allow(config: Config) -> Iterator[str]:
    """Keys that may be declared to change on resume."""
    for key in config.trainer.resume_allow:
        if key in FIXED:
            yield f"trainer.resume_allow: {key} can never change on resume: start a new run with it"
        elif key in FIELDS and key not in ALLOWED:
            yield f"trainer.resume_allow: {key} may change without being declared; remove it"
        elif key not in FIELDS:
            yield f"trainer.resume_allow: {key} is no key; the keys that can be declared are {', '.join(ALLOWED)}"


def check_average(config: Config) -> Iterator[str]:
    """The moving average of the weights."""
    trainer = config.trainer
    start, steps = trainer.ema_start_step, trainer.max_steps
    if start and trainer.ema_decay is None:
        yield f"trainer.ema_start_step: {start} has no effect without trainer.ema_decay; set that, or remove this key"
    elif trainer.ema_decay is not None and steps is not None and start >= max(steps, 1):
        yield (
            f"trainer.ema_start_step: {start} is not before the end of the run at trainer.max_steps = {steps}; lower it"
        )
    if trainer.ema_decay is not None and config.model.ngpt:
        yield (
            f"trainer.ema_decay: {trainer.ema_decay}, but the mean of vectors of length 1 is shorter, and those of"
            " model.ngpt: true must have length 1; remove it"
        )
