"""What a checkpoint holds and when it is saved; `commit` has the write protocol, `retention` what is kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neobert.config.load import saved_text
from neobert.data.rows.loader import merge_states
from neobert.data.tokenizer import tokenizer_info
from neobert.optim.sharded_weights import whole
from neobert.train.checkpoint.commit import SaveResult, Write
from neobert.train.checkpoint.identity import describe_groups
from neobert.train.checkpoint.replicas import check_replicas
from neobert.train.checkpoint.retention import is_milestone, prune
from neobert.train.checkpoint.sharded_state import OPTIMIZER_FILE, build_shard_files
from neobert.train.probes.hard_tokens import HARD_TOKENS_FILE
from neobert.train.processes.agreement import PACKAGES, agree, version
from neobert.train.run import Run
from neobert.train.start import FORMAT_VERSION
from neobert.types import TrainState
from neobert.weights.folder import EMA_FILE, HEAD_FILE, MODEL_FILE, is_valid

Copy = Callable[[Tensor], Tensor]


def save_is_due(run: Run, step: int) -> bool:
    """Whether a checkpoint is written after this step: every `trainer.save_steps`, and at milestones."""
    return (run.save_steps > 0 and step % run.save_steps == 0) or is_milestone(run.config.trainer, step)


def save_checkpoint(run: Run, state: TrainState, *, wait: bool = False) -> Path | None:
    """Writes `checkpoints/<step>`; a step that has a valid checkpoint is left as it is. Collective.

    With `trainer.async_save` the state is copied and written while training continues, and `complete_save` says when it
    is there; `wait` writes it before returning. A save that fails is reported and leaves everything as it was.

    Raises:
        RankError: the ranks hold different weights; nothing is written.

    Returns:
        The folder when it is there at once, else None.
    """
    if not run.config.trainer.save_model:
        return None
    complete_save(run, wait=True)
    final = run.output_dir / "checkpoints" / str(state.step)
    if agree(run.runtime, lambda: is_valid(final)):
        return final
    background = run.config.trainer.async_save and not wait
    with run.tracker.paused(), run.stop.timing_save():
        check_replicas(run, state)
        state = run.tracker.add_interval(run.guard.add_skipped(state))
        data_states = run.runtime.gather_to_main(state.data)
        data_state = merge_states(data_states) if state.data and data_states else {}
        if data_state:
            note_bad_records(run, state, run.data.counters(data_state))
        run.committer.begin(state.step, _build_files(run, state, data_state, background), background=background)
    return None if background else complete_save(run, wait=True)


def note_bad_records(run: Run, state: TrainState, counters: Mapping[str, int]) -> None:
    """Notes how many bad records were skipped up to `state`, where there are more than were known."""
    if counters["bad"]:
        run.tracker.note_once("bad_records", state.step, **counters)


def complete_save(run: Run, *, wait: bool = False) -> Path | None:
    """Reports a save that has ended and deletes what it makes superfluous; called after every step. Collective.

    Returns:
        The new checkpoint; None while a save is being written, when it failed, and when there is none.
    """
    outcome = run.committer.poll(wait=wait)
    if outcome is None:
        return None
    if outcome.path is None:
        _report_failure(run, outcome)
        return None
    run.stop.note_save(outcome.seconds)
    rate = outcome.num_bytes / 1e9 / max(outcome.seconds, 1e-9)
    run.tracker.event(
        "saved",
        outcome.step,
        path=str(outcome.path),
        bytes=outcome.num_bytes,
        seconds=round(outcome.seconds, 3),
        manifest=outcome.manifest,
    )
    run.tracker.say(f"saved {outcome.path}/ ({outcome.num_bytes / 1e6:,.1f} MB, {rate:.2f} GB/s)")
    if run.runtime.is_main:
        try:
            _, problems = prune(run.output_dir, run.config.trainer)
        except OSError as error:
            problems = [f"old checkpoints could not be looked through: {error}"]
        for problem in problems:
            run.tracker.event("prune_failed", outcome.step, problem=problem)
            run.tracker.warn(f"{problem}; the next save tries again")
    return outcome.path


def _report_failure(run: Run, outcome: SaveResult) -> None:
    assert outcome.problem is not None
    run.tracker.event("save_failed", outcome.step, problem=outcome.problem)
    if run.committer.gave_up:
        after = "this cannot be tried again" if outcome.fatal else "that was the third failure in a row"
        after += ": the run stops, since it would continue without checkpoints"
    else:
        after = "older checkpoints are untouched, training continues and the next save tries again"
    run.tracker.warn(f"the checkpoint of step {outcome.step} was not saved: {outcome.problem}; {after}")


def estimate_bytes(module: nn.Module, *, averaged: bool = False) -> int:
    """Size of a checkpoint before there is one: the weights, two more of each for the optimizer, and their average."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return weights * (2 if averaged else 1) + 2 * trained


# ---- what is written ----


