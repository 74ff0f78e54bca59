"""A list of stages, each a script of ours that continues from what the stage before it made.

    output: outputs/two_lengths                # stage NAME writes outputs/two_lengths/NAME
    overrides: [trainer.use_cpu=true]          # of every stage that has a config
    stages:
      - {name: short, run: pretrain, config: short.yaml}
      - {name: long, run: longer_seq, config: short.yaml, arguments: [--max-length, 4096],
         overrides: [trainer.max_steps=12000]}
      - {name: hub, run: export}

Whether a stage is finished is read off its folder every time, never off a note of this program: of a training, that its
newest whole checkpoint is the last step of its budget, under the settings that the file asks for; of a folder that is
written in one stroke, that it is there and made of the checkpoint of the stage before. So a pipeline that was killed
continues where it was, inside a stage too. A stage that was made from something else than the stage before now offers
is an error.
"""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from neobert.cli import EXIT_CODES, stop_signals
from neobert.commands.stages import KINDS, PRETRAINING, RUNS, UNKNOWN, PipelineError, Stage, choose_command, is_complete
from neobert.config.load import ConfigError, load_config
from neobert.config.nesting import load_plain_yaml
from neobert.config.source import YamlError, read_yaml_text
from neobert.train.start import read_train_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A file of stages."""

    output: Path
    stages: tuple[Stage, ...]
    """With the overrides that are common to all."""

    def folder(self, stage: Stage) -> Path:
        return self.output / stage.name


# ---- reading the file ----


def load_pipeline(path: Path, more_overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file; `more_overrides` win over those of the file.

    Raises:
        PipelineError: the file or anything in it is wrong; all problems in one message.
    """
    try:
        tree = load_plain_yaml(read_yaml_text(path))
    except (YamlError, yaml.YAMLError) as error:
        raise PipelineError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list) or not tree["stages"]:
        raise PipelineError(f"{path}: write `output`, and `stages` with at least one entry")
    problems = [f"{key}: is no key; known are output, overrides, stages" for key in tree.keys() - _KEYS]
    if not isinstance(tree.get("output"), str):
        problems.append("output: name the folder that the stages write into")
    common = _read_texts(tree, "overrides", "", problems)
    stages = []
    for number, entry in enumerate(tree["stages"], start=1):
        stage = _read_stage(entry, number, problems)
        if stage is not None:
            if KINDS[stage.run].has_config:
                stage = replace(stage, overrides=(*common, *stage.overrides, *more_overrides))
            stages.append(stage)
    for number, stage in enumerate(stages):
        problems += _find_problems(stage, stages[:number])
    if problems:
        raise PipelineError("\n  ".join([f"{path}:", *problems]))
    return Pipeline(output=Path(tree["output"]), stages=tuple(stages))


_KEYS = {"output", "overrides", "stages"}


def _read_texts(tree: Mapping[str, Any], key: str, where: str, problems: list[str]) -> tuple[str, ...]:
    value = tree.get(key) or []
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        problems.append(f"{where}{key}: write a list of arguments")
        return ()
    return tuple(map(str, value))


def _read_stage(entry: Any, number: int, problems: list[str]) -> Stage | None:
    known = [f.name for f in fields(Stage)]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.get("run") not in KINDS:
        problems.append(f"stage {number}: needs a `name`, and `run` with one of {', '.join(KINDS)}")
        return None
    where = f"stage {entry['name']}: "
    problems += [f"{where}{key}: is no key; known are {', '.join(known)}" for key in entry if key not in known]
    texts = {key: value for key in ("config", "takes") if (value := entry.get(key)) is not None}
    problems += [f"{where}{key}: write a text" for key, value in texts.items() if not isinstance(value, str)]
    return Stage(
        name=entry["name"],
        run=entry["run"],
        overrides=_read_texts(entry, "overrides", where, problems),
        arguments=_read_texts(entry, "arguments", where, problems),
        **{key: str(value) for key, value in texts.items()},
    )


def _find_problems(stage: Stage, before: Sequence[Stage]) -> list[str]:
    kind, where, found = KINDS[stage.run], f"stage {stage.name}: ", []
    if not re.fullmatch(r"\w[\w.-]*", stage.name) or stage.name in (other.name for other in before):
        found.append(f"{where}name: the name of a folder, another for each stage")
    if kind.follows is not None and not (before and before[-1].run in kind.follows):
        found.append(f"{where}run: {stage.run} must come right after one of {', '.join(kind.follows)}")
    if stage.takes not in ("weights", "state"):
        found.append(f"{where}takes: {stage.takes!r} is unknown; write weights or state")
    elif stage.takes == "state" and not (stage.run == "pretrain" and before and before[-1].run in PRETRAINING):
        found.append(f"{where}takes: state is for a pretrain right after one of {', '.join(PRETRAINING)}")
    if not kind.has_config:
        if stage.config is not None or stage.overrides:
            found.append(f"{where}config, overrides: {stage.run} takes neither; write `arguments`")
    elif stage.config is None:
        found.append(f"{where}config: name the config file")
    else:
        try:
            start = [f"{kind.source_key}={UNKNOWN}"] if kind.source_key and before else []
            load_config(stage.config, [*stage.overrides, *start])
        except ConfigError as error:
            found.append(f"{where}{error}")
    return found


# ---- running ----


def run_pipeline(pipeline: Pipeline, *, dry_run: bool) -> int:
    """Runs the stages that are not finished, in order; returns an exit code of the training scripts.

    Raises:
        PipelineError: a stage failed, or cannot be continued.
    """
    source: Path | None = None
    for number, stage in enumerate(pipeline.stages, start=1):
        folder, title = pipeline.folder(stage), f"[{number}/{len(pipeline.stages)}] {stage.name}"
        chosen = choose_command(stage, folder, source)
        if chosen is None:
            source = KINDS[stage.run].result(folder)
            print(f"{title}: finished, {source}", flush=True)
            continue
        command, argv = chosen
        print(f"{title}: {shlex.join(['neobert', command, *argv])}", flush=True)
        if dry_run:
            source = UNKNOWN
            continue
        code = run_command([sys.executable, "-m", "neobert", command, *argv])
        if code == EXIT_CODES["preempted"]:
            print(f"{title}: stopped after a checkpoint; the same command continues", flush=True)
            return code
        if code:
            raise PipelineError(
                f"stage {stage.name}: ended with exit code {code}, its last lines say why; fix that and pass the same "
                "command again, finished stages are skipped"
            )
        source = _check_result(stage, folder)
    return 0


def _check_result(stage: Stage, folder: Path) -> Path:
    result = KINDS[stage.run].result(folder)
    if result is None or (stage.run in RUNS and not is_complete(read_train_state(result))):
        raise PipelineError(
            f"stage {stage.name}: ended without the checkpoint of its last step in {folder}; "
            "trainer.save_model must be true"
        )
    return result


def run_command(argv: Sequence[str]) -> int:
    """Runs a child to its end and returns its exit code; requests to stop are for the child, which saves first."""
    child = subprocess.Popen(argv)
    passed_on: dict[signal.Signals, Any] = {}
    for number in stop_signals():
        passed_on[number] = signal.signal(number, lambda received, _: child.send_signal(received))
    # The terminal sends Ctrl-C to the child too.
    passed_on[signal.SIGINT] = signal.signal(signal.SIGINT, lambda received, _: None)
    try:
        return child.wait()
    finally:
        for number, handler in passed_on.items():
            signal.signal(number, handler)
