"""Experiments: plans are checked as a whole, runs are made once and resume after a kill, and the table is whole."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call

from neobert.benchmark import experiments, trial
from neobert.benchmark.experiment_plan import PlanError, PlannedRun, Variant, grid, load_plan
from neobert.benchmark.experiments import TrialResult, best_outcomes, describe, draw
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.inference.mlm_loss import LossSettings

PLAN = """
config: base.yaml
seeds_at_best: 1
runs:
  plain: {learning_rates: [1e-3, 3e-2]}
  masked: {overrides: [datacollator.mask_all=true, datacollator.mlm_probability=0.3]}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., Config], texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base config, a plan and a folder of data with a validation split."""
    monkeypatch.setattr(trial, "HELD_OUT", LossSettings(mask_all=True, max_length=64, truncate=True, max_documents=30))
    monkeypatch.setattr(trial, "use_threads", lambda count: None)
    base = tiny(
        tmp_path / "unused",
        "trainer.max_steps=6",
        "trainer.logging_steps=2",
        "trainer.save_steps=2",
        "trainer.eval_strategy=no",
    )
    (tmp_path / "base.yaml").write_text(config_to_yaml(base))
    (tmp_path / "plan.yaml").write_text(PLAN)
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", texts[:200]), ("validation", texts[200:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return tmp_path


def start(folder: Path, *words: str) -> object:
    where = [folder / "plan.yaml", "--data", folder / "data", "--output", folder / "out"]
    return call("experiments/compare.py", *where, *words)


def test_a_plan_becomes_runs(folder: Path) -> None:
    plan = load_plan(folder / "plan.yaml")
    jobs = [job for variant in plan.variants for job in grid(variant)]
    assert [job.name for job in jobs] == ["plain-lr1e-3-seed0", "plain-lr3e-2-seed0", "masked-seed0"]
    assert jobs[1].overrides == ["optimizer.lr=3e-2", "seed=0"]
    assert jobs[2].overrides == ["datacollator.mask_all=true", "datacollator.mlm_probability=0.3", "seed=0"]
    assert (plan.name, plan.seeds_at_best, plan.config) == ("plan", 1, folder / "base.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: {a: {}}", "config: name the config"),
        ("config: base.yaml", "runs: write at least one"),
        ("config: base.yaml\nruns: {a: {}}\nseeds: 3", "unknown key 'seeds'"),
        ("config: base.yaml\nruns: {a: {lr: 3}}", "runs.a has the unknown key 'lr'"),
        ("config: base.yaml\nruns: {a: {learning_rates: 1e-3}}", "runs.a.learning_rates: write a list"),
        ("config: base.yaml\nseeds_at_best: -1\nruns: {a: {}}", "seeds_at_best"),
        ("config: base.yaml\nruns: {a/b: {}}", "runs.a/b: the name becomes part of a folder"),
        ("config: [", "plan.yaml"),
    ],
)
def test_a_plan_with_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=said.replace("[", r"\[")):
        load_plan(tmp_path / "plan.yaml")


def test_all_configs_are_checked_before_the_first_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plan.yaml").write_text(
        PLAN + "  later: {overrides: [model.hidden_siz=32]}\n  last: {learning_rates: [-1]}\n"
    )
    assert start(folder) == 2
    said = capsys.readouterr().err
    assert "later-seed0: model.hidden_siz: unknown key" in said
    assert "last-lr-1-seed0: optimizer.lr: -1.0 must be greater than 0" in said
    assert not (folder / "out").exists()
    assert start(folder, "--only", "masked", "--check") == 0, "entries that are not run now do not matter"
    (folder / "plan.yaml").write_text(PLAN)
    assert start(folder, "--optimizer.lr", "1e-3") == 2
    assert "plain-lr1e-3-seed0: optimizer.lr is set by the plan; leave it out" in capsys.readouterr().err
    assert start(folder, "--only", "nothing") == 2
    assert "it has plain, masked" in capsys.readouterr().err


def test_data_without_held_out_documents_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "validation.jsonl").unlink()
    assert start(folder) == 2
    assert "'validation'" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_check_lists_the_runs_and_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(folder, "--check") == 0
    assert capsys.readouterr().out.split() == ["plain-lr1e-3-seed0", "plain-lr3e-2-seed0", "masked-seed0"]
    assert not (folder / "out").exists()


def test_runs_are_made_once_and_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(folder, "--only", "masked") == 0
    assert start(folder, "--optimizer.weight_decay", "0.1") == 0
    out = capsys.readouterr().out
    results = json.loads((folder / "out" / "results.json").read_text())
    names = [(run["variant"], run["learning_rate"], run["seed"]) for run in results["runs"]]
    best = results["best"]["plain"]
    assert names[-2:] == [("masked", None, 0), ("masked", None, 1)]
    assert sorted(names[:-2]) == sorted([("plain", "1e-3", 0), ("plain", "3e-2", 0), ("plain", best, 1)])
    first = {
        run["learning_rate"]: run["loss"] for run in results["runs"] if run["variant"] == "plain" and not run["seed"]
    }
    assert best == min(first, key=lambda rate: first[rate])
    assert all(run["num_steps"] == 6 and run["num_tokens"] > 1000 for run in results["runs"])
    assert results["held_out"]["mask_all"] is True
    assert f"| **plain** | **{best}** |" in out
    assert (folder / "out" / "results.md").read_text() in out
    assert (folder / "out" / "results.svg").read_text().count("<circle") == 5
    assert not list((folder / "out").glob("*/checkpoints")), "scored weights are removed"

    def train_nothing(config: Config) -> None:
        raise AssertionError("a finished run is not made again")

    monkeypatch.setattr(experiments, "train", train_nothing)
    assert start(folder) == 0
    assert json.loads((folder / "out" / "results.json").read_text())["runs"] == results["runs"]
    assert start(folder, "--model.dropout_prob", "0.1") == 2
    assert "holds a finished run with other settings" in capsys.readouterr().err


def test_all_runs_of_a_plan_have_one_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bf16 is about as fast as fp32: runs that choose for themselves would not all choose the same."""
    choices = iter(["bf16", "no", "no"])
    monkeypatch.setattr(trial, "choose_precision", lambda config: (next(choices), "it is so"))
    precision = ("--only", "masked", "--trainer.mixed_precision")
    assert start(folder, *precision, "auto") == 0
    made = [load_config(path).trainer.mixed_precision for path in (folder / "out").glob("*/config.yaml")]
    assert made == ["bf16", "bf16"]

    def train_nothing(config: Config) -> None:
        raise AssertionError("a finished run is not made again")

    monkeypatch.setattr(experiments, "train", train_nothing)
    assert start(folder, *precision, "auto") == start(folder, *precision, "bf16") == 0
    assert start(folder, *precision, "no") == 2


