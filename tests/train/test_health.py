"""Checks of a run: each finds its planted fault, healthy runs trigger none, and a finding is said once."""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from records import log_lines
from small_corpus import make_texts

from neobert.config.load import build_config
from neobert.config.schema import Config
from neobert.data.rows.loader import Loader
from neobert.objectives.table import choose_objective
from neobert.optim.schedule import build_schedule
from neobert.train import build
from neobert.train.loop import pretrain
from neobert.train.record.health import findings, watch
from neobert.train.record.health.checks import CHECKS
from neobert.train.record.health.findings import Expected
from neobert.train.record.health.known_issues import KNOWN_ISSUES
from neobert.train.record.health.troubleshooting import build_page
from neobert.train.record.health.watch import Health, measure_weights
from neobert.train.report.log_reader import RunLog
from neobert.train.report.page import REPORT
from neobert.train.run import build_run

Tiny = Callable[..., Config]
Line = dict[str, Any]
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


@pytest.fixture(scope="module")
def real() -> list[Line]:
    """The first 1,500 steps of a run on Wikipedia, rounded: 6 layers of 256, masks of 30%, clipped attention logits."""
    with gzip.open(TESTS / "golden" / "healthy_run.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def expect(lines: Sequence[Line], **changed: Any) -> Expected:
    rates = {x["step"] - 1: x["lr"] for x in lines if x["kind"] == "step"}
    expected = Expected(
        num_steps=4883,
        warmup_steps=146,
        learning_rate=rates.__getitem__,
        unigram_entropy=lambda: 7.241,
        mask_rates=(0.3, 0.3),
        lowest_fill=0.85,
        row_length=256,
        clipping_threshold=50.0,
        memory_bytes=2**30,
    )
    return replace(expected, **changed)


def read(lines: Iterable[Line]) -> RunLog:
    log = RunLog(Path("log.jsonl"))
    for line in lines:
        log._add(json.dumps(line).encode())
    return log


def find(lines: Iterable[Line], expected: Expected) -> dict[str, str]:
    log = read(lines)
    found = {name: check.find(log, expected) for name, check in CHECKS.items()}
    return {name: text for name, text in found.items() if text is not None}


def test_a_real_run_triggers_none_at_any_of_its_log_lines(real: list[Line]) -> None:
    log, expected, looks = RunLog(Path("log.jsonl")), expect(real), 0
    for line in real:
        log._add(json.dumps(line).encode())
        if line["kind"] != "step":
            assert [name for name, check in CHECKS.items() if check.find(log, expected)] == []
            looks += 1
    assert looks > 30


# ---- planted ----


def change(lines: Sequence[Line], kind: str, *, after: int = 0, **values: Any) -> list[Line]:
    """The lines with other values in those of a kind; a function is called with the line."""

    def changed(line: Line) -> Line:
        if line["kind"] != kind or line["step"] <= after:
            return line
        return line | {name: x(line) if callable(x) else x for name, x in values.items()}

    return [changed(line) for line in lines]


def evaluated(lines: Sequence[Line], **metrics: Sequence[float]) -> list[Line]:
    """The lines with four evaluations, the last at the end."""
    (example,) = (x for x in lines if x["kind"] == "eval" and x["step"] == 1000)
    values = [dict(zip(metrics, row)) for row in zip(*metrics.values())]
    return [*lines, *(example | {"step": 1200 + 100 * n} | row for n, row in enumerate(values))]


def weights_lines(*measured: Line) -> list[Line]:
    return [{"kind": "weights", "step": 600 + 300 * n, **x} for n, x in enumerate(measured)]


RISING = (5.0, 5.3, 5.5, 5.6)
FAULTS: dict[str, Callable[[list[Line]], tuple[list[Line], dict[str, Any]]]] = {
    "flat_loss": lambda x: (change(x, "step", loss=lambda line: 10.3 + line["step"] % 7 / 100), {}),
    "loss_near_zero": lambda x: (change(x, "step", after=900, loss=0.0), {}),
    "unigram_plateau": lambda x: (change(x, "step", after=100, loss=lambda line: max(7.24, line["loss"])), {}),
    "gradient_zero": lambda x: (change(x, "step", after=1400, grad_norm=0.0), {}),
    "gradient_large": lambda x: (
        change(x, "step", after=1400, grad_norm=lambda line: line["grad_norm"] * (1000 if line["step"] % 3 else 1)),
        {},
    ),
    "held_out_diverging": lambda x: (evaluated(x, loss=RISING), {}),
    "rate_off_curve": lambda x: (change(x, "step", after=1499, lr=None), {}),
    "logits_large": lambda x: (change(x, "log", after=1200, max_attention_logit=900.0), {}),
    "dead_heads": lambda x: ([*x, *weights_lines({"dead_heads": [[3, 1]]}, {"dead_heads": [[3, 1]]})], {}),
    "embedding_drift": lambda x: ([*x, *weights_lines({"embedding_norm": 100.0}, {"embedding_norm": 410.0})], {}),
    "masks_off": lambda x: (change(x, "step", after=1470, num_targets=lambda line: line["num_tokens"]), {}),
    "source_starving": lambda x: (
        change(x, "log", source_tokens=lambda line: {"a": 150_000, "b": 50_000 if line["step"] <= 1200 else 900}),
        {},
    ),
    "padding": lambda x: (change(x, "log", after=1200, packing_fill=0.7), {}),
    "throughput_falling": lambda x: (change(x, "log", after=1200, tokens_per_second=900.0, seconds=200.0), {}),
    "data_wait": lambda x: (change(x, "log", after=1300, data_wait=0.4), {}),
    "swap": lambda x: (x, {"swapped_bytes": 2**29}),
}


def test_every_check_has_a_planted_fault() -> None:
    assert FAULTS.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_planted_fault(real: list[Line], name: str) -> None:
    lines, facts = FAULTS[name](real)
    expected = expect(real, **facts)
    found = find(lines, expected)
    # A loss that falls nowhere is that of token frequencies too.
    assert found.keys() == {name} | ({"unigram_plateau"} if name == "flat_loss" else set())
    assert re.search(r"\d", found[name]), "the finding has its numbers"


def test_steps_that_predict_the_next_token_are_not_judged_as_masked_ones(real: list[Line]) -> None:
    for name in ("held_out_diverging", "masks_off", "unigram_plateau"):
        lines, facts = FAULTS[name](real)
        assert find(lines, expect(real, **facts, causal_steps=4000)) == {}


def test_a_loss_that_is_no_cross_entropy_may_be_small(real: list[Line]) -> None:
    small = change(real, "step", loss=0.04)
    assert "loss_near_zero" in find(small, expect(real))
    assert "loss_near_zero" not in find(small, expect(real, unigram_entropy=None))


@pytest.mark.parametrize(
    ("keys", "rates", "of_tokens_alone"),
    [
        ({}, (0.2, 0.2), True),
        ({"datacollator.mlm_probability": 0.3, "datacollator.mlm_probability_final": 0.15}, (0.15, 0.3), True),
        ({"datacollator.mlm_rate": "random", "datacollator.mlm_rate_range": (0.1, 0.5)}, (0.1, 0.5), True),
        ({"trainer.objective": "clm"}, None, True),
        ({"trainer.objective": "mlm_jepa", "trainer.ema_decay": 0.9}, (0.2, 0.2), False),
        ({"trainer.objective": "distill", "distill.teacher": "x"}, (0.2, 0.2), False),
        ({"trainer.objective": "replaced_token"}, None, False),
    ],
)
def test_what_is_expected_of_masks_and_of_the_loss(
    keys: Mapping[str, Any], rates: tuple[float, float] | None, of_tokens_alone: bool
) -> None:
    config = build_config({"dataset.name": "python_stdlib", "trainer.max_steps": 10, **keys})
    schedule = build_schedule(config.scheduler, base_lr=1.0, num_steps=10)
    expected = watch.build_expected(config, choose_objective(config), schedule, 10, lambda: 7.0)
    assert (expected.mask_rates, expected.unigram_entropy is not None) == (rates, of_tokens_alone)


def test_a_loss_of_zero_from_the_start_is_found_for_every_objective(real: list[Line]) -> None:
    zero = [x for x in change(real, "step", loss=0.0) if x["step"] <= 100]
    assert "loss_near_zero" in find(zero, expect(real))
    assert "loss_near_zero" in find(zero, expect(real, predicts_tokens=False, mask_rates=None, unigram_entropy=None))
    late = change(real, "step", loss=0.0005)
    assert "loss_near_zero" not in find(late, expect(real, predicts_tokens=False, unigram_entropy=None))


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": RISING, "criterion": (-0.5, -0.5, -0.55, -0.6)},  # The score still improves.
        {"loss": (5.0, 5.3, 5.5, 5.1)},
        {"loss": RISING, "num_documents": (400, 400, 400, 300)},  # Another evaluation.
    ],
)
def test_what_is_no_divergence(real: list[Line], metrics: dict[str, Sequence[float]]) -> None:
    assert find(evaluated(real, **metrics), expect(real)) == {}


