"""What is kept and what is deleted."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from neobert.commands.inspect_checkpoints import list_run
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.config.schema_trainer import TrainerSection
from neobert.errors import StartupError
from neobert.train.checkpoint import commit
from neobert.train.checkpoint.retention import (
    Score,
    choose_best,
    choose_best_of_each,
    choose_removed,
    name_test,
    prune,
    read_score,
)
from neobert.train.loop import pretrain
from neobert.weights.folder import checkpoint_steps, valid_steps

Tiny = Callable[..., Config]


def settings(
    newest: int | None, milestones: tuple[int, ...] = (), every: int | None = None, best: bool = False
) -> TrainerSection:
    return TrainerSection(
        save_total_limit=newest, save_milestone_steps=milestones, save_milestone_every=every, save_best=best
    )


@pytest.mark.parametrize(
    ("kept", "best", "removed"),
    [
        (settings(2), None, [10, 20, 25]),
        (settings(0), None, []),
        (settings(None), None, []),
        (settings(9), None, []),
        (settings(1, milestones=(10, 11)), None, [20, 25, 30]),
        (settings(2, every=20), None, [10, 25]),
        (settings(2, best=True), 25, [10, 20]),
        (settings(2, best=False), 25, [10, 20, 25]),
        (settings(1, milestones=(10,), every=15, best=True), 20, [25]),
    ],
)
def test_what_goes(kept: TrainerSection, best: int | None, removed: list[int]) -> None:
    assert choose_removed(kept, [10, 20, 25, 30, 40], best) == removed


def test_the_best_is_the_lowest_loss_and_the_earlier_of_two() -> None:
    assert choose_best({4: 3.0, 8: 2.5, 12: 2.5, 16: None, 20: float("nan")}) == 8
    assert choose_best({4: None}) is None


def test_every_test_has_a_best_of_its_own() -> None:
    scores = {4: Score(3.0, "a"), 8: Score(2.5, "a"), 12: Score(9.0, "b"), 16: Score(None, "c"), 20: Score(1.0, None)}
    assert list(choose_best_of_each(scores).items()) == [("a", 8), ("b", 12), (None, 20)]
    assert list(choose_best_of_each(scores | {24: Score(2.9, "a")}).items()) == [("b", 12), (None, 20), ("a", 8)]
    assert choose_best_of_each({16: Score(None, "c"), 20: Score(float("nan"), "c")}) == {}


def test_a_best_of_another_test_is_set_aside(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    keep = ["trainer.save_best=true", "trainer.save_total_limit=1", "scheduler.total_steps=12"]
    pretrain(tiny(out, *keep, "trainer.max_steps=8", "optimizer.lr=1e-3"))
    resume = [*keep, "trainer.resume_from_checkpoint=latest", "trainer.max_steps=12", "optimizer.lr=1e-3"]
    with pytest.raises(StartupError, match=r"trainer.resume_allow=\[trainer.eval_seed\]"):
        pretrain(tiny(out, *resume, "trainer.eval_seed=7"))
    # What is evaluated now is harder: half of the tokens are masked.
    other = ["datacollator.eval_mlm_probability=0.5", "trainer.eval_seed=7"]
    allow = "trainer.resume_allow=[datacollator.eval_mlm_probability,trainer.eval_seed]"
    capsys.readouterr()
    pretrain(tiny(out, *resume, *other, allow))
    line = "trainer.save_best: checkpoint 8 (evaluation loss"
    assert capsys.readouterr().out.count(line) == 1
    assert checkpoint_steps(out) == [8, 12]
    assert json.loads((out / "checkpoints" / "best.json").read_text())["step"] == 12, "whatever the losses are"
    (event,) = [e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if "best" in e["event"]]
    assert (event["event"], event["step"]) == ("best_set_aside", 8)
    listed = "\n".join(list_run(out, 0.0))
    assert "best of another evaluation" in listed.splitlines()[1]
    assert listed.splitlines()[2].endswith("best")


def test_the_name_of_a_test_follows_what_decides_its_result(tiny: Tiny, tmp_path: Path) -> None:
    def name(*overrides: str, data: str = "documents") -> str | None:
        return name_test(tiny(tmp_path, *overrides), data)

    same = ["trainer.per_device_eval_batch_size=2", "optimizer.lr=1e-4", "trainer.eval_steps=2", "trainer.save_steps=2"]
    assert name() == name(*same)
    capped = "trainer.eval_max_batches=2"
    others = [name("trainer.eval_seed=1"), name("datacollator.eval_mlm_probability=0.2"), name(data="others")]
    others += [name("dataset.max_seq_length=32"), name(capped), name(capped, same[0])]
    assert len({name(), *others}) == 7
    assert name_test(tiny(tmp_path), None) is None


def test_damaged_newer_folders_do_not_count(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.save_steps=2"))
    for step in (8, 10):
        shutil.rmtree(out / "checkpoints" / str(step))
    for torn in (40, 50):
        shutil.copytree(out / "checkpoints" / "12", out / "checkpoints" / str(torn))
        os.truncate(out / "checkpoints" / str(torn) / "optimizer.bin", 10)
    removed, problems = prune(out, settings(2))
    assert (removed, problems) == ([2, 4], [])
    assert checkpoint_steps(out) == [6, 12, 40, 50]
    assert valid_steps(out) == [6, 12]


def test_milestones_are_saved_and_stay(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keep = ["trainer.save_total_limit=1", "trainer.save_milestone_steps=[3,7]", "trainer.save_milestone_every=5"]
    pretrain(tiny(out, "trainer.save_steps=4", *keep))
    assert checkpoint_steps(out) == [3, 5, 7, 10, 12]


def test_the_best_checkpoint_stays_and_is_known_again_after_a_resume(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses by canned evaluation: the best is step 4, then nothing better until step 20."""
    from neobert.objectives.mlm import MaskedMetrics
    from neobert.train import loop, pretraining

    losses = {4: 2.0, 8: 3.0, 12: 2.5, 16: 2.2, 20: 1.0, 24: 1.5}
    steps = iter(losses)

    def evaluate(run: object) -> MaskedMetrics:
        loss = losses[next(steps)]
        return MaskedMetrics(loss=loss, accuracy=0.0, num_targets=1, num_tokens=1, num_documents=1)

    monkeypatch.setattr(pretraining, "PRETRAINING", replace(pretraining.PRETRAINING, evaluate=evaluate))
    out = tmp_path / "run"
    keep = ["trainer.save_best=true", "trainer.save_total_limit=1", "trainer.resume_from_checkpoint=latest"]
    monkeypatch.setattr(loop.Run, "eval_steps", property(lambda run: 0 if not (out / "log.jsonl").exists() else 4))
    pretrain(tiny(out, *keep, "trainer.max_steps=4", "scheduler.total_steps=24"))
    pretrain(tiny(out, *keep, "trainer.max_steps=12", "scheduler.total_steps=24"))
    assert checkpoint_steps(out) == [4, 12]
    assert json.loads((out / "checkpoints" / "best.json").read_text()) == {"step": 4, "eval_loss": 2.0}
    assert read_score(out / "checkpoints" / "12").loss == 2.5
    pretrain(tiny(out, *keep, "trainer.max_steps=24", "scheduler.total_steps=24"))
    assert checkpoint_steps(out) == [20, 24], "4 is no longer the best"
    assert json.loads((out / "checkpoints" / "best.json").read_text()) == {"step": 20, "eval_loss": 1.0}


