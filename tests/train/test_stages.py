"""A list of stages: what runs, what is skipped, what continues where it was, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import call
from records import exact_steps
from safetensors.torch import load_file

from neobert.cli import EXIT_CODES
from neobert.commands import staged_run as pipeline
from neobert.commands.registry import COMMANDS
from neobert.commands.staged_run import PipelineError, load_pipeline, run_command, run_pipeline
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.export.write import ExportRequest, export
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
ROOT = Path(__file__).parents[2]


class Runner:
    """Runs what a stage would start as a process in this one, and remembers the command."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answer: int | None = None

    def __call__(self, words: Sequence[str]) -> int:
        assert words[:3] == [sys.executable, "-m", "neobert"]
        name, rest = words[3], list(words[4:])
        self.calls.append(name)
        if self.answer is not None:
            return self.answer
        if name == "pretrain":
            return EXIT_CODES[pretrain(load_config(rest[0], rest[1:])).reason]
        if name == "longer-seq":
            return call("pretraining/longer_seq.py", *rest)
        if name == "average-checkpoints":
            return call("average_checkpoints.py", *rest)
        export(ExportRequest(source=rest[0], output=Path(rest[2])))
        return 0


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner()
    monkeypatch.setattr(pipeline, "run_command", made)
    return made


def write(tiny: Tiny, folder: Path, **changes: Any) -> Path:
    """A pipeline of five stages in `folder`, with `changes` of keys by name of stage."""
    config = folder / "base.yaml"
    config.write_text(config_to_yaml(tiny(folder / "unused", "model.dropout_prob=0.1", "trainer.eval_steps=0")))
    stages: list[dict[str, Any]] = [
        {"name": "first", "run": "pretrain", "config": str(config), "overrides": ["trainer.max_steps=8"]},
        {"name": "second", "run": "pretrain", "config": str(config), "overrides": ["trainer.max_steps=6"]},
        {
            "name": "long",
            "run": "longer_seq",
            "config": str(config),
            "overrides": ["trainer.max_steps=12", "trainer.save_steps=2"],
            "arguments": ["--max-length", 96, "--min-length", 20],
        },
        {"name": "mean", "run": "average", "arguments": ["--last", 2]},
        {"name": "hub", "run": "export"},
    ]
    for stage in stages:
        stage |= changes.get(stage["name"], {})
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / "out"), "stages": stages}))
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_stage_runs_once_and_continues_where_it_was(
    tiny: Tiny, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tiny, tmp_path), tmp_path / "out"
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    order = ["pretrain", "pretrain", "longer-seq", "average-checkpoints", "export"]
    assert runner.calls == order
    said = (out / "second" / "training.log").read_text()
    assert f"initial weights from {out}/first/checkpoints/8 (checkpoint layout after 8 steps)" in said
    state = json.loads((out / "long" / "checkpoints" / "12" / "train_state.json").read_text())
    assert [entry["checkpoint"] for entry in state["lineage"]] == [f"{out}/second/checkpoints/6"]
    assert json.loads((out / "mean" / "average.json").read_text())["steps"] == [10, 12]
    assert json.loads((out / "hub" / "config.json").read_text())["pretraining_steps"] == 12

    runner.calls.clear()
    capsys.readouterr()
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    assert runner.calls == []
    assert capsys.readouterr().out.splitlines() == [
        f"[1/5] first: finished, {out}/first/checkpoints/8",
        f"[2/5] second: finished, {out}/second/checkpoints/6",
        f"[3/5] long: finished, {out}/long/checkpoints/12",
        f"[4/5] mean: finished, {out}/mean",
        f"[5/5] hub: finished, {out}/hub",
    ]

    # Killed in the third stage after its checkpoint of step 8: nothing after it is there.
    final, steps = weights(out / "long" / "checkpoints" / "12"), exact_steps(out / "long")
    for name in ("10", "12"):
        shutil.rmtree(out / "long" / "checkpoints" / name)
    for name in ("mean", "hub"):
        shutil.rmtree(out / name)
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    assert runner.calls == ["pretrain", "average-checkpoints", "export"]
    assert equal(weights(out / "long" / "checkpoints" / "12"), final)
    assert exact_steps(out / "long") == steps

    # Killed in the third stage before its first checkpoint.
    shutil.rmtree(out / "long" / "checkpoints")
    for name in ("mean", "hub"):
        shutil.rmtree(out / name)
    runner.calls.clear()
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    assert runner.calls == ["longer-seq", "average-checkpoints", "export"]
    assert equal(weights(out / "long" / "checkpoints" / "12"), final)


def shorten(file: Path) -> Path:
    tree = yaml.safe_load(file.read_text())
    tree["stages"] = tree["stages"][:2]
    file.write_text(yaml.safe_dump(tree))
    return file


