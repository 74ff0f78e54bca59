"""Tables: best and median of the grid apart, and protocols that never share a column."""

import re
from typing import Any

import pytest

from neobert.config.schema import Config
from neobert.errors import DataError
from neobert.glue.cells import Cell, CellResult
from neobert.glue.grids import GridPoint
from neobert.glue.score_table import build_results, describe_results
from neobert.glue.side_by_side_scores import compare_results, load_results
from neobert.glue.starts import ModelStart

SCORES = {1e-5: (0.70, 0.80), 2e-5: (0.60, 0.62), 3e-5: (0.90, 0.50)}


def build(name: str = "run", tasks: tuple[str, ...] = ("sst2",), **settings: Any) -> dict[str, Any]:
    results = {
        Cell(task=task, point=GridPoint(lr=lr, batch=32), seed=seed): CellResult(
            score=score, metrics={"validation": {"accuracy": score}}, best_step=1, steps=2, seconds=1.0
        )
        for task in tasks
        for lr, scores in SCORES.items()
        for seed, score in enumerate(scores)
    }
    protocol = {"seeds": [0, 1], "data": "sha256:0", "settings": {"finetune.pooling": "mean", **settings}}
    start = ModelStart(name=name, identity=name, apply=lambda config: config)
    return build_results(Config(), start, results, {task: {"task": task, **protocol} for task in tasks})


def test_best_and_median_of_the_grid_are_apart() -> None:
    task = build()["tasks"]["sst2"]
    assert (task["best"]["lr"], task["best"]["mean"], task["best"]["seeds"]) == (1e-5, pytest.approx(0.75), 2)
    assert task["best"]["std"] == pytest.approx(0.0707, abs=1e-4)
    assert (task["median"]["mean"], task["median"]["points"]) == (pytest.approx(0.70), 3)
    text = describe_results(build())
    assert "sst2  accuracy  75.0 ± 7.1    lr 1e-05, 32 rows  70.0 ± 7.1" in text
    assert text.splitlines()[-1] == "average of 1 task: sst2: 75.0 (best of grid), 70.0 (median of grid)"
    assert "GLUE" not in text


def test_runs_of_one_protocol_share_the_columns() -> None:
    text = compare_results([build("one"), build("two")])
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["model", "one", "two"]
    assert text.count("75.0 ± 7.1 (70.0)") == 2
    assert text.splitlines()[0].split()[1] == "sst2"
    assert "comparable" not in text


def test_another_protocol_has_columns_of_its_own_and_is_explained() -> None:
    runs = [build("one", ("sst2", "cola")), build("two", **{"finetune.pooling": "cls"})]
    text = compare_results(runs)
    header = text.splitlines()[0]
    assert [re.sub(r" \[.*", "", column) for column in re.split(" {2,}", header)] == [
        "model",
        "cola",
        "sst2",
        "sst2",
        "average of 2 tasks: cola, sst2",
        "average of 1 task: sst2",
    ]
    assert "sst2: 2 protocols, which are not comparable; they differ in finetune.pooling" in text
    assert "averages of different protocols are not comparable" in text
    assert [line.count("75.0") for line in text.splitlines()[1:3]] == [3, 2]


def test_a_file_that_is_no_result_is_named(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"results\.json cannot be read"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no results\.json of neobert glue"):
        load_results(tmp_path)
