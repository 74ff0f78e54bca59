"""What a stage of a pipeline can run: how it starts and continues, when it is finished, what it gives to the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neobert.config.load import ConfigError, load_config, without_secrets
from neobert.config.nesting import parse_json
from neobert.config.rules import BUDGETS
from neobert.config.schema import Config
from neobert.errors import StartupError, UserError
from neobert.train.checkpoint.run_folder import holds_run
from neobert.train.start import is_own, read_checkpoint_config, read_train_state
from neobert.weights.folder import AVERAGE_FILE, STEPS_KEY, CheckpointError, choose_newest, read_manifest

UNKNOWN = Path("<final checkpoint>")
"""The result of a stage that has not run, in what `--dry-run` prints."""


class PipelineError(UserError, ValueError):
    """The pipeline cannot continue; the message names the stage and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One entry of `stages`."""

    name: str
    """Also the name of its folder."""

    run: str
    """A key of KINDS."""

    config: str | None = None
    """Config file of a training."""

    takes: str = "weights"
    """Of a `pretrain` after another stage: `weights` (`model.init_from`: optimizer, schedule, step and data start
    again), or `state` (everything continues, so the budget must be larger)."""

    overrides: tuple[str, ...] = ()
    """`key=value` each, laid over the config."""

    arguments: tuple[str, ...] = ()
    """Further arguments for the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What `run` can name."""

    command: str
    """A key of COMMANDS."""

    begin: Callable[[Stage, Path, Path | None], list[str]]
    """`fn(stage, its folder, what the stage before made)`: the arguments after the command."""

    proceed: Callable[[Stage, Path, Path | None], tuple[str, list[str]] | None]
    """Command and arguments that bring what is in the folder to its end; None when it is finished. Raises PipelineError
    when the folder was made from something else."""

    result: Callable[[Path], Path | None]
    """What the next stage reads; None while there is nothing in the folder that could be continued."""

    has_config: bool = False
    source_key: str | None = None
    """Config key that names what the stage before made, where a config without it may be incomplete."""

    follows: tuple[str, ...] | None = None
    """Kinds that must come before it; None: any, or none at all."""


def choose_command(stage: Stage, folder: Path, source: Path | None) -> tuple[str, list[str]] | None:
    """Command and arguments for a stage; None when it is finished.

    Raises:
        PipelineError: the folder cannot be continued.
    """
    kind = KINDS[stage.run]
    try:
        if kind.result(folder) is None or source == UNKNOWN:
            return kind.command, kind.begin(stage, folder, source)
        return kind.proceed(stage, folder, source)
    except (CheckpointError, ConfigError, StartupError, OSError, ValueError) as error:
        raise PipelineError(f"stage {stage.name}: {error}") from error


def is_complete(state: Mapping[str, Any]) -> bool:
    """Whether a `train_state.json` is of the last step of its run's budget."""
    return bool(state["step"] == state.get("num_steps"))


# ---- stages that train ----


def _set(stage: Stage, folder: Path, *more: str) -> list[str]:
    assert stage.config is not None, "checked when the file was read"
    return [stage.config, *stage.overrides, f"trainer.output_dir={folder}", *more]


def _begin_training(stage: Stage, folder: Path, source: Path | None) -> list[str]:
    if source is None:
        return [*_set(stage, folder, "trainer.resume_from_checkpoint=latest"), *stage.arguments]
    if stage.takes == "weights":
        inherited = [f"model.init_from={source}", "trainer.resume_from_checkpoint=latest"]
        return [*_set(stage, folder, *inherited), *stage.arguments]
    return [*_set(stage, folder, f"trainer.resume_from_checkpoint={source}", *_overwrite(folder)), *stage.arguments]


def _overwrite(folder: Path) -> list[str]:
    # A run that was killed before its first checkpoint: nothing of it is resumed.
    return ["trainer.overwrite_output_dir=true"] if holds_run(folder) else []


