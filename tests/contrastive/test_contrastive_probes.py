"""Probes of contrastive runs: sets alone, and the training as without them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.contrastive.finetune import finetune

Contrastive = Callable[..., Config]


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [x for x in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if x["kind"] == kind]


def test_sets_are_probed(contrastive: Contrastive, pair_files: Path, tmp_path: Path) -> None:
    short = "trainer.max_steps=2"
    sets = f"trainer.probe_sets=[{pair_files / 'scored.jsonl'}, {pair_files / 'labelled.jsonl'}]"
    finetune(contrastive(tmp_path / "plain", short))
    finetune(contrastive(tmp_path / "probed", short, "trainer.probe_steps=1", sets))
    one, other = (lines_of(tmp_path / name, "step") for name in ("plain", "probed"))
    assert len(one) == 2
    assert [(x["loss"], x["grad_norm"]) for x in one] == [(x["loss"], x["grad_norm"]) for x in other]
    lines = lines_of(tmp_path / "probed", "probe")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert not line["losses"]
        assert [sorted(found) for found in line["sets"].values()] == [["spearman"], ["knn", "ridge"]]
    with pytest.raises(ConfigError, match=r"trainer\.probe_tokens"):
        contrastive(tmp_path / "run", "trainer.probe_steps=1", sets, "trainer.probe_tokens=5")
