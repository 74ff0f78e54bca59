"""Checkpoints: one folder a step that is either complete or not there.

A save writes every file into `checkpoints/.tmp-<step>`, flushes files and folders to disk, and renames the folder to
`checkpoints/<step>`; a kill at any instant leaves the old checkpoints and perhaps a temporary folder that the next save
sweeps away. Only rank 0 creates, renames or deletes folders. Pickles are read as plain tensors and numbers only.
"""

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from neobert.config.load import config_to_yaml
from neobert.data.loader import merge_states
from neobert.data.tokenizer import tokenizer_info
from neobert.model.config import ModelConfig
from neobert.train.run import Run
from neobert.train.runtime import StartupError
from neobert.train.start import FORMAT_VERSION, read_train_state
from neobert.types import TrainState
from neobert.weights.folder import checkpoint_steps

SOURCE_KEYS = ("path", "name", "config", "revision", "streaming", "train_split")
"""Keys of `dataset` that choose the source: changing one of them on resume starts the data order anew."""


def save_checkpoint(run: Run, state: TrainState) -> Path | None:
    """Writes `checkpoints/<step>` and deletes the oldest ones beyond `trainer.save_total_limit`.

    Returns the folder, or None when `trainer.save_model` is false. A step that has a checkpoint is left as it is.
    """
    if not run.config.trainer.save_model:
        return None
    folder = run.output_dir / "checkpoints"
    final, temporary = folder / str(state.step), folder / f".tmp-{state.step}"
    if final.is_dir():
        return final
    with run.tracker.paused(), run.stop.timing_save():
        state = run.guard.settled(state)
        data_states = run.runtime.gather_objects(state.data)
        if run.runtime.is_main:
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        run.runtime.barrier()
        _write_rng_state(run, temporary)
        run.runtime.barrier()
        if run.runtime.is_main:
            _write_files(run, state, merge_states(data_states) if state.data else {}, temporary)
            _flush_tree(temporary)
            temporary.rename(final)
            _flush(folder)
            _prune(run)
        run.runtime.barrier()
    run.tracker.event("saved", state.step, path=str(final))
    run.tracker.say(f"saved {final}/")
    return final


def _write_rng_state(run: Run, folder: Path) -> None:
    # Every step seeds torch from its number, so these states are not needed to continue; they keep the usual layout.
    states = {"torch": torch.get_rng_state()}
    if run.runtime.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(run.runtime.device)
    torch.save(states, folder / f"random_states_{run.runtime.rank}.pkl")