def test_the_state_is_used_and_a_killed_stage_continues(tiny: Tiny, tmp_path: Path, runner: Runner) -> None:
    second = {"takes": "state", "overrides": ["trainer.max_steps=12", "scheduler.total_steps=12"]}
    first = {"overrides": ["trainer.max_steps=6", "scheduler.total_steps=12"]}
    file, out = shorten(write(tiny, tmp_path, first=first, second=second)), tmp_path / "out"
    run_pipeline(load_pipeline(file), dry_run=False)
    whole = tmp_path / "whole"
    pretrain(tiny(whole, "model.dropout_prob=0.1", "trainer.eval_steps=0", "scheduler.total_steps=12"))
    assert exact_steps(out / "second") == exact_steps(whole, after=6)
    shutil.rmtree(out / "second" / "checkpoints" / "12")
    run_pipeline(load_pipeline(file), dry_run=False)
    shutil.rmtree(out / "second" / "checkpoints")
    run_pipeline(load_pipeline(file), dry_run=False)
    assert runner.calls == ["pretrain"] * 4
    assert exact_steps(out / "second") == exact_steps(whole, after=6)
    assert equal(weights(out / "second" / "checkpoints" / "12"), weights(whole / "checkpoints" / "12"))


def test_a_stage_with_other_settings_is_not_finished_and_what_follows_is_stale(
    tiny: Tiny, tmp_path: Path, runner: Runner
) -> None:
    file, out = shorten(write(tiny, tmp_path)), tmp_path / "out"
    run_pipeline(load_pipeline(file), dry_run=False)
    longer = load_pipeline(shorten(write(tiny, tmp_path, first={"overrides": ["trainer.max_steps=10"]})))
    with pytest.raises(
        PipelineError, match=r"stage second: .*second was made from .*first/checkpoints/8, .* ends with "
    ):
        run_pipeline(longer, dry_run=False)
    assert (out / "first" / "checkpoints" / "10").is_dir(), "the first stage was extended"
    shutil.rmtree(out / "second")
    assert run_pipeline(longer, dry_run=False) == 0
    # Overrides of the command line are for every training.
    runner.calls.clear()
    changed = load_pipeline(file, ["--trainer.max_steps", "11"])
    with pytest.raises(PipelineError, match=r"stage second: .* was made from"):
        run_pipeline(changed, dry_run=False)
    assert runner.calls == ["pretrain"]


def test_a_dry_run_prints_commands_and_runs_none(
    tiny: Tiny, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tiny, tmp_path), tmp_path / "out"
    assert run_pipeline(load_pipeline(file), dry_run=True) == 0
    assert runner.calls == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("[2/5] second: neobert pretrain")
    assert lines[1].endswith("'model.init_from=<final checkpoint>' trainer.resume_from_checkpoint=latest")
    assert lines[4] == f"[5/5] hub: neobert export '<final checkpoint>' --output {out}/hub"
    assert not out.exists()


def test_a_stage_that_stops_or_fails_ends_the_pipeline(
    tiny: Tiny, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = load_pipeline(write(tiny, tmp_path))
    runner.answer = 75
    assert run_pipeline(stages, dry_run=False) == 75
    assert "[1/5] first: stopped after a checkpoint; the same command continues" in capsys.readouterr().out
    runner.answer = 76
    with pytest.raises(PipelineError, match=r"stage first: ended with exit code 76, its last lines say why"):
        run_pipeline(stages, dry_run=False)
    runner.answer = 0
    with pytest.raises(PipelineError, match=r"stage first: ended without the checkpoint of its last step"):
        run_pipeline(stages, dry_run=False)
    assert len(runner.calls) == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_stop_is_for_the_child(name: str) -> None:
    code = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: sys.exit(75))\n"
        f"os.kill(os.getppid(), signal.{name})\n"
        "time.sleep(20)\n"
    )
    assert run_command([sys.executable, "-c", code]) == 75


def test_all_problems_of_a_file_are_reported_together(tiny: Tiny, tmp_path: Path) -> None:
    file = write(
        tiny,
        tmp_path,
        first={"takes": "state", "overrides": ["trainer.max_stepz=3"]},
        second={"name": "first", "config": "nowhere.yaml"},
        mean={"run": "average", "config": "x.yaml", "color": "red"},
        hub={"arguments": "--dtype bf16"},
    )
    tree = yaml.safe_load(file.read_text())
    tree["stages"].append({"name": "again", "run": "longer_seq", "config": str(tmp_path / "base.yaml")})
    tree["stages"].append({"name": "x", "run": "prepare"})
    file.write_text(yaml.safe_dump(tree | {"outputs": "y"}))
    with pytest.raises(PipelineError) as caught:
        load_pipeline(file)
    message = str(caught.value)
    for part in (
        "outputs: is no key; known are output, overrides, stages",
        "stage first: takes: state is for a pretrain right after one of pretrain, longer_seq",
        "trainer.max_stepz",
        "stage first: name: the name of a folder, another for each stage",
        "nowhere.yaml",
        "stage mean: color: is no key",
        "stage mean: config, overrides: average takes neither; write `arguments`",
        "stage hub: arguments: write a list",
        "stage again: run: longer_seq must come right after one of pretrain, longer_seq",
        "stage 7: needs a `name`, and `run` with one of pretrain, longer_seq, contrastive, average, export",
    ):
        assert part in message
    with pytest.raises(PipelineError, match="cannot be read"):
        load_pipeline(tmp_path / "nowhere.yaml")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pipeline.py", tmp_path / "none.yaml", "--dry-run") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.yaml cannot be read: ")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_pipeline_loads_and_its_commands_are_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = load_pipeline(Path(path.stem)).stages
    assert len(stages) > 1
    assert str(load_pipeline(path).output).startswith("outputs/")
    assert {kind.command for kind in pipeline.KINDS.values()} <= COMMANDS.keys()
