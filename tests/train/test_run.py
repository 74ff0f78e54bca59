"""What a run says and writes, its budgets, its evaluation, and what stops it before any work."""

import json
import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devices import cpu_only
from records import exact_steps, log_lines

from neobert.config.schema import Config
from neobert.errors import DataError, StartupError
from neobert.inference.model import load
from neobert.objectives.mlm import perplexity
from neobert.train.build import choose_rows_per_step
from neobert.train.hardware import device as gpu
from neobert.train.hardware import machine as runtime
from neobert.train.loop import pretrain
from neobert.train.record import console, tracking
from neobert.weights.describe import WeightsError

Tiny = Callable[..., Config]


def test_a_run_learns_and_records_everything(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    text = 'trainer.fill_mask_texts=["the old [MASK] sees"]'
    result = pretrain(tiny(out, "trainer.max_steps=30", "trainer.log_train_accuracy=true", text))
    assert (result.state.step, result.reason) == (30, "finished")
    evals = log_lines(out, "eval")
    assert [e["step"] for e in evals] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.5
    assert set(evals[0]) == {"kind", "step", "loss", "accuracy", "num_targets", "num_tokens", "num_documents"}
    assert {e["num_documents"] for e in evals} == {12}, "exactly dataset.eval_samples documents"
    steps = log_lines(out, "step")
    documented = [
        "kind",
        "step",
        "loss",
        "loss_hex",
        "grad_norm",
        "grad_norm_hex",
        "lr",
        "num_tokens",
        "num_targets",
        "batch_digest",
    ]
    assert set(steps[0]) == set(documented)
    assert float.fromhex(steps[0]["loss_hex"]) == steps[0]["loss"]
    assert float.fromhex(steps[0]["grad_norm_hex"]) == steps[0]["grad_norm"]
    logs = log_lines(out, "log")
    assert [x["step"] for x in logs] == list(range(3, 31, 3))
    assert {"tokens_per_second", "mfu", "data_wait", "packing_fill", "peak_memory_bytes"} <= set(logs[0])
    assert result.state.tokens == sum(s["num_tokens"] for s in steps) == logs[-1]["tokens"]
    assert result.state.targets == sum(s["num_targets"] for s in steps)
    assert all(0 <= x["accuracy"] <= 1 for x in logs)
    printed = capsys.readouterr().out
    for expected in (
        "parameters",
        "MFLOP",
        "rows of 64",
        "attention sdpa (document by document), loss kernel torch",
        "budget",
        "entropy",
        "held out",
        "train step",
        "eval  step",
        "finished  step 30 of 30; this start took",
        f"learned   training loss {logs[0]['loss']:.4f} -> {logs[-1]['loss']:.4f}, held-out loss ",
        f"files     {out}/: checkpoints/30, report/index.html, log.jsonl",
        "next:",
    ):
        assert expected in printed
    assert (out / "training.log").read_text() == printed


def test_log_loss_is_the_mean_over_masked_tokens_of_the_interval(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=6"))
    steps, logs = log_lines(out, "step"), log_lines(out, "log")
    for log, interval in zip(logs, (steps[:3], steps[3:])):
        targets = sum(s["num_targets"] for s in interval)
        assert log["loss"] == pytest.approx(sum(s["loss"] * s["num_targets"] for s in interval) / targets, rel=1e-5)


def test_evaluation_does_not_touch_training_and_repeats(tiny: Tiny, tmp_path: Path) -> None:
    often, rarely = tmp_path / "often", tmp_path / "rarely"
    dropout = "model.dropout_prob=0.1"
    pretrain(tiny(often, dropout, "trainer.eval_steps=1"))
    pretrain(tiny(rarely, dropout, "trainer.eval_steps=0", "trainer.save_steps=0"))
    assert exact_steps(often) == exact_steps(rarely)
    assert [e["step"] for e in log_lines(rarely, "eval")] == [12], "0 evaluates only at the end"
    assert log_lines(rarely, "eval")[0] == log_lines(often, "eval")[-1]
    assert [p.name for p in (rarely / "checkpoints").iterdir()] == ["12"], "and saves only at the end"


def test_evaluation_loss_does_not_depend_on_batch_size_or_training_mask_rate(tiny: Tiny, tmp_path: Path) -> None:
    first = log_evals(tiny, tmp_path / "a", "trainer.per_device_eval_batch_size=3")
    second = log_evals(
        tiny, tmp_path / "b", "trainer.per_device_eval_batch_size=16", "datacollator.mlm_probability=0.4"
    )
    assert first[0]["num_targets"] == second[0]["num_targets"]
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-5)


def log_evals(tiny: Tiny, out: Path, *overrides: str) -> list[dict[str, Any]]:
    pretrain(tiny(out, "trainer.max_steps=1", *overrides))
    return log_lines(out, "eval")


def test_loss_over_all_positions_is_the_same_loss(tiny: Tiny, tmp_path: Path) -> None:
    masked, full = tmp_path / "masked", tmp_path / "full"
    pretrain(tiny(masked, "trainer.max_steps=4"))
    pretrain(tiny(full, "trainer.max_steps=4", "trainer.masked_logits_only_loss=false"))
    for a, b in zip(log_lines(masked, "step"), log_lines(full, "step")):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["num_targets"] == b["num_targets"]


@pytest.mark.parametrize(
    "extra",
    [
        ["model.rope=false"],
        ["model.rms_norm=false", "model.hidden_act=gelu"],
        ["model.tie_word_embeddings=false"],
        ["trainer.gradient_checkpointing=true"],
        ["trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_every=2"],
        ["model.local_attention=16"],
        ["model.kernel_backend=triton", "trainer.z_loss=1e-4"],
        ["datacollator.mask_all=true"],
    ],
)
def test_variants_of_the_model_train(tiny: Tiny, tmp_path: Path, extra: list[str]) -> None:
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=2", *extra))
    assert all(math.isfinite(s["loss"]) for s in log_lines(tmp_path / "run", "step"))


def test_compiled_blocks_train_like_eager_ones(tiny: Tiny, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    pretrain(tiny(eager, "trainer.max_steps=2"))
    pretrain(
        tiny(compiled, "trainer.max_steps=2", "trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager")
    )
    for a, b in zip(log_lines(eager, "step"), log_lines(compiled, "step")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert "_orig_mod" not in str(list(load(compiled, device="cpu").module.state_dict()))


def test_budgets_in_tokens_and_epochs(tiny: Tiny, tmp_path: Path) -> None:
    tokens = pretrain(tiny(tmp_path / "tokens", "trainer.max_tokens=1000"))
    assert tokens.state.step == math.ceil(1000 / (4 * 64))
    epochs = tmp_path / "epochs"
    result = pretrain(tiny(epochs, "trainer.num_train_epochs=0.5", "dataset.streaming=false"))
    log = (epochs / "training.log").read_text()
    known = int(log.split(" epochs of ")[1].split(" tokens")[0].replace(",", ""))
    assert result.state.step == math.ceil(0.5 * known / (4 * 64))
    with pytest.raises(
        StartupError, match=r"num_train_epochs: 0.5 needs a source of known size.*streaming: false.*max_steps"
    ):
        pretrain(tiny(tmp_path / "stream", "trainer.num_train_epochs=0.5"))


def test_learning_rate_of_the_log_is_the_one_that_was_used(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "scheduler.name=linear", "scheduler.warmup_steps=2", "scheduler.final_lr_ratio=0"))
    rates = [s["lr"] for s in log_lines(out, "step")]
    assert rates[0] > 0, "the first step learns"
    assert max(rates) == pytest.approx(1e-2)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_predictions_of_a_run(tiny: Tiny, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2"))
    lines = capsys.readouterr().out.partition("predictions:\n")[2].splitlines()
    for number in range(4):  # The starts of the first held-out documents, a word of each hidden.
        shown, guesses, hidden = lines[3 * number : 3 * number + 3]
        word = hidden.strip().removeprefix("hidden: '").removesuffix("'")
        before, mask, after = shown.partition("[MASK]")
        assert mask
        assert guesses.count("%") == 3
        assert texts[number].replace(" ", "").startswith(f"{before}{word}{after}".replace(" ", "")[:60])
    pretrain(tiny(tmp_path / "silent", "trainer.max_steps=1", "trainer.fill_mask_texts=[]"))
    assert "predictions:" not in capsys.readouterr().out
    model = load(out, device="cpu")
    (result,) = model.fill_mask(["the [MASK] sees a [MASK] door"], top_k=model.tokenizer.size)
    assert len(result.masks) == 2
    assert sum(guess.probability for guess in result.masks[0]) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(WeightsError, match="nothing is no folder"):
        load(tmp_path / "nothing")


def test_perplexity_cannot_overflow() -> None:
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert perplexity(1e6) == math.inf


def test_global_batch_size_derives_the_accumulation(tiny: Tiny, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(tiny(one, "trainer.max_steps=3"))
    pretrain(tiny(two, "trainer.max_steps=3", "trainer.global_batch_size=4", "trainer.per_device_train_batch_size=2"))
    for a, b in zip(log_lines(one, "step"), log_lines(two, "step")):
        assert (a["num_tokens"], a["num_targets"], a["batch_digest"]) == (
            b["num_tokens"],
            b["num_targets"],
            b["batch_digest"],
        )
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    config = tiny(tmp_path / "bad", "trainer.global_batch_size=12")
    assert choose_rows_per_step(config, world=3) == 12
    with pytest.raises(StartupError, match=r"global_batch_size: 12 is no multiple .* 4 x 2; the next one that is: 16"):
        choose_rows_per_step(config, world=2)


def test_a_vocabulary_smaller_than_the_tokenizer_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.vocab_size: 100 is smaller than the tokenizer"):
        pretrain(tiny(tmp_path / "run", "model.vocab_size=100"))


class FakeWandb(types.ModuleType):
    """Replaces the package: records what a run sends, and fails on demand."""

    def __init__(self, *, fail_after: int | None = None) -> None:
        super().__init__("wandb")
        self.sent: list[tuple[dict[str, float], int]] = []
        self.settings: dict[str, Any] = {}
        self.fail_after, self.id, self.finished = fail_after, "abc123", False

    def init(self, **settings: Any) -> "FakeWandb":
        self.settings = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fail_after is not None and len(self.sent) >= self.fail_after:
            raise ConnectionError("the network is gone")
        self.sent.append((values, step))

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(runtime, "is_installed", lambda name: True)


def test_wandb_gets_the_documented_names(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    install(monkeypatch, fake)
    out = tmp_path / "run"
    wandb = [
        "wandb.enabled=true",
        "wandb.mode=offline",
        f"wandb.dir={tmp_path / 'wandb'}",
        "wandb.tags=[a,b]",
        "model.name=small",
    ]
    pretrain(tiny(out, "trainer.max_steps=3", *wandb))
    assert (fake.settings["mode"], fake.settings["tags"], fake.settings["name"]) == ("offline", ["a", "b"], "small")
    names = {name for values, _ in fake.sent for name in values}
    train = {"loss", "perplexity", "grad_norm", "weight_norm", "learning_rate", "tokens_per_sec"}
    assert {f"train/{n}" for n in train} | {"eval/loss", "eval/perplexity", "eval/accuracy"} <= names
    assert fake.finished


def test_a_tracker_that_fails_never_stops_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb(fail_after=1)
    install(monkeypatch, fake)
    out = tmp_path / "run"
    result = pretrain(tiny(out, "trainer.max_steps=6", "wandb.enabled=true", f"wandb.dir={tmp_path / 'wandb'}"))
    assert result.state.step == 6
    assert "wandb failed (the network is gone) and is left out" in capsys.readouterr().out
    assert len(log_lines(out, "step")) == 6


def test_a_tracker_that_does_not_start_is_left_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb()
    install(monkeypatch, fake)
    monkeypatch.setattr(fake, "init", lambda **settings: (_ for _ in ()).throw(ConnectionError("no account")))
    wandb = ["wandb.enabled=true", f"wandb.dir={tmp_path / 'wandb'}"]
    assert pretrain(tiny(tmp_path / "run", "trainer.max_steps=1", *wandb)).state.step == 1
    assert "wandb did not start (no account) and is left out" in capsys.readouterr().out


def test_wandb_enabled_but_not_installed_stops_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "is_installed", lambda name: False)
    with pytest.raises(StartupError, match=r"wandb.enabled: true, but the package wandb is not installed"):
        pretrain(tiny(tmp_path / "run", "wandb.enabled=true"))
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_cannot_run_stops_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(StartupError, match=r"model\.kernel_backend: 'triton' needs a CUDA device"):
        pretrain(tiny(tmp_path / "run", "model.kernel_backend=triton"))
    assert not (tmp_path / "run").exists()


def test_compile_without_a_compiler_stops_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    with pytest.raises(StartupError, match="needs a C\\+\\+ compiler"):
        pretrain(tiny(tmp_path / "run", "trainer.torch_compile=true"))
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_starts_unconnected_processes_is_an_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runtime, "Accelerator", lambda **settings: types.SimpleNamespace(num_processes=1))
    with pytest.raises(StartupError, match=r"started 2 processes .* sees 1; start with `torchrun"):
        runtime.build_runtime(config)


def test_steps_are_written_without_logging_points(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MOST_PENDING", 2)
    seen: list[int] = []
    monkeypatch.setattr(
        tracking.LineFile,
        "append",
        lambda self, lines: seen.extend(x["step"] for x in lines if x.get("kind") == "step"),
    )
    never = ["trainer.logging_steps=0", "trainer.eval_steps=0", "trainer.save_steps=0", "trainer.max_steps=5"]
    pretrain(tiny(tmp_path / "run", *never))
    assert seen == [1, 2, 3, 4, 5]


def test_the_progress_bar_shows_on_a_terminal_and_starts_at_the_resumed_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    reporter = console.Reporter(active=True, show_progress=True)
    reporter.start_progress(done=7, total=10)
    reporter.say("a line")
    reporter.advance(8)
    reporter.stop_progress()
    shown = capsys.readouterr().out
    assert "a line" in shown
    assert "7/10" in shown or "8/10" in shown


def test_lines_on_the_console_are_never_wrapped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reporter = console.Reporter(active=True, show_progress=False)
    long_line = "resuming from " + "/".join(["folder"] * 60)
    reporter.say(long_line)
    reporter.open_file(tmp_path / "training.log")
    reporter.say("[MASK] is no markup")
    assert capsys.readouterr().out.splitlines() == [long_line, "[MASK] is no markup"]
    assert (tmp_path / "training.log").read_text().splitlines() == [long_line, "[MASK] is no markup"]


@cpu_only
def test_golden_losses(tiny: Tiny, tmp_path: Path) -> None:
    """The first losses of a tiny run, stored as numbers: a refactoring must not move them.

    A change that means to move them (order, masks, initial weights) writes them again: WRITE_GOLDEN=1 pytest -k golden
    """
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=6"))
    losses = [s["loss"] for s in log_lines(tmp_path / "run", "step")]
    file = Path(__file__).parents[1] / "golden" / "tiny_run.json"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps({"losses": [round(x, 6) for x in losses]}) + "\n")
    assert losses == pytest.approx(json.loads(file.read_text())["losses"], abs=1e-4)
