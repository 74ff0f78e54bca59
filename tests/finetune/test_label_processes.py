"""Two processes train on the rows one process would, and evaluate alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import run_in_two

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.finetune.evaluate_labels import load_predictions
from neobert.finetune.job import finetune, read_evaluations


def steps(folder: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == "step"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_equal_one(
    labelled: Callable[..., Config], labelled_files: Path, tmp_path: Path, engine: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keys = [f"dataset.path={labelled_files}/words.jsonl", "trainer.global_batch_size=8", "optimizer.lr=1e-3"]
    keys += ["model.dropout_prob=0", "finetune.classifier_dropout=0", "trainer.per_device_eval_batch_size=5"]
    keys += ["optimizer.eps=1e-4", "dataset.eval_samples=23"]
    finetune(labelled(one, *keys))
    keys += ["trainer.per_device_train_batch_size=2", f"trainer.parallel={engine}"]
    printed = run_in_two(lambda: EXIT_CODES[finetune(labelled(two, *keys)).reason], tmp_path)
    assert [text.count("budget") for text in printed] == [1, 0], "only one process speaks"
    for a, b in zip(steps(one), steps(two), strict=True):
        for exact in ("step", "num_tokens", "num_targets", "batch_digest"):
            assert a[exact] == b[exact]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    for a, b in zip(read_evaluations(one), read_evaluations(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert (a["step"], a["num_rows"]) == (b["step"], 23)
    assert len(load_predictions(one, 12)) == len(load_predictions(two, 12))