def _same_settings(now: Config, before: Config) -> bool:
    """Whether two configs are equal but for what only says how a run starts."""
    return _without_start(now) == _without_start(before)


def _without_start(config: Config) -> Config:
    fresh = replace(
        config.trainer, resume_from_checkpoint=None, resume_allow=(), overwrite_output_dir=False, output_dir="-"
    )
    return without_secrets(replace(config, trainer=fresh))


def _as_saved(now: Config, before: Config) -> Config:
    """`now` with what a run writes into its config: the architecture and the tokenizer of its initial weights, and what
    it chose for `auto`."""
    from neobert.train.initial import bind_initial  # Needs torch, which a wrong key does not.

    bound, _ = bind_initial(now, before)
    chosen = {name: getattr(before.trainer, name) for name in _CHOSEN if getattr(bound.trainer, name) == "auto"}
    return replace(bound, trainer=replace(bound.trainer, **chosen))


_CHOSEN = ("mixed_precision", "per_device_train_batch_size")


def _same_budget(now: Config, before: Config) -> bool:
    """The same for a script that completes its config from elsewhere before it saves it."""
    return _budgets(now) == _budgets(before)


def _budgets(config: Config) -> list[float | None]:
    return [getattr(config.trainer, key.removeprefix("trainer.")) for key in BUDGETS]


def _continue_training(
    stage: Stage, folder: Path, source: Path | None, same: Callable[[Config, Config], bool] = _same_settings
) -> tuple[str, list[str]] | None:
    checkpoint = _newest(folder)
    assert checkpoint is not None, "asked only where there is a result"
    state, before = read_train_state(checkpoint), read_checkpoint_config(checkpoint)
    more = ["trainer.resume_from_checkpoint=latest"]
    if source is not None and stage.takes == "weights":
        more.append(f"model.init_from={source}")
        _check_origin(folder, before.model.init_from, source)
    elif source is not None:
        _check_lineage(folder, state, source)
    argv = _set(stage, folder, *more)
    if is_complete(state) and same(_as_saved(load_config(argv[0], argv[1:]), before), before):
        return None
    return KINDS[stage.run].command, [*argv, *stage.arguments]


_PRETRAINED = "contrastive.pretrained_checkpoint_dir"


def _begin_contrastive(stage: Stage, folder: Path, source: Path | None) -> list[str]:
    start = [] if source is None else [f"{_PRETRAINED}={source}"]
    return [*_set(stage, folder, *start, "trainer.resume_from_checkpoint=latest"), *stage.arguments]


def _continue_contrastive(stage: Stage, folder: Path, source: Path | None) -> tuple[str, list[str]] | None:
    checkpoint = _newest(folder)
    assert checkpoint is not None, "asked only where there is a result"
    before, argv = read_checkpoint_config(checkpoint), _begin_contrastive(stage, folder, source)
    if source is not None:
        _check_origin(folder, before.model.init_from, source)
    overrides = argv[1 : len(argv) - len(stage.arguments)]
    # The script completes its config with what the checkpoint says of the model.
    if is_complete(read_train_state(checkpoint)) and _same_budget(load_config(argv[0], overrides), before):
        return None
    return KINDS[stage.run].command, argv


def _begin_longer(stage: Stage, folder: Path, source: Path | None) -> list[str]:
    data = [] if "--output" in stage.arguments else ["--output", f"{folder}-data"]
    return [*_set(stage, folder, *_overwrite(folder)), "--checkpoint", str(source), *data, *stage.arguments]


def _continue_longer(stage: Stage, folder: Path, source: Path | None) -> tuple[str, list[str]] | None:
    checkpoint = _newest(folder)
    assert checkpoint is not None, "asked only where there is a result"
    assert stage.config is not None, "checked when the file was read"
    state, before = read_train_state(checkpoint), read_checkpoint_config(checkpoint)
    if source is not None:
        _check_lineage(folder, state, source)
    if is_complete(state) and _same_budget(load_config(stage.config, stage.overrides), before):
        return None
    # The script has written its settings, those of the long documents too, into the folder of its run.
    argv = [str(checkpoint / "config.yaml"), *stage.overrides, "trainer.resume_from_checkpoint=latest"]
    return KINDS["pretrain"].command, argv


