"""The suite with real fine-tuning: the command as it is typed, baselines, and a kill in the middle."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import call
from children import fork, wait_for
from task_folders import MakeConfig, write_task

from neobert.config.schema import Config
from neobert.glue.starts import choose_start_of
from neobert.glue.suite import run_suite
from neobert.train.loop import pretrain


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Config]) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("encoder") / "run"
    pretrain(tiny(folder, "trainer.max_steps=1", "trainer.eval_strategy=no"))
    return folder


def scores(results: dict[str, Any]) -> list[Any]:
    return [(x["task"], x["point"], x["seed"], x["score"], x["metrics"]) for x in results["cells"]]


def test_the_command_as_it_is_typed(
    encoder: Path, tasks_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--glue.data_dir", tasks_folder, "--glue.tasks", "[sst2, mrpc]", "--glue.seeds", "1"]
    settings += ["--glue.learning_rates", "[1e-3]", "--dataset.max_seq_length", "64"]
    settings += ["--trainer.max_steps", "3", "--trainer.use_cpu", "true", "--trainer.mixed_precision", "no"]
    output = tmp_path / "OUT"
    config = "configs/glue/sst2.yaml"
    typed = [config, "--glue.model", encoder, *settings, "--trainer.output_dir", output]
    assert call("evaluation/run_glue.py", *typed) == 0
    results = json.loads((output / "results.json").read_text())
    assert [(cell["task"], cell["steps"]) for cell in results["cells"]] == [("mrpc", 3), ("sst2", 3)]
    assert results["average"]["of"] == "average of 2 tasks: sst2, mrpc"
    assert not list(output.rglob("checkpoints"))
    printed = capsys.readouterr().out
    assert "average of 2 tasks: sst2, mrpc: " in printed
    assert "GLUE" not in printed

    baselines = [f"bag:{encoder}", f"random:{encoder}"]
    assert call("evaluation/run_glue.py", config, *baselines, *settings, "--trainer.output_dir", output / "both") == 0
    folders = sorted((output / "both").glob("*/results.json"))
    found = [json.loads(file.read_text()) for file in folders]
    assert [x["model"].partition(":")[0] for x in found] == ["bag", "random"]
    assert {x["protocol"]["digest"] for x in found} == {results["protocol"]["digest"]}
    assert len({results["model_digest"], *(x["model_digest"] for x in found)}) == 3
    capsys.readouterr()
    assert call("evaluation/summarize_glue.py", output, *(file.parent for file in folders)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["model", str(encoder), *baselines]
    assert "comparable" not in "\n".join(lines)


def test_rows_that_can_be_learned_are_learned_and_a_kill_changes_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The label of a row is its verb. Killed in the second of two cells, after its first checkpoint."""
    write_task(tmp_path / "tasks", "sst2", sizes=(64, 32))
    overrides = ("glue.tasks=[sst2]", f"glue.data_dir={tmp_path}/tasks", "glue.learning_rates=[1e-2]")
    overrides = (*overrides, "glue.batch_sizes=[8]", "trainer.per_device_train_batch_size=8")
    whole = make_config(*overrides, f"trainer.output_dir={tmp_path}/whole")
    expected = run_suite(whole, say=lambda text: None)
    assert expected["tasks"]["sst2"]["best"]["mean"] > 0.9

    killed = make_config(*overrides, f"trainer.output_dir={tmp_path}/killed")

    def suite() -> int:
        run_suite(killed, say=lambda text: None)
        return 0

    child = fork(suite, tmp_path / "log.txt")
    cells = tmp_path / "killed" / "cells" / "sst2"
    deadline = time.monotonic() + 60
    while not list(cells.glob("*seed1*/checkpoints/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL
    assert len(list(cells.glob("*.json"))) == 1
    resumed = run_suite(killed, say=lambda text: None)
    assert scores(resumed) == scores(expected)
    assert resumed["tasks"] == expected["tasks"]


def test_models_of_mnli_answer_what_they_were_not_evaluated_on(
    make_config: MakeConfig, tasks_folder: Path, tmp_path: Path
) -> None:
    """Their answers to the matched split would be those of the evaluation."""
    (tmp_path / "tasks" / "mnli").mkdir(parents=True)
    for split in ("train", "validation_matched"):
        (tmp_path / f"tasks/mnli/{split}.jsonl.gz").symlink_to(tasks_folder / f"mnli/{split}.jsonl.gz")
    (tmp_path / "tasks/mnli/validation_mismatched.jsonl.gz").symlink_to(
        tasks_folder / "mnli/validation_matched.jsonl.gz"
    )
    config = make_config(
        "glue.tasks=[mnli]", "glue.seeds=1", f"glue.data_dir={tmp_path}/tasks", "glue.learning_rates=[1e-2]"
    )
    (cell,) = run_suite(config, say=lambda text: None)["cells"]
    assert cell["metrics"]["validation_matched"] == cell["metrics"]["validation_mismatched"]


def test_bags_of_two_models_are_two(
    encoder: Path, tmp_path: Path, make_config: MakeConfig, tiny: Callable[..., Config]
) -> None:
    pretrain(tiny(tmp_path / "other", "trainer.max_steps=2", "trainer.eval_strategy=no"))
    keys = ("glue.allow_random_weights=false", "tokenizer.path=null")
    starts = [
        choose_start_of(make_config(*keys, f"glue.model=bag:{model}"), tmp_path / "out")
        for model in (encoder, tmp_path / "other")
    ]
    assert starts[0].identity != starts[1].identity