def test_a_deletion_that_fails_is_logged_and_tried_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real, failures = tmp_path / "run", shutil.rmtree, []

    def rmtree(path: Path) -> None:
        if ".trash-4" in str(path) and not failures:
            failures.append(path)
            raise PermissionError(13, "Permission denied")
        real(path)

    monkeypatch.setattr(commit.shutil, "rmtree", rmtree)
    pretrain(tiny(out, "trainer.save_total_limit=1", "trainer.max_steps=12"))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (failed,) = (e for e in events if e["event"] == "prune_failed")
    assert failed["step"] == 8
    assert "could not be deleted: [Errno 13] Permission denied" in failed["problem"]
    assert "the next save tries again" in capsys.readouterr().out
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"12"}, "the next prune did"


def test_a_new_run_in_a_used_folder_neither_deletes_nor_mixes(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    pretrain(tiny(out, "trainer.max_steps=4", "trainer.save_total_limit=1", "trainer.overwrite_output_dir=true"))
    assert checkpoint_steps(out) == [4]
    aside = tmp_path / "run.old-1"
    assert {aside / p.relative_to(out): text for p, text in before.items()} == {
        p: p.read_bytes() for p in aside.rglob("*") if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.save_best=true", "trainer.save_steps=6"],
            "trainer.save_steps = 6 is not a multiple of",
        ),
        (["trainer.save_best=true", "trainer.eval_strategy=no"], "is not a multiple of trainer.eval_steps = 0"),
        (
            ["trainer.save_best=true", "trainer.save_model=false"],
            "save_best: true has no effect without trainer.save_model",
        ),
        (
            ["trainer.save_milestone_steps=[3]", "trainer.save_strategy=no"],
            "has no effect with trainer.save_strategy: no",
        ),
        (["trainer.save_milestone_steps=[0]"], r"save_milestone_steps: .0. must be at least 1"),
        (["trainer.save_milestone_every=0"], "must be at least 1"),
        (["trainer.async_save=true", "trainer.save_strategy=no"], "has no effect"),
    ],
)
def test_settings_that_would_do_nothing_are_errors(
    tiny: Tiny, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, *overrides)