def test_trained_weights_may_have_little_left_to_learn(real: list[Line]) -> None:
    flat = change(real, "step", loss=3.0)
    assert "flat_loss" in find(flat, expect(real))
    assert "flat_loss" not in find(flat, expect(real, starts_trained=True, num_steps=1500))
    rising = change(flat, "step", after=1000, loss=4.0)
    assert "flat_loss" in find(rising, expect(real, starts_trained=True, num_steps=1500))


def test_a_source_that_never_gives_a_token(real: list[Line]) -> None:
    lines = change(real, "log", source_tokens={"a": 200_000, "b": 0})
    expected = {"source_starving": "b has given no token in 1,500 steps"}
    assert find(lines, expect(real, weighted_sources=True)) == expected
    assert find(lines, expect(real)) == {}, "without weights it may be too small to come"


def test_speeds_of_an_earlier_start_are_of_another_machine_maybe(real: list[Line]) -> None:
    lines, _ = FAULTS["throughput_falling"](real)
    assert find(lines, expect(real, first_step=1200)) == {}


# ---- really planted ----


def health_events(output_dir: Path, event: str = "health") -> list[str]:
    lines = map(json.loads, (output_dir / "events.jsonl").read_text().splitlines())
    return [x["check"] for x in lines if x["event"] == event]