def _write_files(run: Run, state: TrainState, data_state: dict[str, Any], folder: Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in run.module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(run.optimizer.state_dict(), folder / "optimizer.bin")
    schedule = {"name": run.config.scheduler.name, "step": state.step, "lr": run.schedule(state.step)}
    torch.save(schedule, folder / "scheduler.bin")
    counters = {"step": state.step, "tokens": state.tokens, "targets": state.targets, "documents": state.documents}
    torch.save(counters, folder / "custom_checkpoint_0.pkl")
    (folder / "config.yaml").write_text(config_to_yaml(run.config))
    (folder / "model_config.json").write_text(json.dumps(run.model_config.to_dict(), indent=2) + "\n")
    run.tokenizer.save(folder / "tokenizer")
    (folder / "tokenizer_info.json").write_text(json.dumps(tokenizer_info(run.tokenizer), indent=2) + "\n")
    saved = {
        "version": FORMAT_VERSION,
        **asdict(state),
        "data": data_state,
        "rows_per_step": run.rows_per_step,
        "data_fingerprint": run.data.fingerprint,
        "tokenizer_digest": run.tokenizer.digest,
        "world_size": run.runtime.world,
        "torch_version": torch.__version__,
    }
    (folder / "train_state.json").write_text(json.dumps(saved) + "\n")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    # A rename can reach the disk before the data it names: without this a power loss leaves empty files.
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _prune(run: Run) -> None:
    keep = run.config.trainer.save_total_limit
    if not keep:
        return
    folder = run.output_dir / "checkpoints"
    for step in checkpoint_steps(run.output_dir)[:-keep]:
        # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint under a valid name.
        trash = folder / f".tmp-trash-{step}"
        (folder / str(step)).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def resume_or_start(run: Run) -> TrainState:
    """The state to go on from: step 0, or the checkpoint chosen at start-up, loaded into model and optimizer.

    Raises:
        StartupError: the checkpoint does not fit this run; the message names what differs and what to write.
    """
    if run.checkpoint is None:
        run.tracker.begin(TrainState())
        return TrainState()
    saved = read_train_state(run.checkpoint)
    _check_fits(run, saved)
    run.module.load_state_dict(load_file(run.checkpoint / "model.safetensors"), strict=True)
    run.module.check_tied()
    optimizer_state = torch.load(run.checkpoint / "optimizer.bin", map_location=run.runtime.device, weights_only=True)
    run.optimizer.load_state_dict(optimizer_state)
    _load_rng_state(run, saved)
    state = TrainState(**{f.name: saved[f.name] for f in fields(TrainState) if f.name in saved})
    if _source_was_switched(run, saved):
        run.tracker.event("source_switched", state.step, old=saved["data_fingerprint"], new=run.data.fingerprint)
        run.tracker.warn(
            "the dataset settings differ from the checkpoint's: model, optimizer, schedule and step continue, "
            "the data order starts at the first row of the new source"
        )
        state = TrainState(step=state.step, tokens=state.tokens, targets=state.targets, documents=state.documents)
    if run.runtime.is_main and run.checkpoint.parent == run.output_dir / "checkpoints":
        _supersede_later_steps(run, state.step)
    run.tracker.begin(state)
    run.tracker.event("resumed", state.step, path=str(run.checkpoint))
    return state


def _check_fits(run: Run, saved: dict[str, Any]) -> None:
    assert run.checkpoint is not None
    theirs = ModelConfig.from_dict(json.loads((run.checkpoint / "model_config.json").read_text())).to_dict()
    ours = run.model_config.to_dict()
    differences = [
        f"model.{k}: the checkpoint has {theirs[k]!r}, the config {ours[k]!r}" for k in ours if ours[k] != theirs[k]
    ]
    if differences:
        raise StartupError(
            f"{run.checkpoint} holds another architecture:\n  "
            + "\n  ".join(differences)
            + "\nwrite the checkpoint's values into the config, or start a new trainer.output_dir"
        )
    if saved["rows_per_step"] != run.rows_per_step:
        per_micro_step = run.config.trainer.per_device_train_batch_size * run.runtime.world
        accumulation, rest = divmod(saved["rows_per_step"], per_micro_step)
        advice = (
            f"write trainer.gradient_accumulation_steps: {accumulation}"
            if not rest
            else f"write trainer.global_batch_size: {saved['rows_per_step']} and a trainer.per_device_train_batch_size "
            f"that divides {saved['rows_per_step']} / {run.runtime.world} processes"
        )
        raise StartupError(
            f"{run.checkpoint} was trained with {saved['rows_per_step']} rows a step; "
            f"this start would use {run.rows_per_step}; {advice}"
        )


def _source_was_switched(run: Run, saved: dict[str, Any]) -> bool:
    assert run.checkpoint is not None
    if saved["data_fingerprint"] == run.data.fingerprint or not saved["data"]:
        return False
    from_checkpoint = run.checkpoint_config.dataset if run.checkpoint_config is not None else run.config.dataset
    if any(getattr(from_checkpoint, key) != getattr(run.config.dataset, key) for key in SOURCE_KEYS):
        return True
    raise StartupError(
        f"the data under this run changed: {run.checkpoint} was trained on a source with fingerprint "
        f"{saved['data_fingerprint']}, the same settings now find {run.data.fingerprint}; restore the files, or name "
        "the new source with dataset.path or dataset.name to go on with it from its first row"
    )


def _load_rng_state(run: Run, saved: dict[str, Any]) -> None:
    assert run.checkpoint is not None
    path = run.checkpoint / f"random_states_{run.runtime.rank}.pkl"
    if not path.is_file():
        if run.runtime.rank < saved["world_size"]:
            raise StartupError(f"{path} is missing: the checkpoint is damaged, choose another step")
        return  # More processes than before: every step seeds torch from its number, nothing is lost.
    states = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(states["torch"])
    if "cuda" in states and run.runtime.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], run.runtime.device)


def _supersede_later_steps(run: Run, step: int) -> None:
    """Renames checkpoints of later steps, so that `latest` means the branch that is trained now."""
    folder = run.output_dir / "checkpoints"
    for later in checkpoint_steps(run.output_dir):
        if later > step:
            target = folder / f".superseded-{later}"
            if target.exists():
                shutil.rmtree(target)
            (folder / str(later)).rename(target)
            run.tracker.say(f"checkpoint {later} belongs to the old branch: renamed to {target.name}")
