"""How a run continues from a checkpoint: compare, load, and say what differs.

`identity` decides what may differ. Every pickle is read as plain tensors and numbers (`weights_only`): a file that
would run code is refused.

`roll_back` goes to an older checkpoint when the numbers have gone bad, past the rows that were trained on since. PaLM
(Chowdhery et al., arXiv 2204.02311, section 5.1) restarted 100 steps before a spike and skipped the batches in between:
the same rows from another state did no harm. Which rows are skipped is part of the training state, so every later
resume skips them too.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.errors import StartupError
from neobert.model.config import ModelConfig
from neobert.optim.groups import regroup_state
from neobert.optim.sharded_weights import load_whole
from neobert.train.build import choose_mask_end
from neobert.train.checkpoint.identity import (
    Comparison,
    Facts,
    build_facts,
    check_comparison,
    compare,
    describe_groups,
)
from neobert.train.checkpoint.replicas import check_replicas
from neobert.train.checkpoint.retention import choose_best_of_each, list_scores
from neobert.train.checkpoint.save import complete_save, estimate_bytes
from neobert.train.checkpoint.sharded_state import OPTIMIZER_FILE, OPTIMIZER_FOLDER, load_shards, shard_state
from neobert.train.probes.hard_tokens import HARD_TOKENS_FILE
from neobert.train.processes.agreement import agree, check_equal, sharing_errors
from neobert.train.run import Run
from neobert.train.start import check_free_space, is_own, read_checkpoint_config, read_train_state
from neobert.types import TrainState
from neobert.weights.encoder_weights import UnreadablePickle, load_pickle
from neobert.weights.folder import EMA_FILE, MODEL_FILE, checkpoint_steps, is_valid, valid_steps


def resume_or_start(run: Run) -> TrainState:
    """The state to continue from: step 0, or the checkpoint chosen at start-up, loaded into model and optimizer.
    Collective, within `sharing_errors`.

    The order is identity, weights, optimizer, schedule and counters: nothing is loaded from a checkpoint
    that does not fit.

    Raises:
        StartupError: the checkpoint does not fit this run, or the disk has no room for new ones; the message names
            what differs and what to write.
    """
    if run.config.trainer.save_model:
        agree(
            run.runtime,
            lambda: check_free_space(run.output_dir, estimate_bytes(run.module, averaged=bool(run.average))),
        )
    if run.checkpoint is None or run.saved is None:
        if run.average is not None:
            run.average.begin(0)
        run.tracker.begin(TrainState())
        return TrainState()
    comparison = compare_with_checkpoint(run)
    check_comparison(comparison, str(run.checkpoint), advice_on_batch=_advise_on_batch(run, run.saved))
    check_equal(run.runtime, comparison.describe)
    load_weights(run, run.checkpoint)
    load_average(run, run.checkpoint)
    load_hard_tokens(run, run.checkpoint)
    load_optimizer(run, run.checkpoint)
    check_replicas(run, TrainState(step=run.saved["step"]))
    _check_counters(run.checkpoint, run.saved)
    _check_rng_state(run, run.checkpoint, run.saved)
    state = TrainState.from_saved(run.saved)
    if state.data and not comparison.same_next_batch:
        state = replace(state, data={**state.data, "next_batch_digest": None})
    if comparison.restarts_order:
        state = state.for_new_order()
    if run.runtime.is_main and is_own(run.checkpoint, run.output_dir):
        _supersede_later_steps(run, state.step)
    run.tracker.begin(state)
    _report_resume(run, state, comparison)
    return state


def compare_with_checkpoint(run: Run) -> Comparison:
    """What differs between the checkpoint and this start."""
    saved, config = run.saved, run.checkpoint_config
    assert saved is not None
    assert config is not None
    assert run.checkpoint is not None
    trainer, before = run.config.trainer, config.trainer
    same_micro_batch = trainer.micro_batch_rows == before.micro_batch_rows
    return compare(
        describe_saved_run(run.checkpoint, saved, config),
        describe_run(run),
        trainer.resume_allow,
        same_ranks=same_micro_batch and saved["world_size"] == run.runtime.world,
    )


def describe_saved_run(checkpoint: Path, saved: Mapping[str, Any], config: Config) -> Facts:
    """The facts of the run that a checkpoint is of; `saved` is its `train_state.json`, `config` its config."""
    return build_facts(
        config,
        ModelConfig.from_dict(parse_json((checkpoint / "model_config.json").read_text())),
        saved["data"],
        rows_per_step=saved["rows_per_step"],
        mask_end=choose_mask_end(config, saved.get("num_steps", 0)),
        fingerprint=saved["data_fingerprint"],
        tokenizer_digest=saved["tokenizer_digest"],
        special_ids=saved.get("special_ids"),
        groups=saved.get("optimizer_groups"),
        teacher_digest=saved.get("teacher_digest"),
    )


def describe_run(run: Run) -> Facts:
    """The facts of this start."""
    return build_facts(
        run.config,
        run.model_config,
        asdict(run.data.order),
        rows_per_step=run.rows_per_step,
        mask_end=choose_mask_end(run.config, run.num_steps),
        fingerprint=run.data.fingerprint,
        tokenizer_digest=_digest_of_named_tokenizer(run.config, run.tokenizer),
        special_ids=run.tokenizer.special_ids,
        groups=describe_groups(run.optimizer.param_groups),
        teacher_digest=None if run.teacher is None else run.teacher.digest,
    )


def _digest_of_named_tokenizer(config: Config, used: Tokenizer) -> str:
    """Of the tokenizer that this start's config names, where it is at hand: the run itself uses the checkpoint's."""
    folder = config.tokenizer.path
    if folder is None or not (Path(folder) / "tokenizer.json").is_file():
        return used.digest
    named = load_tokenizer(config.tokenizer)
    return used.digest if named.is_source_of(used.digest) else named.digest


def _advise_on_batch(run: Run, saved: Mapping[str, Any]) -> str:
    rows, per_micro_step = saved["rows_per_step"], run.config.trainer.micro_batch_rows * run.runtime.world
    accumulation, rest = divmod(rows, per_micro_step)
    advice = (
        f"write trainer.gradient_accumulation_steps: {accumulation}"
        if not rest
        else f"write trainer.global_batch_size: {rows} and a trainer.per_device_train_batch_size that divides "
        f"{rows} / {run.runtime.world} processes"
    )
    return f"the checkpoint was trained with {rows} rows a step; this start would use {run.rows_per_step}; {advice}"


def load_weights(run: Run, checkpoint: Path) -> None:
    """The checkpoint's weights into the module.

    Raises:
        StartupError: the file cannot be read.
    """
    tensors = _load_tensors(checkpoint / MODEL_FILE)
    if run.engine.shards:
        load_whole(run.module.state_dict(), tensors)
    else:
        run.module.load_state_dict(tensors, strict=True)


def load_average(run: Run, checkpoint: Path) -> None:
    """The checkpoint's moving average of the weights, where this start keeps one; after `load_weights`.

    Where the checkpoint has none, the average starts with its weights.

    Raises:
        StartupError: the file cannot be read.
    """
    saved, before = run.saved, run.checkpoint_config
    assert saved is not None
    assert before is not None
    step, average = saved["step"], run.average
    had = before.trainer.ema_decay is not None and step >= before.trainer.ema_start_step
    if average is None:
        if had:
            run.tracker.say(f"trainer.ema_decay: null: the average in {checkpoint / EMA_FILE} is not continued")
        return
    average.begin(step, _load_tensors(checkpoint / EMA_FILE) if had else None)
    if had and not average.started:
        run.tracker.say(f"trainer.ema_start_step: {average.start_step}: the average starts again after that step")
    elif average.started and not had:
        run.tracker.say(f"trainer.ema_decay: {checkpoint} has no average; it starts with the weights of step {step:,}")


def load_hard_tokens(run: Run, checkpoint: Path) -> None:
    """What the checkpoint's run knew of tokens, where masks follow it; equal weights where its masks did not.

    Raises:
        StartupError: the file cannot be read, or is that of another vocabulary.
    """
    assert run.saved is not None
    assert run.checkpoint_config is not None
    if run.hard_tokens is not None:
        had = run.checkpoint_config.datacollator.mask_weights == "adaptive"
        saved = _load_tensors(checkpoint / HARD_TOKENS_FILE) if had else None
        shapes = {} if saved is None else {name: tuple(tensor.shape) for name, tensor in saved.items()}
        expected = dict.fromkeys(("before", "after", "counted"), (2, run.hard_tokens.weights.num_tokens))
        if saved is not None and shapes != expected:
            raise StartupError(
                f"{checkpoint / HARD_TOKENS_FILE} has {shapes}, and this run needs {expected}; name another checkpoint"
            )
        run.hard_tokens.begin(run.saved["step"], saved)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read ({error}); choose another step") from error


def load_optimizer(run: Run, checkpoint: Path) -> None:
    """The checkpoint's moments and counts into the optimizer.

    Raises:
        StartupError: the file is damaged.
    """
    groups = run.optimizer.param_groups
    parameters = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    folder = checkpoint / OPTIMIZER_FOLDER
    if folder.is_dir():
        try:
            saved = load_shards(folder, parameters)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StartupError(f"{folder} cannot be read ({error}); choose another step") from error
    else:
        saved = read_pickle(checkpoint / OPTIMIZER_FILE, "cpu" if run.engine.shards else run.runtime.device)
    state = regroup_state(saved, groups)
    run.optimizer.load_state_dict({**state, "state": shard_state(state["state"], parameters.values())})


def read_pickle(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors and plain values of a checkpoint's pickle; code in it is never run.

    Raises:
        StartupError: the file is missing or damaged, or tries to run code.
    """
    try:
        return load_pickle(path, device)
    except FileNotFoundError as error:
        raise StartupError(f"{path} is missing: the checkpoint is damaged, choose another step") from error
    except UnreadablePickle as error:
        raise StartupError(
            f"{path} is damaged, or holds code that is never run ({error}): of a checkpoint's pickles only tensors and "
            "plain values are read, whoever wrote them. Choose another step, or start a new run with its weights, "
            f"which are no pickle: model.init_from: {path.parent}"
        ) from error


