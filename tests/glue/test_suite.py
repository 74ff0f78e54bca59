"""The suite with a stand-in for training: which cells run, what is kept, what decides a score."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_folders import FakeTraining, MakeConfig, write_task

from neobert.config.rules import validate
from neobert.config.schema import Config
from neobert.data.source import tables
from neobert.data.source.hub import HubPin
from neobert.errors import DataError
from neobert.finetune.job import FinetuneResult
from neobert.glue import suite
from neobert.glue.glue_tasks import AVERAGED, TASKS, describe_average
from neobert.glue.score_table import describe_results
from neobert.glue.suite import CellStopped, run_suite


def run(config: Config, train: Any) -> dict[str, Any]:
    return run_suite(config, say=lambda text: None, train=train)


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    cells = [{key: value for key, value in cell.items() if key != "seconds"} for cell in results["cells"]]
    return {**results, "seconds": 0, "cells": cells}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of mnli answer: always the first label."""
    monkeypatch.setattr(suite, "answer_rows", lambda folder, rows, labels: np.zeros(len(rows.texts), dtype=np.int64))


def test_a_cell_is_a_fine_tuning_run_of_its_own(make_config: MakeConfig, fake: FakeTraining) -> None:
    results = run(make_config("trainer.max_steps=2"), fake)
    assert len(fake.configs) == 2 * 3 * 2
    assert [validate(config) for config in fake.configs] == [[]] * 12
    first = fake.configs[0]
    assert (first.task, first.finetune.text_column, first.finetune.pair_column) == ("finetune", "sentence", None)
    assert (first.finetune.labels, first.finetune.metric) == (("negative", "positive"), "accuracy")
    assert (first.trainer.max_steps, first.trainer.eval_steps, first.trainer.global_batch_size) == (2, 2, 4)
    assert {(c.optimizer.lr, c.seed) for c in fake.configs} == {(lr, s) for lr in (1e-3, 1e-2, 3e-2) for s in (0, 1)}
    assert fake.configs[-1].finetune.pair_column == "sentence2"
    assert len({config.trainer.output_dir for config in fake.configs}) == 12
    out = Path(fake.configs[0].trainer.output_dir).parents[2]
    assert json.loads((out / "results.json").read_text()) == results