def _newest(folder: Path) -> Path | None:
    try:
        return choose_newest(folder).path
    except CheckpointError as error:
        raise PipelineError(str(error)) from error


def _check_lineage(folder: Path, state: Mapping[str, Any], source: Path) -> None:
    origins = [entry["checkpoint"] for entry in state["lineage"] if not is_own(Path(entry["checkpoint"]), folder)]
    _check_origin(folder, origins[-1] if origins else None, source)


def _check_origin(folder: Path, origin: str | None, source: Path) -> None:
    if origin is None or Path(origin).resolve() != source.resolve():
        raise PipelineError(
            f"{folder} was made from {origin or 'nothing'}, and the stage before it now ends with {source}: delete or "
            f"rename {folder} to make it again"
        )


# ---- stages that write one folder ----


def _begin_average(stage: Stage, folder: Path, source: Path | None) -> list[str]:
    assert source is not None, "checked when the file was read"
    run = source if source == UNKNOWN else source.parents[1]
    return [str(run), "--output", str(folder), *stage.arguments]


def _continue_average(stage: Stage, folder: Path, source: Path | None) -> tuple[str, list[str]] | None:
    averaged = parse_json((folder / AVERAGE_FILE).read_text())
    assert source is not None, "checked when the file was read"
    newest = Path(averaged["run"]) / "checkpoints" / str(max(averaged["steps"]))
    _check_origin(folder, str(newest), source)
    return None  # The folder was written in one stroke.


def _begin_export(stage: Stage, folder: Path, source: Path | None) -> list[str]:
    return [str(source), "--output", str(folder), *stage.arguments]


def _continue_export(stage: Stage, folder: Path, source: Path | None) -> tuple[str, list[str]] | None:
    assert source is not None, "checked when the file was read"
    exported, step = parse_json((folder / "config.json").read_text()).get(STEPS_KEY), read_manifest(source).step
    if exported != step:
        raise PipelineError(
            f"{folder} was exported after step {exported}, and the stage before it now ends with step {step}: delete or"
            f" rename {folder} to make it again"
        )
    return None


def _folder_with(name: str) -> Callable[[Path], Path | None]:
    return lambda folder: folder if (folder / name).is_file() else None


PRETRAINING = ("pretrain", "longer_seq")
"""Kinds whose state another pretraining can continue with."""

RUNS = (*PRETRAINING, "contrastive")
"""Kinds whose folder is a run with checkpoints that can be resumed."""

KINDS: dict[str, Kind] = {
    "pretrain": Kind(
        command="pretrain",
        begin=_begin_training,
        proceed=_continue_training,
        result=_newest,
        has_config=True,
    ),
    "longer_seq": Kind(
        command="longer-seq",
        begin=_begin_longer,
        proceed=_continue_longer,
        result=_newest,
        has_config=True,
        follows=PRETRAINING,
    ),
    "contrastive": Kind(
        command="finetune",
        begin=_begin_contrastive,
        proceed=_continue_contrastive,
        result=_newest,
        has_config=True,
        source_key=_PRETRAINED,
    ),
    "average": Kind(
        command="average-checkpoints",
        begin=_begin_average,
        proceed=_continue_average,
        result=_folder_with(AVERAGE_FILE),
        follows=RUNS,
    ),
    "export": Kind(
        command="export",
        begin=_begin_export,
        proceed=_continue_export,
        result=_folder_with("config.json"),
        follows=(*RUNS, "average"),
    ),
}
"""What a stage can run. A training script that takes `CONFIG [overrides]`, starts from `model.init_from` and writes
checkpoints into `trainer.output_dir` needs `_begin_training`, `_continue_training` (where it saves another config
than it was passed: `partial(_continue_training, same=_same_budget)`) and `_newest`."""
