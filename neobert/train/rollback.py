"""Back to an older checkpoint when the numbers have gone bad, past the rows that were trained on since.

PaLM (Chowdhery et al., arXiv 2204.02311, section 5.1) restarted 100 steps before a spike and passed over the batches
in between: the same rows from another state did no harm. Which rows are passed over is part of the training state, so
every later resume passes over them too.
"""

from dataclasses import replace

from neobert.train.agreement import sharing_errors
from neobert.train.checkpoint import complete_save
from neobert.train.resume import resume_or_start
from neobert.train.run import Run
from neobert.train.start import read_checkpoint_config, read_train_state
from neobert.types import TrainState
from neobert.weights.folder import checkpoint_steps, is_valid

MAX_ROLLBACKS = 3
"""Of one run: data that is bad everywhere is not passed over for ever."""


def roll_back(run: Run, state: TrainState) -> TrainState | None:
    """Loads the newest checkpoint at least `trainer.rollback_steps` old; None when that is not wanted or not possible.

    Collective. Checkpoints after it belong to an abandoned branch and are renamed.
    """
    distance = run.config.trainer.rollback_steps
    if distance is None:
        return None
    if len(state.skip_rows) >= MAX_ROLLBACKS:
        run.tracker.warn(f"trainer.rollback_steps: this run has gone back {MAX_ROLLBACKS} times already")
        return None
    complete_save(run, wait=True)
    folder = run.output_dir / "checkpoints"
    old_enough = [step for step in checkpoint_steps(run.output_dir) if step <= state.step - distance]
    steps = [step for step in old_enough if is_valid(folder / str(step))]
    target = run.runtime.gather_objects(max(steps, default=None))[0]
    if target is None:
        run.tracker.warn(f"trainer.rollback_steps: no checkpoint is {distance} steps older than step {state.step}")
        return None
    run.tracker.flush()  # What was skipped is noted before its steps leave the log.
    checkpoint = folder / str(target)
    with sharing_errors(run.runtime):
        back = replace(
            run,
            checkpoint=checkpoint,
            saved=read_train_state(checkpoint),
            checkpoint_config=read_checkpoint_config(checkpoint),
        )
        saved = resume_or_start(back)
    # The abandoned steps are no first attempt at those that follow, which have other rows.
    run.tracker.forget_replay()
    rows = (saved.data["next_row"], state.data["next_row"])
    run.tracker.event("rolled_back", saved.step, from_step=state.step, rows=rows)
    run.tracker.warn(
        f"trainer.rollback_steps: back from step {state.step} to the checkpoint of step {saved.step}; "
        f"rows {rows[0]} to {rows[1] - 1} are passed over ({len(state.skip_rows) + 1} of at most {MAX_ROLLBACKS} times)"
    )
    return replace(saved, skip_rows=[*state.skip_rows, rows])