def test_on_a_terminal_a_cell_is_a_line_and_a_step_of_a_bar(
    make_config: MakeConfig, fake: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(suite, "is_watched", lambda: True)
    run_suite(make_config("glue.tasks=[cola]"), say=said.append, train=fake)
    assert {config.trainer.console for config in fake.configs} == {"quiet"}
    assert len(said) == len(fake.configs)
    assert all(line.startswith("cola lr ") for line in said)
    run_suite(make_config("glue.tasks=[mrpc]", "trainer.console=plain"), say=said.append, train=fake)
    assert fake.configs[-1].trainer.console == "plain"


def test_the_grid_has_its_epochs_and_evaluates_once_each(make_config: MakeConfig, fake: FakeTraining) -> None:
    run(make_config("glue.tasks=[cola]"), fake)
    trainer = fake.configs[0].trainer
    assert (trainer.num_train_epochs, trainer.max_steps, trainer.eval_steps) == (4, None, 3)  # 12 rows by 4.
    run(make_config("glue.tasks=[cola]", "trainer.num_train_epochs=7"), fake)
    assert fake.configs[-1].trainer.num_train_epochs == 7


def test_a_suite_that_was_killed_resumes_to_the_same_table(
    make_config: MakeConfig, fake: FakeTraining, tmp_path: Path
) -> None:
    whole = run(make_config(f"trainer.output_dir={tmp_path}/whole"), fake)
    killed = FakeTraining()
    killed.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(make_config(), killed)
    rest = FakeTraining()
    resumed = run(make_config(), rest)
    assert (len(killed.configs), len(rest.configs)) == (5, 7)
    assert without_seconds(resumed) == without_seconds(whole)
    assert describe_results(resumed) == describe_results(whole)


def test_finished_cells_are_skipped_until_something_else_decides_their_score(
    make_config: MakeConfig, fake: FakeTraining
) -> None:
    first = run(make_config(), fake)
    again = FakeTraining()
    assert run(make_config(), again) == first
    assert again.configs == []
    run(make_config("glue.seeds=3", "glue.tasks=[sst2, mrpc]"), again)
    assert {config.seed for config in again.configs} == {2}
    changed = FakeTraining()
    assert run(make_config("finetune.pooling=cls"), changed)["protocol"]["digest"] != first["protocol"]["digest"]
    assert len(changed.configs) == 12


def test_the_digest_is_that_of_the_protocol_and_not_of_the_machine(
    make_config: MakeConfig, fake: FakeTraining, tmp_path: Path
) -> None:
    def digest(*overrides: str) -> str:
        return str(run(make_config("glue.tasks=[sst2]", *overrides), fake)["protocol"]["digest"])

    plain = digest()
    assert digest("trainer.logging_steps=7", f"trainer.output_dir={tmp_path}/elsewhere") == plain
    others = ("glue.seeds=1", "glue.batch_sizes=[2]", "dataset.max_seq_length=32", "trainer.max_steps=1", "seed=4")
    assert len({plain, *map(digest, others)}) == len(others) + 1


def test_all_cells_have_the_precision_that_the_first_one_chose(make_config: MakeConfig, fake: FakeTraining) -> None:
    run(make_config("glue.tasks=[sst2]", "trainer.mixed_precision=auto"), fake)
    assert [config.trainer.mixed_precision for config in fake.configs] == ["auto", *["no"] * 5]
    more = FakeTraining()
    run(make_config("glue.tasks=[sst2]", "trainer.mixed_precision=auto", "glue.seeds=3"), more)
    assert [config.trainer.mixed_precision for config in more.configs] == ["no"] * 3


def test_other_rows_are_another_protocol(make_config: MakeConfig, fake: FakeTraining, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "sst2", sizes=(16, 6))
    plain = run(make_config("glue.tasks=[sst2]"), fake)
    other = run(make_config("glue.tasks=[sst2]", f"glue.data_dir={tmp_path}/tasks"), fake)
    assert plain["protocol"]["digest"] != other["protocol"]["digest"]
    assert plain["model_digest"] == other["model_digest"]


@pytest.mark.usefixtures("answers")
def test_models_of_mnli_answer_both_of_its_splits_and_the_diagnostic_set(
    make_config: MakeConfig, fake: FakeTraining
) -> None:
    results = run(make_config("glue.tasks=[ax, mnli]", "glue.seeds=1"), fake)
    cell = results["cells"][0]
    assert set(cell["metrics"]) == {"validation_matched", "validation_mismatched", "ax/test"}
    accuracy = [cell["metrics"][f"validation_{name}"]["accuracy"] for name in ("matched", "mismatched")]
    assert accuracy[1] == pytest.approx(1 / 3)
    assert cell["score"] == pytest.approx(np.mean(accuracy))
    assert results["tasks"]["ax"]["best"]["mean"] == 0  # Always one label.
    assert results["average"]["of"] == "average of 1 task: mnli"
    assert all(config.trainer.save_best for config in fake.configs)


@pytest.mark.usefixtures("answers")
def test_answers_without_labels_are_written_for_glues_site(
    make_config: MakeConfig, fake: FakeTraining, tmp_path: Path
) -> None:
    write_task(tmp_path / "tasks", "mnli")
    write_task(tmp_path / "tasks", "ax", labelled=False)
    overrides = ("glue.tasks=[mnli, ax]", f"glue.data_dir={tmp_path}/tasks", "glue.seeds=1")
    results = run(make_config(*overrides), fake)
    assert results["tasks"]["ax"]["best"] is None
    (file, *_) = sorted((tmp_path / "out/cells/mnli").glob("*_ax.tsv"))
    assert file.read_text().splitlines()[:2] == ["index\tprediction", "0\tentailment"]
    assert "no labels" in describe_results(results)


@pytest.mark.usefixtures("answers")
def test_transfer_starts_from_the_best_model_of_mnli(
    make_config: MakeConfig, fake: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(source: Path) -> suite.ModelStart:
        start = suite.ModelStart.none()
        return replace(
            start, identity=str(source), apply=lambda c: replace(c, finetune=replace(c.finetune, model=str(source)))
        )

    monkeypatch.setattr(suite, "build_trained_start", build)
    plain = run(make_config("glue.tasks=[rte, sst2, mnli]"), fake)
    results = run(make_config("glue.tasks=[rte, sst2, mnli]", "glue.transfer_from_task=true"), fake)
    by_task = {name: [c for c in fake.configs if f"/{name}/" in c.trainer.output_dir] for name in ("rte", "sst2")}
    source = by_task["rte"][-1].finetune.model
    best = max((x for x in results["cells"] if x["task"] == "mnli"), key=lambda x: x["score"])
    assert source is not None
    assert f"/cells/mnli/lr{best['point']['lr']:g}_rows4_seed{best['seed']}_" in source
    assert source.endswith("/checkpoints/3")
    assert by_task["sst2"][-1].finetune.model is None
    digests = [{name: x["tasks"][name]["digest"] for name in ("rte", "sst2")} for x in (plain, results)]
    assert digests[0]["sst2"] == digests[1]["sst2"]
    assert digests[0]["rte"] != digests[1]["rte"]


def test_a_cell_that_was_stopped_ends_the_suite_with_its_reason(make_config: MakeConfig, fake: FakeTraining) -> None:
    def stopped(config: Config) -> FinetuneResult:
        return replace(fake(config), reason="preempted", best_step=None, predictions=None)

    with pytest.raises(CellStopped, match=r"sst2 lr 0.001, 4 rows, seed 0 stopped .*\(preempted\)") as caught:
        run(make_config(), stopped)
    assert caught.value.outcome == "preempted"


def test_the_mean_of_fewer_than_nine_tasks_is_not_called_glue() -> None:
    assert len(AVERAGED) == 9
    assert describe_average(list(TASKS)) == "GLUE"
    for left_out in AVERAGED:
        named = describe_average([name for name in TASKS if name != left_out])
        assert named.startswith("average of 8 tasks: ")
        assert "GLUE" not in named


def test_tasks_of_the_hub_are_fetched_once_and_are_those_of_a_folder(
    make_config: MakeConfig, fake: FakeTraining, tasks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(name: str, config: str, split: str, revision: str) -> list[dict[str, Any]]:
        asked.append((name, config, split, revision))
        with gzip.open(tasks_folder / config / f"{split}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    monkeypatch.setattr(tables, "pin_hub", lambda spec: HubPin(spec=spec, commit="c0ffee"))
    monkeypatch.setattr(tables, "list_hub_splits", lambda pin: ["train", "validation", "test"])
    monkeypatch.setattr(tables, "read_hub", read)
    local = run(make_config("glue.tasks=[stsb]"), fake)
    found = run(make_config("glue.tasks=[stsb]", "glue.data_dir=null"), FakeTraining())
    assert asked == [("nyu-mll/glue", "stsb", split, "c0ffee") for split in ("train", "validation")]
    assert found["tasks"] == local["tasks"]
    run(make_config("glue.tasks=[stsb]", "glue.data_dir=null", "glue.seeds=3"), FakeTraining())
    assert len(asked) == 2
    with pytest.raises(DataError, match=r"glue.data_dir: nyu-mll/glue.* has no split 'validation_matched'"):
        run(make_config("glue.tasks=[mnli]", "glue.data_dir=null"), FakeTraining())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("glue.tasks=[sst2, snli]", "glue.tasks: snli; write some of cola"),
        ("glue.tasks=[sst2, sst2]", "glue.tasks: .* must be different"),
        ("glue.tasks=[ax]", "glue.tasks: ax needs the models of mnli; add mnli"),
        ("glue.data_dir=nowhere", r"glue.data_dir: nowhere/sst2 has no file train\.\*"),
    ],
)
def test_wrong_tasks_and_data_are_named_before_anything_trains(
    make_config: MakeConfig, fake: FakeTraining, override: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(make_config(override), fake)
    assert fake.configs == []


def test_labels_that_are_none_of_the_task_are_named(
    make_config: MakeConfig, fake: FakeTraining, tmp_path: Path
) -> None:
    write_task(tmp_path / "tasks", "sst2", labelled=False)
    with pytest.raises(DataError, match=r"glue.data_dir: sst2, split .* label -1, not one of 0 to 1"):
        run(make_config("glue.tasks=[sst2]", f"glue.data_dir={tmp_path}/tasks"), fake)


@pytest.mark.usefixtures("answers")
def test_transfer_trains_mnli_again_where_only_its_score_was_kept(
    make_config: MakeConfig, fake: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "build_trained_start", lambda source: suite.ModelStart.none())
    run(make_config("glue.tasks=[mnli, rte]"), fake)
    before = len([c for c in fake.configs if "/mnli/" in c.trainer.output_dir])
    run(make_config("glue.tasks=[mnli, rte]", "glue.transfer_from_task=true"), fake)
    assert len([c for c in fake.configs if "/mnli/" in c.trainer.output_dir]) == 2 * before


@pytest.mark.usefixtures("answers")
def test_what_else_the_models_of_mnli_answer_is_no_part_of_its_protocol(
    make_config: MakeConfig, fake: FakeTraining
) -> None:
    with_ax, alone = (run(make_config(f"glue.tasks={tasks}"), fake) for tasks in ("[mnli, ax]", "[mnli]"))
    assert with_ax["tasks"]["mnli"]["digest"] == alone["tasks"]["mnli"]["digest"]
