"""Hard negatives: the rule on vectors that can be checked by hand, and the script from end to end."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import call

from neobert.config.schema import Config
from neobert.contrastive.examples import Example
from neobert.contrastive.finetune import finetune
from neobert.contrastive.mine import MineSettings, mine, mine_examples


def on_circle(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_negatives_are_the_nearest_that_are_not_nearer_than_the_positive() -> None:
    anchors, documents = on_circle(0, 90), on_circle(30, 10, 45, 60, 100, 180)
    positives = documents[[0, 4]]  # Cosines 0.866 and 0.985.
    found = list(mine(anchors, positives, documents, [{0}, {4}], MineSettings(num_negatives=2, margin=0.0)))
    assert found == [[2, 3], [3, 2]], "document 1 is nearer to anchor 0 than its positive"
    wide = MineSettings(num_negatives=9, margin=0.3)
    assert list(mine(anchors, positives, documents, [{0}, {4}], wide)) == [[3, 4, 5], [0, 1, 5]]
    skipped = list(mine(anchors, positives, documents, [{0}, {4}], MineSettings(num_negatives=2, margin=0.0, skip=2)))
    assert skipped == [[3, 4], [0, 1]]


def test_other_answers_of_an_anchor_and_the_anchor_itself_are_no_negatives() -> None:
    examples = [Example(anchor="a", positive="p"), Example(anchor="a", positive="q"), Example(anchor="b", positive="a")]
    documents = ["p", "q", "a"]
    vectors = on_circle(0, 1, 2)
    found = list(mine_examples(examples, vectors, vectors, documents, MineSettings(margin=-1.0)))
    assert [x.negatives for x in found] == [(), (), ("q", "p")]
    assert [(x.anchor, x.positive) for x in found] == [("a", "p"), ("a", "q"), ("b", "a")]


def test_the_script_writes_pairs_with_negatives(
    contrastive: Callable[..., Config], pair_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(contrastive(tmp_path / "run", "trainer.max_steps=1"))
    output = tmp_path / "mined.jsonl"
    words = [str(tmp_path / "run"), str(pair_files / "pairs.jsonl"), "--output", str(output), "--margin", "-2"]
    assert call("contrastive/mine_negatives.py", *words, "--num-negatives", "3") == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 60
    for row in rows:
        assert len(row["negatives"]) == 3
        assert row["positive"] not in row["negatives"]
    capsys.readouterr()
    assert call("contrastive/mine_negatives.py", *words) == 2
    assert "mined.jsonl exists already" in capsys.readouterr().err
    words[1] = str(pair_files / "scored.jsonl")
    words[3] = str(tmp_path / "other.jsonl")
    assert call("contrastive/mine_negatives.py", *words) == 2
    assert "has no pairs" in capsys.readouterr().err
