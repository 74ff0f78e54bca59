"""Bad numbers: what is skipped, what stays untouched, when the run stops or goes back, and that all of it repeats."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import wait_for
from poison import fork_run, poison, rows_of_step
from ports import free_port
from records import exact_steps, log_lines
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.config.schema_trainer import TrainerSection
from neobert.objectives.mlm import MaskedLM
from neobert.train import loop, numerics
from neobert.train.hardware.machine import Runtime
from neobert.train.hardware.memory import OutOfMemory
from neobert.train.loop import pretrain
from neobert.train.numerics import Guard
from neobert.train.processes.agreement import describe_ranges, join_ranges
from neobert.train.run import build_run
from neobert.train.step import train_step
from neobert.types import PackedBatch, StepBatch, TrainState

Tiny = Callable[..., Config]


def read_events(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def trained_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{number}.{name}": value for number, state in optimizer.items() for name, value in state.items()}
    return {**load_file(checkpoint / "model.safetensors"), **moments}


def assert_same_training(one: Path, other: Path) -> None:
    first, second = trained_state(one), trained_state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["loss", "detached loss", "gradient"])
def test_a_step_with_a_bad_number_is_skipped_and_nothing_else_is(
    tiny: Tiny,
    whole_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    overrides = ["trainer.max_steps=9", "trainer.save_steps=1", "model.dropout_prob=0.1"]
    clean, bad = whole_run(*overrides), tmp_path / "bad"
    capsys.readouterr()
    poison(monkeypatch, [rows_of_step(5)[2]], kind)
    assert pretrain(tiny(bad, *overrides)).reason == "finished"
    assert_same_training(bad / "checkpoints/4", bad / "checkpoints/5")
    assert exact_steps(bad)[:4] == exact_steps(clean)[:4]
    steps, clean_steps = log_lines(bad, "step"), log_lines(clean, "step")
    assert [s["step"] for s in steps if s.get("skipped")] == [5]
    for name in ("lr", "num_tokens", "num_targets", "batch_digest"):
        assert [s[name] for s in steps] == [s[name] for s in clean_steps], "data and learning rate continue"
    assert all(math.isfinite(s["loss"]) and math.isfinite(s["grad_norm"]) for s in steps if s["step"] != 5)
    assert float.fromhex(steps[4]["grad_norm_hex"]) != float.fromhex(clean_steps[4]["grad_norm_hex"])
    assert steps[4]["grad_norm"] is None, "the line is JSON, which knows no NaN"
    # The interval of steps 4 to 6 reports the mean of the two steps that counted.
    logs = {x["step"]: x for x in log_lines(bad, "log")}
    counted = [s for s in steps[3:6] if s["step"] != 5]
    mean = sum(s["loss"] * s["num_targets"] for s in counted) / sum(s["num_targets"] for s in counted)
    assert logs[6]["loss"] == pytest.approx(mean, rel=1e-5)
    assert [logs[n]["skipped"] for n in (3, 6, 9)] == [0, 1, 0]
    (event,) = read_events(bad, "skipped_step")
    assert (event["step"], event["rows"]) == (5, [[16, 20]])
    assert event["suspects"] == ([] if kind == "gradient" else [[16, 20]])
    printed = capsys.readouterr().out
    assert "warning: step 5 skipped: loss" in printed
    assert "| skipped 1 |" in printed


def test_the_bad_micro_batch_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, [17])
    one_row = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=4"]
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=6", *one_row))
    (event,) = read_events(tmp_path / "run", "skipped_step")
    assert (event["rows"], event["suspects"]) == ([[16, 20]], [[17, 18]])


class Killed(BaseException):
    """Acts as a kill: nothing of ours catches it."""


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = loop.take_step

    def killed(run: Any, state: TrainState, *batch: Any) -> Any:
        if state.step + 1 == step:
            run.runtime.close()
            raise Killed
        return real(run, state, *batch)

    monkeypatch.setattr(loop, "take_step", killed)


def test_a_run_killed_after_a_skip_skips_the_same_step_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logged = ["trainer.logging_steps=1", "model.dropout_prob=0.1"]
    poison(monkeypatch, rows_of_step(6))
    pretrain(tiny(whole, *logged))
    with monkeypatch.context() as patch:
        kill_before(patch, 8)
        with pytest.raises(Killed):
            pretrain(tiny(killed, *logged))
    capsys.readouterr()
    pretrain(tiny(killed, *logged, "trainer.resume_from_checkpoint=latest"))
    assert "replay audit: 3/3 steps bit-identical" in capsys.readouterr().out
    assert exact_steps(killed) == exact_steps(whole)
    assert [s["step"] for s in log_lines(killed, "step") if s.get("skipped")] == [6]
    assert_same_training(whole / "checkpoints/12", killed / "checkpoints/12")


def test_too_many_in_a_row_stop_the_run_and_save_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    poison(monkeypatch, [row for step in range(6, 30) for row in rows_of_step(step)])
    result = pretrain(tiny(out, "trainer.max_steps=30", "trainer.save_steps=5", "trainer.save_total_limit=1"))
    assert (result.reason, EXIT_CODES[result.reason]) == ("numbers", 76)
    assert result.state.step == 11, "the flag of step 10 is read while step 11 runs"
    printed = capsys.readouterr().out
    assert (
        "trainer.max_bad_steps: 5 steps in a row were skipped, the last is 10. The run stops and saves nothing"
        in printed
    )
    assert "The first: step 6 skipped: loss nan, gradient norm nan, rows 20 to 23; the loss of rows 20 to 23" in printed
    (event,) = read_events(out, "numbers")
    assert event["rows"] == [[20, 24]]
    assert [s["step"] for s in log_lines(out, "step")] == list(range(1, 12)), "everything is in the log"
    # The checkpoint that fell due within the series holds the weights of step 5.
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["10"]
    assert json.loads((out / "checkpoints/10/train_state.json").read_text())["skipped_steps"] == [6, 7, 8, 9, 10]


def test_the_last_steps_of_a_budget_are_counted_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, [row for step in (5, 6) for row in rows_of_step(step)])
    config = tiny(tmp_path / "run", "trainer.max_steps=6", "trainer.max_bad_steps=2", "trainer.save_steps=0")
    assert pretrain(config).reason == "numbers"
    assert not (tmp_path / "run" / "checkpoints").exists()


def build_guard(max_bad_steps: int = 5, skip_spikes: float | None = None) -> Guard:
    runtime = Runtime(
        accelerator=None, device=torch.device("cpu"), rank=0, world=1, host_group=None, patient_group=None
    )  # type: ignore[arg-type]
    return Guard(runtime, TrainerSection(max_bad_steps=max_bad_steps, skip_spikes=skip_spikes))


def test_more_than_one_percent_of_the_last_thousand_steps_stop_the_run() -> None:
    guard = build_guard()
    verdicts = {}
    for step in range(1, 1202):
        # Ten of the first 1,000, one more at 1,001 when the first has just left, one at 1,200.
        guard.add(step, torch.tensor((step % 100 == 1 and step <= 901) or step in (1001, 1200)))
        verdicts[step] = guard.verdict
    assert all(verdicts[step] is None for step in range(1, 1201))
    guard.flush()
    assert guard.verdict is None, "at 1,201 those of 1 to 201 have left"
    for step in range(1202, 1206, 2):
        guard.add(step, torch.tensor(True))
        guard.add(step + 1, torch.tensor(False))
    assert guard.verdict is not None
    assert "11 of the last 1000 steps were skipped, more than 1%" in guard.verdict


def test_the_counts_continue_from_what_was_saved() -> None:
    first, second = build_guard(max_bad_steps=4), build_guard(max_bad_steps=4)
    flags = [False, True, True, True, True, False]
    for step, flag in enumerate(flags[:3], start=1):
        first.add(step, torch.tensor(flag))
    state = first.add_skipped(TrainState(step=3))
    assert state.skipped_steps == [2, 3]
    second.begin(TrainState(**json.loads(json.dumps({"step": 3, "skipped_steps": state.skipped_steps}))))
    for guard in (first, second):
        guard.add(4, torch.tensor(True))
        guard.add(5, torch.tensor(True))
        assert guard.verdict is None, "step 5 is not known yet"
        guard.add(6, torch.tensor(False))
        assert guard.verdict == "trainer.max_bad_steps: 4 steps in a row were skipped, the last is 5"
        assert guard.first_skipped == 2


def test_a_spike_is_compared_with_the_last_steps_that_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "SPIKE_WINDOW", 4)
    guard = build_guard(skip_spikes=2.0)

    def judge(loss: float, norm: float) -> bool:
        return bool(guard.judge(torch.tensor(loss * 10), torch.tensor(norm), num_targets=10))

    assert not any(judge(loss, 1.0 + loss / 10) for loss in (4.0, 400.0, 2.0, 3.0)), "four steps must have counted"
    assert not judge(1.0, 1.0)
    # The window holds 400 2 3 1: mean 101.5, deviation 199.0.
    assert not judge(499.0, 1.0)
    assert judge(9e9, 1.0)
    assert judge(1.0, 9e9)
    assert judge(math.nan, math.nan)
    state = guard.add_skipped(TrainState())
    assert [values[0] for values in state.spike_window] == [2.0, 3.0, 1.0, 499.0], "skipped steps are not in it"
    assert guard.judge(torch.tensor(0.0), torch.tensor(0.0), num_targets=0).item() is False


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_spikes_mean_the_same_after_a_resume_with_another_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """The window holds the loss and the gradient norm of the step, not those of one process or of their sum."""
    monkeypatch.setattr(numerics, "SPIKE_WINDOW", 4)

    def build(world: int) -> Guard:
        # Processes with equal losses: a sum over them is a product.
        runtime = SimpleNamespace(device=torch.device("cpu"), world=world, sum_on_device=lambda x: world * x)
        return Guard(runtime, TrainerSection(skip_spikes=3.0))  # type: ignore[arg-type]

    def judge(guard: Guard, world: int, loss: float, norm: float) -> bool:
        return bool(guard.judge(torch.tensor(10 * loss / world), torch.tensor(norm), num_targets=10))

    first, second = build(before), build(after)
    values = [[2.0, 0.5], [3.0, 0.75], [2.0, 0.5], [3.0, 0.75]]
    assert not any(judge(first, before, loss, norm) for loss, norm in values)
    state = first.add_skipped(TrainState())
    assert state.spike_window == values
    for loss, norm, skipped in ((2.5, 0.9, False), (2.5, 1.3, True), (4.5, 0.6, True), (2.5, 0.6, False)):
        second.begin(state)
        assert judge(second, after, loss, norm) is skipped, (loss, norm)


def test_spikes_are_skipped_the_same_way_across_a_resume(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "SPIKE_WINDOW", 4)
    settings = ["trainer.skip_spikes=6", "trainer.save_steps=1", "model.dropout_prob=0.1", "optimizer.lr=1e-4"]
    calm, off, whole, resumed = (tmp_path / name for name in ("calm", "off", "whole", "resumed"))
    pretrain(tiny(calm, *settings))
    pretrain(tiny(off, *settings, "trainer.skip_spikes=null"))
    assert exact_steps(calm) == exact_steps(off), "without a spike the rule changes no bit"
    poison(monkeypatch, [*rows_of_step(6), *rows_of_step(8)], "spike")
    pretrain(tiny(whole, *settings))
    assert [s["step"] for s in log_lines(whole, "step") if s.get("skipped")] == [6, 8]
    assert_same_training(whole / "checkpoints/5", whole / "checkpoints/6")
    for cut in (6, 7):
        shutil.rmtree(resumed, ignore_errors=True)
        pretrain(tiny(resumed, *settings, f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(cut)}"))
        assert exact_steps(resumed) == exact_steps(whole, after=cut)
        assert [s["step"] for s in log_lines(resumed, "step") if s.get("skipped")] == [s for s in (6, 8) if s > cut]


@pytest.mark.parametrize(
    "masks",
    [[], ["datacollator.mask_weights=adaptive", "datacollator.mask_weights_steps=3"]],
    ids=["uniform", "adaptive masks"],
)
def test_rollback_passes_over_the_rows_and_every_resume_does(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], masks: list[str]
) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    poison(monkeypatch, [*rows_of_step(6), *rows_of_step(7)])
    seen: list[int] = []
    real = loop.take_step

    def record(run: Any, state: TrainState, batch: StepBatch, *others: Any) -> Any:
        seen.extend(key for micro in batch.micro_batches for key in micro.row_keys.tolist())
        return real(run, state, batch, *others)

    monkeypatch.setattr(loop, "take_step", record)
    settings = ["trainer.max_bad_steps=2", "trainer.rollback_steps=3", *masks]
    result = pretrain(tiny(out, *settings))
    assert (result.reason, result.state.step) == ("finished", 12)
    # Steps 1 to 8 (the flag of 7 is read while 8 runs), back to step 4, then steps 5 to 12 on the rows after those.
    assert seen == [*range(32), *range(32, 64)]
    assert result.state.skip_rows == [(16, 32)]
    assert [s["step"] for s in log_lines(out, "step")] == list(range(1, 13))
    (event,) = read_events(out, "rolled_back")
    assert (event["step"], event["from_step"], event["rows"]) == (4, 8, [16, 32])
    assert "rows 16 to 31 are skipped (1 of at most 3 times)" in capsys.readouterr().out
    pretrain(tiny(again, *settings, f"trainer.resume_from_checkpoint={out / 'checkpoints/8'}"))
    assert exact_steps(again) == exact_steps(out, after=8)
    # A checkpoint that was saved before the rollback meets the bad rows again and goes back again, alike.
    shutil.rmtree(again)
    shutil.copytree(out, again)
    for step in (8, 12):
        shutil.rmtree(again / "checkpoints" / str(step))
    pretrain(tiny(again, *settings, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(again) == exact_steps(out)


def test_rows_of_the_state_are_skipped(tiny: Tiny, tmp_path: Path) -> None:
    run = build_run(tiny(tmp_path / "run", "trainer.max_steps=4"))
    given = [
        metrics.row_keys[0].tolist()
        for _, metrics in loop.training_steps(run, TrainState(skip_rows=[(4, 8), (12, 20)]))
    ]
    assert given == [[0, 1, 2, 3], [8, 9, 10, 11], [20, 21, 22, 23], [24, 25, 26, 27]]
    run.runtime.close()


def test_rollbacks_are_bounded_and_need_a_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, [row for step in range(6, 99) for row in rows_of_step(step)])
    settings = ["trainer.max_bad_steps=2", "trainer.rollback_steps=1", "trainer.max_steps=40"]
    result = pretrain(tiny(tmp_path / "run", *settings))
    assert (result.reason, len(result.state.skip_rows)) == ("numbers", 3)
    assert "trainer.rollback_steps: this run has gone back 3 times already" in capsys.readouterr().out
    assert pretrain(tiny(tmp_path / "other", *settings, "trainer.rollback_steps=9")).reason == "numbers"
    assert "no checkpoint is 9 steps older than step 8" in capsys.readouterr().out


def test_a_batch_without_targets_has_loss_zero(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "datacollator.mlm_probability=0.0005", "trainer.max_steps=12", "trainer.skip_spikes=6"))
    empty = [s for s in log_lines(out, "step") if s["num_targets"] == 0]
    assert empty, "the rate is so low that some batch has none"
    assert all((s["loss"], s["grad_norm"]) == (0.0, 0.0) for s in empty)
    assert not [s for s in log_lines(out, "step") if s.get("skipped")]
    assert all(math.isfinite(x["loss"]) for x in log_lines(out, "log"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_shape_peak_and_keys_and_the_resume_is_identical(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    pretrain(tiny(whole, "trainer.max_steps=6"))
    with monkeypatch.context() as patch:
        calls = fail_after(patch, 5, error)
        with pytest.raises(
            OutOfMemory, match=r"after step 5 in a training micro-batch of 4 rows of 64 slots.*GiB"
        ) as info:
            pretrain(tiny(out, "trainer.max_steps=6"))
    assert len(calls) == 6, "never tried again"
    assert info.value.__cause__ is error
    for key in ("trainer.per_device_train_batch_size", "trainer.gradient_checkpointing", "dataset.max_seq_length"):
        assert key in str(info.value)
    (event,) = read_events(out, "out_of_memory")
    assert (event["rows"], event["slots"]) == (4, 64)
    pretrain(tiny(out, "trainer.max_steps=6", "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole)


def fail_after(patch: pytest.MonkeyPatch, count: int, error: Exception) -> list[int]:
    calls: list[int] = []
    forward = MaskedLM.forward

    def failing(self: MaskedLM, batch: PackedBatch) -> Any:
        if self.training:
            calls.append(1)
            if len(calls) > count:
                raise error
        return forward(self, batch)

    patch.setattr(MaskedLM, "forward", failing)
    return calls


def test_other_errors_of_a_step_stay_what_they_are(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pretrain(tiny(tmp_path / "run"))


def test_out_of_memory_in_evaluation_names_its_own_key(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskedLM, "forward", lambda self, batch: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match=r"in an evaluation batch of .* lower trainer.per_device_eval_batch_size"):
        pretrain(tiny(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning", "ignore:Error detected in:UserWarning")
def test_anomaly_detection_stops_at_the_operation(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = tmp_path / "calm"
    pretrain(tiny(calm, "trainer.max_steps=3"))
    pretrain(tiny(tmp_path / "same", "trainer.max_steps=3", "trainer.detect_anomaly=true"))
    assert "warning: trainer.detect_anomaly: true checks every operation" in capsys.readouterr().out
    assert exact_steps(tmp_path / "same") == exact_steps(calm)
    poison(monkeypatch, rows_of_step(2), "loss")
    with pytest.raises(RuntimeError, match="returned nan values"):
        pretrain(tiny(tmp_path / "run", "trainer.max_steps=3", "trainer.detect_anomaly=true"))
    assert not torch.is_anomaly_enabled()


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip_spikes", ["null", "6"])
def test_no_step_waits_for_the_device(tiny: Tiny, tmp_path: Path, skip_spikes: str) -> None:
    """Reading a scalar or a shape that depends on values would make the host wait; a skipped step does neither."""
    run = build_run(tiny(tmp_path / "run", f"trainer.skip_spikes={skip_spikes}", "model.dropout_prob=0.1"))
    loader = run.data.loader()
    for scale in (0.01, math.nan):
        batch = next(loader).micro_batches
        with Operators() as operators:
            result = train_step(
                run.model,
                run.optimizer,
                batch,
                lr=1e-3,
                scale=scale,
                gradient_clipping=1.0,
                judge=lambda loss, norm: run.guard.judge(loss, norm, num_targets=40),
            )
        assert any("_fused_adamw_" in name for name in operators.seen), "the count sees the optimizer"
        assert not [name for name in operators.seen if "_local_scalar_dense" in name or "nonzero" in name]
        assert bool(result.skipped) == math.isnan(scale)
    loader.close()
    run.runtime.close()


def test_ranges_of_rows() -> None:
    assert join_ranges([9, 3, 5, 4]) == [(3, 6), (9, 10)]
    assert describe_ranges([(3, 6), (9, 10)]) == "3 to 5, 9"


@pytest.mark.parametrize("kind", ["gradient", "detached loss", "loss spike"])
def test_a_bad_number_on_one_rank_skips_the_step_on_both(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The loss of rank 1 is bad while its gradient is finite by itself, or the other way round; rank 0 sees nothing."""
    out, port = tmp_path / "run", free_port()
    settings = ["trainer.per_device_train_batch_size=2", "trainer.max_steps=6", "trainer.save_steps=1"]
    if kind == "loss spike":
        settings.append("trainer.skip_spikes=20")
        monkeypatch.setattr(numerics, "SPIKE_WINDOW", 3)
    config = tiny(out, *settings, "trainer.eval_steps=0", "dataset.num_workers=0")

    def before(rank: int) -> None:
        if rank == 1:
            poison(monkeypatch, rows_of_step(4), kind)

    ranks = [
        fork_run(config, tmp_path / f"rank-{rank}.log", lambda rank=rank: before(rank), rank=rank, world=2, port=port)
        for rank in (0, 1)
    ]
    codes = [wait_for(rank) for rank in ranks]
    assert codes == [0, 0], (tmp_path / "rank-0.log").read_text() + (tmp_path / "rank-1.log").read_text()
    assert_same_training(out / "checkpoints/3", out / "checkpoints/4")
    assert not torch.equal(
        *(load_file(out / f"checkpoints/{n}/model.safetensors")["encoder.norm.weight"] for n in "45")
    )
    (event,) = read_events(out, "skipped_step")
    assert (event["step"], event["rows"]) == (4, [[12, 16]])
    suspects = [[13, 14], [15, 16]] if kind == "detached loss" else []
    assert event["suspects"] == suspects, "rank 1 has the odd rows"
    assert [s["step"] for s in log_lines(out, "step") if s.get("skipped")] == [4]