def _build_files(run: Run, state: TrainState, data_state: dict[str, Any], background: bool) -> dict[str, Write]:
    """This rank's files as functions that write them; in the background they own everything they write."""
    copy: Copy = _copy_to_host if background else torch.Tensor.detach
    random_states = _read_rng_state(run)
    files: dict[str, Write] = {f"random_states_{run.runtime.rank}.pkl": _saver(random_states)}
    if run.engine.shards:
        files |= build_shard_files(run.runtime.rank, run.optimizer, copy)
    weights = run.module.state_dict()
    kinds = {MODEL_FILE: _gather(weights, copy, keep=run.runtime.is_main)}
    if run.average is not None and run.average.started:
        kinds[EMA_FILE] = _gather(weights | run.average.tensors(), copy, keep=run.runtime.is_main)
    if run.hard_tokens is not None:
        kinds[HARD_TOKENS_FILE] = run.hard_tokens.read()
    if not run.runtime.is_main:
        return files
    schedule = {"name": run.config.scheduler.name, "step": state.step, "lr": run.schedule(state.step)}
    config_text = saved_text(run.config)
    texts = {
        "config.yaml": config_text,
        "model_config.json": json.dumps(run.model_config.to_dict(), indent=2) + "\n",
        "tokenizer_info.json": json.dumps(tokenizer_info(run.tokenizer), indent=2) + "\n",
        "train_state.json": json.dumps(_describe_state(run, state, data_state, config_text)) + "\n",
    }
    if (head := run.module.describe_head()) is not None:
        texts[HEAD_FILE] = json.dumps(head, indent=2) + "\n"
    for name, tensors in kinds.items():
        files[name] = _weight_writer(tensors)
    if not run.engine.shards:
        files[OPTIMIZER_FILE] = _saver(map_tensors(run.optimizer.state_dict(), copy))
    files["scheduler.bin"] = _saver(schedule)
    files["custom_checkpoint_0.pkl"] = _saver(_count(run, state, data_state))
    files["tokenizer"] = run.tokenizer.save
    return files | {name: _text_writer(text) for name, text in texts.items()}


def _gather(tensors: Mapping[str, Tensor], copy: Copy, *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the host, one after the other; nothing without `keep`. Of sharded ones, collective."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            gathered[name] = copy(full).cpu().contiguous()
    return gathered


def _saver(value: Any) -> Write:
    return lambda path: torch.save(value, path)


def _weight_writer(weights: dict[str, Tensor]) -> Write:
    return lambda path: save_file(weights, path, metadata={"format": "pt"})


def _text_writer(text: str) -> Write:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _copy_to_host(tensor: Tensor) -> Tensor:
    # `.cpu()` of a CPU tensor is the tensor itself, which the next step overwrites.
    return tensor.detach().to("cpu", copy=True)


def map_tensors(tree: Any, function: Copy) -> Any:
    """A nest of dicts, lists and tuples with `function` applied to its tensors; containers are made again."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def _read_rng_state(run: Run) -> dict[str, Tensor]:
    # Every step seeds torch from its number, so these states are not needed to continue; they keep the usual layout.
    states = {"torch": torch.get_rng_state()}
    if run.runtime.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(run.runtime.device)
    return states


def _count(run: Run, state: TrainState, data_state: dict[str, Any]) -> dict[str, int]:
    """Counters under the names that other trainers use; a batch is one micro-batch of one process."""
    lanes = data_state.get("lanes", {})
    all_opened = len(lanes) == data_state.get("num_lanes", 0)
    epochs = min((lane.get("epoch", 0) for lane in lanes.values()), default=0) if all_opened else 0
    per_batch = run.config.trainer.micro_batch_rows * run.runtime.world
    batches = data_state.get("next_row", 0) // per_batch
    in_epoch = batches
    if epochs and (run.data.num_rows or run.data.num_tokens):
        slots = run.config.dataset.max_seq_length
        rows = run.data.num_rows or (run.data.num_tokens or 0) / slots
        in_epoch = max(0, batches - round(epochs * rows / per_batch))
    return {
        "step": state.step,
        "tokens": state.tokens,
        "targets": state.targets,
        "documents": state.documents,
        "epochs": epochs,
        "batches": batches,
        "batches_in_epoch": in_epoch,
    }


def _describe_state(run: Run, state: TrainState, data_state: dict[str, Any], config_text: str) -> dict[str, Any]:
    evaluation = run.tracker.evaluation(state.step)
    return {
        "version": FORMAT_VERSION,
        **asdict(state),
        "data": data_state,
        "eval_loss": None if evaluation is None else evaluation.loss,
        # Of an evaluation that is not compared by its loss.
        **(
            {}
            if evaluation is None or evaluation.criterion == evaluation.loss
            else {"eval_criterion": evaluation.criterion}
        ),
        "eval_test": run.eval_test,
        "rows_per_step": run.rows_per_step,
        "num_steps": run.num_steps,
        "stream_lanes": run.stream_lanes,
        "data_fingerprint": run.data.fingerprint,
        "tokenizer_digest": run.tokenizer.digest,
        "special_ids": list(run.tokenizer.special_ids),
        "optimizer_groups": describe_groups(run.optimizer.param_groups),
        "teacher_digest": None if run.teacher is None else run.teacher.digest,
        "config_digest": "sha256:" + sha256(config_text.encode()).hexdigest(),
        "world_size": run.runtime.world,
        "torch_version": torch.__version__,
        "versions": {name: version(name) for name in PACKAGES},
        "lineage": describe_lineage(run),
    }


def describe_lineage(run: Run) -> list[dict[str, Any]]:
    """The resumes that led here, oldest first: the checkpoint, its step, and what was declared."""
    if run.checkpoint is None or run.saved is None:
        return []
    entry = {
        "checkpoint": str(run.checkpoint),
        "step": run.saved["step"],
        "resume_allow": list(run.config.trainer.resume_allow),
    }
    return [*run.saved.get("lineage", []), entry]