def test_a_rate_a_hundred_times_too_high_is_noticed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["optimizer.lr=1", "trainer.max_steps=80", "trainer.logging_steps=20", "trainer.save_model=false"]
    monkeypatch.setattr(findings, "PLATEAU_STEPS", 60)
    pretrain(tiny(tmp_path / "run", *settings, "trainer.eval_steps=0", "trainer.per_device_train_batch_size=1"))
    assert health_events(tmp_path / "run") == ["unigram_plateau"]


def test_a_run_whose_batches_are_masked_everywhere_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_masks = build.build_train_masks
    monkeypatch.setattr(build, "build_train_masks", lambda *args: replace(build_masks(*args), probability=1.0))
    out, settings = tmp_path / "run", ["trainer.max_steps=24", "trainer.save_steps=24", "trainer.eval_steps=12"]
    pretrain(tiny(out, *settings))
    assert health_events(out) == ["masks_off"]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "health:" in line]
    (logged,) = [line for line in (out / "training.log").read_text().splitlines() if "health:" in line]
    assert said == logged
    assert re.search(r"health: masks_off at step 21: 9\d\.\d% of the tokens .* the config has 20%; ", said)
    assert CHECKS["masks_off"].advice in said
    assert "<td>health</td>" in (out / REPORT).read_text()
    # A resumed run knows what was said, from the log and the events alone.
    pretrain(tiny(out, *settings, "trainer.max_steps=30", "trainer.resume_from_checkpoint=latest"))
    assert health_events(out) == ["masks_off"]


