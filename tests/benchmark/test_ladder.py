"""The ladder: a law through known numbers, and sizes that are trained once and predict the next one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neobert.benchmark import ladder, trial
from neobert.benchmark.experiment_plan import Workspace
from neobert.benchmark.ladder import Ladder, draw, estimate_seconds, find_interval, fit_law, predict
from neobert.commands.ladder_command import ladder as command
from neobert.config.schema import Config
from neobert.errors import CallError, DataError
from neobert.inference.mlm_loss import LossSettings

SIZES = [2e6, 4.3e6, 7.2e6, 11e6]
AT = 15.9e6


def law(parameters: float) -> float:
    return 2.5 + 6.0 * (parameters / 1e6) ** -0.4


def test_the_law_of_known_numbers_is_found() -> None:
    found = fit_law(SIZES, [law(x) for x in SIZES])
    assert found(AT) == pytest.approx(law(AT), abs=2e-3)
    assert (found.floor, found.exponent) == pytest.approx((2.5, 0.4), abs=0.03)
    assert found.describe().startswith(f"L(P) = {found.floor:.3f} + 6.0"), "in millions"


def test_a_floor_is_not_below_zero() -> None:
    found = fit_law(SIZES, [5 - x / 1e7 for x in SIZES])  # A line, which a law without a floor is nearest to.
    assert found.floor == 0
    assert found.exponent > 0.02


def test_the_interval_holds_the_truth_and_shrinks_with_the_noise() -> None:
    noisy = [law(x) + shift for x, shift in zip(SIZES, (0.01, -0.015, 0.012, -0.008))]
    widths = []
    for sigma in (0.02, 0.005):
        low, high = find_interval(SIZES, noisy, AT, sigma)
        assert low < fit_law(SIZES, noisy)(AT) < high
        widths.append(high - low)
    low, high = find_interval(SIZES, noisy, AT)
    assert low < law(AT) < high
    assert widths[1] < 0.6 * widths[0]
    inner = find_interval(SIZES, noisy, 9e6)
    assert inner[1] - inner[0] < widths[0], "between the sizes it is known better than beyond them"


def test_two_sizes_make_no_law() -> None:
    with pytest.raises(ValueError, match="three sizes or more, got 2"):
        fit_law(SIZES[:2], [5, 4])


def test_the_estimate_is_products_at_a_fifth_of_the_measured_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "measure_product", lambda *_: 1e12)
    workspace = Workspace(output=tmp_path, data=tmp_path, overrides=())
    climbed = Ladder(depths=(1, 2, 3), predict=4, tokens_per_parameter=1, workspace=workspace)
    expected = (climbed.size(1).flops + climbed.size(4).flops) / 0.2e12
    assert estimate_seconds(climbed, (1, 4), torch.float32) == pytest.approx(expected)


def test_the_picture_shows_what_is_measured(tmp_path: Path) -> None:
    climbed = Ladder(
        depths=(1, 2, 3),
        predict=4,
        tokens_per_parameter=1,
        workspace=Workspace(output=tmp_path, data=tmp_path, overrides=()),
    )
    result = predict(climbed, [6.0, 5.5, 5.2])
    assert draw(climbed, result).count("<circle") == 3
    assert draw(climbed, {**result, "measured": 5.0}).count("<circle") == 4


@pytest.fixture
def argv(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """A ladder of a few steps on stand-in text."""
    monkeypatch.setattr(trial, "HELD_OUT", LossSettings(mask_all=True, max_length=64, truncate=True, max_documents=30))
    monkeypatch.setattr(trial, "use_threads", lambda count: None)
    monkeypatch.setattr(ladder, "estimate_seconds", lambda *_: 60.0)
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", texts[:200]), ("validation", texts[200:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    length = ["dataset.max_seq_length=64", "dataset.eval_samples=12", "model.max_position_embeddings=64"]
    where = ["--data", str(data), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)]
    few = ["--depths", "1,2,3", "--predict", "4", "--tokens_per_parameter", "0.00007"]
    return [
        *where,
        *few,
        *length,
        "trainer.mixed_precision=no",
        "trainer.logging_steps=1",
        "trainer.torch_compile=false",
        "trainer.device=cpu",
    ]


def test_sizes_are_trained_once_and_the_prediction_is_checked(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("neobert ladder", argv)
    first, out = capsys.readouterr(), tmp_path / "out"
    assert "3 sizes to train, roughly 1 minutes" in first.err
    assert json.loads((out / "ladder.json").read_text())["measured"] is None
    scores = {path.parent.name: path.stat().st_mtime_ns for path in sorted(out.glob("*/score.json"))}
    assert list(scores) == ["depth1-seed0", "depth2-seed0", "depth3-seed0"]
    command("neobert ladder", [*argv, "--check"])
    second = capsys.readouterr()
    assert "1 sizes to train" in second.err
    assert all((out / name / "score.json").stat().st_mtime_ns == when for name, when in scores.items())
    result = json.loads((out / "ladder.json").read_text())
    low, high = result["interval"]
    assert low <= result["predicted"] <= high
    assert result["measured"] == json.loads((out / "depth4-seed0" / "score.json").read_text())["loss"]
    assert f"measured {result['measured']:.4f}, " in second.out
    assert "| **4** | " in (out / "ladder.md").read_text()


def test_wrong_data_are_named_by_their_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data: .*none is no folder; name one with files called train\* and valid"):
        trial.check_data(tmp_path / "none")
    (tmp_path / "train.jsonl").write_text('{"text": "a text"}\n')
    with pytest.raises(DataError, match=r"--data: .*'validation'.*; name one with files called train\* and validation"):
        trial.check_data(tmp_path)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CallError, match="WORLD_SIZE: 2 processes; experiments run one after the other in one process"):
        command("neobert ladder", ["--data", "none"])


@pytest.mark.parametrize("flags", [["--depths", "1,2"], ["--depths", "1,2,2"], ["--depths", "1,2,3", "--predict", "3"]])
def test_sizes_that_make_no_law_are_refused(flags: list[str]) -> None:
    with pytest.raises(CallError, match="write three or more different depths"):
        command("neobert ladder", ["--data", "none", *flags])


def test_the_flag_of_a_wrong_depth_is_named() -> None:
    for flags in (["--depths", "1,x,3"], ["--predict", "x"]):
        with pytest.raises(CallError, match=f"{flags[0]}: 'x'; write a number of layers"):
            command("neobert ladder", ["--data", "none", *flags])
