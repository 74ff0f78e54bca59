"""The yardstick: as many steps as fit into the time, then one JSON line."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call

from neobert.benchmark import trial
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.inference.mlm_loss import LossSettings

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiments" / "yardstick.py"


@pytest.fixture
def words(tmp_path: Path, tiny: Callable[..., Config], texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a tiny run."""
    monkeypatch.setattr(trial, "HELD_OUT", LossSettings(mask_all=True, max_length=64, truncate=True, max_documents=20))
    monkeypatch.setattr(trial, "use_threads", lambda count: None)
    (tmp_path / "base.yaml").write_text(config_to_yaml(tiny(tmp_path / "unused", "trainer.logging_steps=1")))
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", texts[:200]), ("validation", texts[200:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return [str(tmp_path / "base.yaml"), "--data", str(data), "--output", str(tmp_path / "out"), "--speed-steps", "5"]


def test_one_json_line(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["yardstick.py", *words, "--seconds", "0.2", "--optimizer.lr", "3e-3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["budget_seconds"] == 0.2
    assert result["settings"][-2:] == ["--optimizer.lr", "3e-3"]
    assert result["num_documents"] == 20
    assert 3 < result["loss"] < 7
    assert result["tokens_per_second"] == pytest.approx(result["num_tokens"] / result["training_seconds"])
    assert "lr: 0.003" in (Path(words[4]) / "config.yaml").read_text()


def test_the_number_of_steps_is_what_fits(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    speed = trial.Speed(num_steps=5, num_tokens=500, training_seconds=2.0, tokens_per_second=250.0)
    monkeypatch.setattr(trial, "read_speed", lambda run: speed)
    steps: list[int | None] = []
    monkeypatch.setattr(trial, "train", lambda config: steps.append(config.trainer.max_steps))
    assert trial.measure_steps(Path(words[0]), [], seconds=9.0, steps=5) == 22
    assert steps == [5]
    assert trial.measure_steps(Path(words[0]), [], seconds=0.001, steps=5) == 1


def test_a_number_of_steps_repeats_a_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        assert call("experiments/yardstick.py", *words, "--steps", "4") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["loss"] == results[1]["loss"]
    assert [result["num_steps"] for result in results] == [4, 4]
    assert results[0]["budget_seconds"] is None


def test_mistakes_are_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("experiments/yardstick.py", *words, "--optimizer.lrr", "3e-3") == 2
    assert "optimizer.lrr: unknown key" in capsys.readouterr().err
    assert call("experiments/yardstick.py", *words, "--threads", "0") == 2
    assert "--threads: 0" in capsys.readouterr().err