def _check_counters(checkpoint: Path, saved: Mapping[str, Any]) -> None:
    for name, key in (("scheduler.bin", "step"), ("custom_checkpoint_0.pkl", "step")):
        found = read_pickle(checkpoint / name)[key]
        if found != saved["step"]:
            raise StartupError(
                f"{checkpoint / name} is of step {found}, train_state.json of step {saved['step']}: files of two "
                "checkpoints are mixed; choose another step"
            )


def _check_rng_state(run: Run, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Every step seeds torch from its number, so nothing is restored: but the checkpoint must be whole."""
    if run.runtime.rank < saved["world_size"]:  # Else there were fewer processes than now.
        read_pickle(checkpoint / f"random_states_{run.runtime.rank}.pkl")


def _report_resume(run: Run, state: TrainState, comparison: Comparison) -> None:
    if comparison.differences:
        run.tracker.say(f"differs from {run.checkpoint} (checkpoint -> now):\n{comparison.table()}")
    for key in comparison.unneeded:
        run.tracker.say(f"trainer.resume_allow: {key} is what it was; it need not be declared")
    if comparison.source_switched:
        fingerprints = {"old": (run.saved or {})["data_fingerprint"], "new": run.data.fingerprint}
        run.tracker.event("source_switched", state.step, **fingerprints)
        run.tracker.warn(
            "the dataset settings differ from the checkpoint's: model, optimizer, schedule and step continue, "
            "the data order starts at the first row of the new source"
        )
    elif comparison.restarts_order:
        keys = [d.key for d in comparison.differences if d.kind == "declared"]
        run.tracker.event("order_restarted", state.step, keys=keys)
        run.tracker.warn(
            f"{', '.join(keys)} changed: model, optimizer, schedule and step continue, the data order starts at the "
            "first row of the new order, so documents of the old one may be read again"
        )
    _report_best(run)
    assert run.checkpoint is not None
    planned, now = read_pickle(run.checkpoint / "scheduler.bin")["lr"], run.schedule(state.step)
    if planned != now:
        run.tracker.say(
            f"learning rate of step {state.step + 1}: {planned:.3e} by the checkpoint's schedule, {now:.3e} by this one"
        )
    declared = [d.key for d in comparison.differences if d.kind == "declared"]
    run.tracker.event("resumed", state.step, path=str(run.checkpoint), declared=declared)


def _report_best(run: Run) -> None:
    """Says that the best checkpoint so far was found by another evaluation than the one of now."""
    if not run.config.trainer.save_best or run.eval_test is None:
        return
    scores = list_scores(run.output_dir, valid_steps(run.output_dir))
    for test, step in choose_best_of_each(scores).items():
        if test != run.eval_test:
            run.tracker.event("best_set_aside", step, eval_loss=scores[step].loss)
            run.tracker.say(
                f"trainer.save_best: checkpoint {step} (evaluation loss {scores[step].loss:.4f}) is the best of "
                "another evaluation, which this one cannot be compared with: it stays, and best.json is chosen again"
            )


def _supersede_later_steps(run: Run, step: int) -> None:
    """Renames checkpoints of later steps, so that `latest` means the branch that is trained now."""
    folder = run.output_dir / "checkpoints"
    for later in checkpoint_steps(run.output_dir):
        if later > step:
            target = folder / f".superseded-{later}"
            number = 1
            while target.exists():
                number += 1
                target = folder / f".superseded-{later}-{number}"
            (folder / str(later)).rename(target)
            run.tracker.say(f"checkpoint {later} is not of the branch that is trained now: renamed to {target.name}")


MAX_ROLLBACKS = 3
"""Of one run: data that is bad everywhere is not skipped forever."""


def roll_back(run: Run, state: TrainState) -> TrainState | None:
    """Loads the newest checkpoint at least `trainer.rollback_steps` old; None when that is not configured or possible.

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

    def choose_target() -> int | None:
        steps = sorted(checkpoint_steps(run.output_dir), reverse=True)
        return next((x for x in steps if x <= state.step - distance and is_valid(folder / str(x))), None)

    target = agree(run.runtime, choose_target)
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
        f"rows {rows[0]} to {rows[1] - 1} are skipped ({len(state.skip_rows) + 1} of at most {MAX_ROLLBACKS} times)"
    )
    return replace(saved, skip_rows=[*state.skip_rows, rows])