def test_a_source_that_breaks_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    long = [" ".join(make_texts(5, seed=seed)) for seed in range(60)]
    for name, texts in {"good": long, "bad": [*long[:8], *["the cat"] * 4000]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [f"{{path: {tmp_path}/{name}.jsonl, weight: 1}}" for name in ("good", "bad")]
    settings = ["dataset.path=null", f"dataset.mixture=[{', '.join(sources)}]", "dataset.min_length=1"]
    settings += ["trainer.logging_steps=5", "trainer.max_steps=60", "trainer.save_model=false", "trainer.eval_steps=0"]
    pretrain(tiny(tmp_path / "run", *settings, "dataset.num_lanes=1", "dataset.window_documents=16"))
    assert health_events(tmp_path / "run") == ["source_starving"]


def test_a_loader_that_sleeps_is_noticed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    next_unless = Loader.next_unless

    def slow(self: Loader, stop: Callable[[], bool]) -> Any:
        time.sleep(0.03)
        return next_unless(self, stop)

    monkeypatch.setattr(Loader, "next_unless", slow)
    monkeypatch.setattr(findings, "LONG_ENOUGH", 0.1)
    pretrain(tiny(tmp_path / "run", "trainer.save_model=false", "trainer.eval_steps=0"))
    assert health_events(tmp_path / "run") == ["data_wait"]


HEALTHY: dict[str, list[str]] = {
    "adamw": ["optimizer.name=adamw"],
    "stable_adamw": ["optimizer.name=stable_adamw"],
    "normuon": ["optimizer.name=normuon"],
    "muonclip": ["optimizer.name=muonclip", "trainer.log_statistics=true"],
    "ngpt": ["model.ngpt=true", "optimizer.weight_decay=0"],
    "one document a row": ["datacollator.pack_sequences=false"],
    "replaced tokens": ["trainer.objective=replaced_token"],
    "stream of words": ["dataset.streaming=true", "datacollator.mask_units=words"],
    "masks that grow": ["datacollator.mlm_probability_final=0.4", "model.dropout_prob=0.1"],
    "accumulated, averaged": ["trainer.gradient_accumulation_steps=2", "trainer.ema_decay=0.9"],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_triggers_none(tiny: Tiny, tmp_path: Path, name: str) -> None:
    settings = ["trainer.max_steps=25", "trainer.eval_steps=12", "trainer.save_model=false"]
    pretrain(tiny(tmp_path / "run", *HEALTHY[name], *settings))
    assert health_events(tmp_path / "run") == []
    weights = log_lines(tmp_path / "run", "weights")
    assert [x["step"] for x in weights] == [0, 12, 24, 25]
    assert all(x["embedding_norm"] > 0 and x["dead_heads"] == [] for x in weights)


# ---- said once ----


class Recorder:
    """What of a Tracker is called."""

    def __init__(self) -> None:
        self.log = RunLog(Path("log.jsonl"))
        self.said: list[str] = []

    def read_log(self) -> RunLog:
        return self.log

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say

    def event(self, kind: str, step: int, **details: Any) -> None:
        self.said.append(f"{kind} {step} {details['check']}")


def test_a_finding_is_said_when_it_begins_and_when_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    health = Health(Expected(num_steps=100), recorder, tmp_path / "events.jsonl")  # type: ignore[arg-type]
    seen = "..x.xx.x..x...x"
    check = replace(CHECKS["swap"], find=lambda log, expected: "much" if seen[step] == "x" else None)
    monkeypatch.setattr(watch, "CHECKS", {"swap": check})
    for step in range(len(seen)):
        health.look(step)
    events = [text for text in recorder.said if ":" not in text]
    assert events == ["health 2 swap", "health_over 13 swap", "health 14 swap"]
    assert recorder.said[0].startswith("health: swap at step 2: much; ")


def test_a_check_that_fails_is_switched_off_and_the_others_look_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    health = Health(Expected(num_steps=100), recorder, tmp_path / "events.jsonl")  # type: ignore[arg-type]

    def fail(log: RunLog, expected: Expected) -> str | None:
        raise KeyError("loss")

    checks = {"padding": replace(CHECKS["padding"], find=fail), "swap": replace(CHECKS["swap"], find=lambda *_: "much")}
    monkeypatch.setattr(watch, "CHECKS", checks)
    health.look(3)
    health.look(4)
    assert sum("switched off" in text for text in recorder.said) == 1
    assert "health 3 swap" in recorder.said


def test_health_checks_can_be_turned_off(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "FEW", 0)
    pretrain(tiny(tmp_path / "run", "trainer.health_checks=false", "trainer.max_steps=4", "trainer.save_model=false"))
    assert health_events(tmp_path / "run") == []
    assert log_lines(tmp_path / "run", "weights") == []


def test_heads_whose_values_or_output_are_zero_are_dead(tiny: Tiny, tmp_path: Path) -> None:
    run = build_run(tiny(tmp_path / "run"))
    assert measure_weights(run.module)["dead_heads"] == []
    with torch.no_grad():
        run.module.encoder.layers[0].qkv.weight[2 * 32 + 16 :] = 0  # Values of the second of two heads.
        run.module.encoder.layers[1].out.weight[:, :16] *= 1e-3
    measured = measure_weights(run.module)
    assert measured["dead_heads"] == [[0, 1], [1, 0]]
    assert measured["embedding_norm"] == pytest.approx(run.module.encoder.embedding.weight.norm().item())


# ---- docs ----


def test_the_tables_of_the_page_are_up_to_date() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    advice = "run `python -m neobert.train.record.health.troubleshooting` and commit docs/troubleshooting.md"
    assert page == build_page(page), advice
    assert all(f"| `{name}` |" in page for name in CHECKS)


@pytest.mark.parametrize("test", sorted({test for issue in KNOWN_ISSUES for test in issue.tests}))
def test_a_known_issue_names_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}" in (TESTS / file).read_text()


def test_every_advice_is_one_line_and_names_a_page_that_exists() -> None:
    for check in CHECKS.values():
        assert "\n" not in check.advice
        file, _, anchor = check.page.partition("#")
        titles = re.findall(r"^#+ (.*)$", (ROOT / "docs" / file).read_text(), re.MULTILINE)
        assert anchor in [title.lower().replace(" ", "-") for title in titles]