def test_a_killed_run_continues_and_ends_as_one_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(folder, "--only", "masked") == 0
    alone = json.loads((folder / "out" / "masked-seed0" / "score.json").read_text())

    def kill(self: object, state: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("neobert.train.loop.fault_point", lambda name, step: kill(None, None) if step == 5 else None)
        assert start(folder, "--only", "masked", "--output", str(folder / "killed")) == 130
    assert not (folder / "killed" / "masked-seed0" / "score.json").exists()
    assert start(folder, "--only", "masked", "--output", str(folder / "killed")) == 0
    again = json.loads((folder / "killed" / "masked-seed0" / "score.json").read_text())
    assert (again["loss"], again["num_tokens"]) == (alone["loss"], alone["num_tokens"])
    events = (folder / "killed" / "masked-seed0" / "events.jsonl").read_text()
    assert '"resumed"' in events


def outcome(variant: str, rate: str | None, seed: int, loss: float | None) -> TrialResult:
    return TrialResult(
        variant=variant,
        learning_rate=rate,
        seed=seed,
        loss=loss,
        accuracy=None if loss is None else 0.25,
        num_steps=10,
        num_tokens=1000,
        training_seconds=2.0,
        tokens_per_second=500.0,
    )


OUTCOMES = [
    outcome("a", "1e-3", 0, 5.0),
    outcome("a", "2e-3", 0, 4.0),
    outcome("a", "2e-3", 1, 4.5),
    outcome("a", "2e-3", 2, 5.5),
    outcome("a", "4e-3", 0, None),
    outcome("b", None, 0, 4.25),
]


def test_the_best_rate_is_chosen_by_the_first_seed_alone() -> None:
    best = best_outcomes([*OUTCOMES, outcome("a", "1e-3", 1, 1.0), outcome("c", "1", 0, None)])
    assert {name: (run.learning_rate, run.loss) for name, run in best.items()} == {
        "a": ("2e-3", 4.0),
        "b": (None, 4.25),
    }


def test_the_table_shows_mean_and_range_and_what_to_mind() -> None:
    assert describe(OUTCOMES).splitlines() == [
        "| | learning rate | held-out loss, mean | lowest and highest | seeds | accuracy | tokens | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        "| a | 1e-3 | 5.0000 |  | 1 | 25.00% | 1,000 | 500 |",
        "| **a** | **2e-3** | 4.6667 | 4.0000 5.5000 | 3 | 25.00% | 1,000 | 500 |",
        "| a | 4e-3 | numbers went bad | | 1 | | | |",
        "| **b** | **of the config** | 4.2500 |  | 1 | 25.00% | 1,000 | 500 |",
    ]
    edge = describe([outcome("a", "3e-3", 0, 4.0), outcome("a", "1e-2", 0, 3.0)]).splitlines()[-1]
    assert edge == "a: the best learning rate, 1e-2, is the highest one tried; a better one may lie beyond."


def test_the_picture_has_a_dot_a_run_and_escapes_names() -> None:
    picture = draw([*OUTCOMES, outcome("<b>", None, 0, 4.5)], "a & b")
    assert picture.count("<circle") == 6
    assert picture.count('fill="#4878a8"') == 5, "filled at the best rate of each"
    assert "a &amp; b" in picture
    assert "&lt;b&gt;" in picture
    assert "bad numbers" in picture
    assert draw([outcome("a", None, 0, None)], "none").startswith("<svg")


def test_bad_numbers_are_an_outcome(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: Config) -> None:
        Path(config.trainer.output_dir).mkdir(parents=True)
        (Path(config.trainer.output_dir) / "config.yaml").write_text(config_to_yaml(config))
        (Path(config.trainer.output_dir) / "log.jsonl").write_text("")
        raise trial.Stopped("numbers")

    monkeypatch.setattr(experiments, "train", diverge)
    assert start(folder) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["best"] == {}
    assert [run["loss"] for run in results["runs"]] == [None, None, None]


def test_an_interruption_is_said_by_the_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Config) -> None:
        raise trial.Stopped("preempted")

    monkeypatch.setattr(experiments, "train", stop)
    assert start(folder) == 75


def test_seconds_leave_out_the_interval_in_which_a_model_is_compiled(tmp_path: Path) -> None:
    lines = [
        {"kind": "log", "step": 2, "tokens": 100, "seconds": 50.0},
        {"kind": "step", "step": 3},
        {"kind": "log", "step": 6, "tokens": 300, "seconds": 4.0},
        {"kind": "log", "step": 7, "tokens": 350, "seconds": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = trial.read_speed(tmp_path)
    assert dataclasses.asdict(speed) == {
        "num_steps": 7,
        "num_tokens": 350,
        "training_seconds": 7.0,
        "tokens_per_second": 50.0,
    }


def test_names_of_runs_are_unlike() -> None:
    variant = Variant(name="a", overrides=(), learning_rates=("1e-3",))
    names = {
        PlannedRun(variant=variant, learning_rate=rate, seed=seed).name for rate in ("1e-3", None) for seed in (0, 1)
    }
    assert len(names) == 4
