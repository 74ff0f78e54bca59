"""Signals and the clock: the run stops after a whole step, saves once, and continues later as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from children import wait_for
from poison import fork_run
from ports import free_port
from records import exact_steps, log_lines

from neobert.cli import EXIT_CODES, STOP_SIGNALS, stop_signals
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline
from neobert.data.rows import loader as loader_module
from neobert.data.rows.loader import Loader
from neobert.objectives.mlm import MaskedLM
from neobert.train import finish, loop, preempt
from neobert.train.loop import RunResult, pretrain
from neobert.train.preempt import StopRequest
from neobert.types import PackedBatch, TrainState

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., Config]
WholeRun = Callable[..., Path]
DROPOUT = "model.dropout_prob=0.1"


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Runs `action` in the middle of a step: after its forward pass."""
    calls: list[int] = []
    forward = MaskedLM.forward

    def forward_and_act(self: MaskedLM, batch: PackedBatch) -> Any:
        loss = forward(self, batch)
        if self.training:
            calls.append(1)
            if len(calls) == step:
                action()
        return loss

    patch.setattr(MaskedLM, "forward", forward_and_act)


def check_preempted(tiny: Tiny, whole_run: WholeRun, out: Path, result: RunResult, step: int, *overrides: str) -> None:
    """The run stopped after `step` with one checkpoint more, and its continuation equals a run that never stopped."""
    assert (result.reason, EXIT_CODES[result.reason], result.state.step) == ("preempted", 75, step)
    steps = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdecimal()]
    assert sorted(steps) == [*range(4, step, 4), step]
    whole = whole_run(*overrides)
    assert pretrain(tiny(out, *overrides, "trainer.resume_from_checkpoint=latest")).reason == "finished"
    assert exact_steps(out) == exact_steps(whole)
    assert log_lines(out, "eval") == log_lines(whole, "eval"), "no evaluation is missing or made twice"


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_a_step_saves_after_it(
    tiny: Tiny,
    whole_run: WholeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: send(number))
        result = pretrain(tiny(out, DROPOUT))
    printed = capsys.readouterr().out
    assert f"preempt: {number.name}: stopping after step 6" in printed
    assert "preempt: saved step 6 in 0." in printed
    assert signal.getsignal(number) == before, "handlers are put back"
    check_preempted(tiny, whole_run, out, result, 6, DROPOUT)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (stopped,) = [event for event in events if event["event"] == "stopped"]
    assert (stopped["step"], stopped["reason"], stopped["cause"]) == (6, "preempted", number.name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_during_a_save_lets_it_finish(
    tiny: Tiny,
    whole_run: WholeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    out, save, sent = tmp_path / "run", torch.save, []

    def save_and_signal(*args: Any, **settings: Any) -> None:
        save(*args, **settings)
        if not sent:
            sent.append(1)
            send(number)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_signal)
        result = pretrain(tiny(out))
    assert capsys.readouterr().out.count("\nsaved ") == 1
    check_preempted(tiny, whole_run, out, result, 4)


def test_a_signal_during_an_evaluation_ends_it_and_the_next_start_makes_it(
    tiny: Tiny, whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "run", []
    batches = DataPipeline.eval_batches

    def batches_and_signal(self: DataPipeline) -> Iterator[PackedBatch]:
        for batch in batches(self):
            yield batch
            made.append(1)
            if len(made) == 6:  # An evaluation has four batches: in the middle of the second one.
                send(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(DataPipeline, "eval_batches", batches_and_signal)
        result = pretrain(tiny(out))
    assert len(made) == 6, "the rest of the evaluation is not made"
    assert [e["step"] for e in log_lines(out, "eval")] == [0]
    check_preempted(tiny, whole_run, out, result, 4)


def test_a_signal_in_the_last_evaluation(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "run", ["trainer.max_steps=3", "trainer.eval_steps=0"]
    with monkeypatch.context() as patch:
        batches = DataPipeline.eval_batches

        def batches_and_signal(self: DataPipeline) -> Iterator[PackedBatch]:
            send(signal.SIGTERM)
            yield from batches(self)

        patch.setattr(DataPipeline, "eval_batches", batches_and_signal)
        result = pretrain(tiny(out, *settings))
    assert (result.reason, result.state.step) == ("preempted", 3)
    assert log_lines(out, "eval") == []
    assert pretrain(tiny(out, *settings, "trainer.resume_from_checkpoint=latest")).reason == "complete"
    assert [e["step"] for e in log_lines(out, "eval")] == [3]


def test_a_signal_while_waiting_for_data(
    tiny: Tiny, whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, go_on = tmp_path / "run", threading.Event()
    real, waited = loader_module._Assembler.step, Loader.next_unless
    asked = []

    def slow(self: Any) -> Any:
        if self._next_row == 6 * 4:  # Step 7 has no rows for a long time, and step 6 waits for its digest.
            go_on.wait(30)
        return real(self)

    def wait(self: Any, stop: Any) -> Any:
        asked.append(stop)
        if len(asked) == 6:
            threading.Timer(0.2, send, [signal.SIGTERM]).start()
        return waited(self, stop)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(loader_module._Assembler, "step", slow)
        patch.setattr(Loader, "next_unless", wait)
        close = Loader.close
        patch.setattr(Loader, "close", lambda self: (go_on.set(), close(self)))
        result = pretrain(tiny(out))
    assert time.monotonic() - start < 15
    check_preempted(tiny, whole_run, out, result, 5)


def test_a_signal_before_the_first_step_saves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, batches = tmp_path / "run", DataPipeline.eval_batches
    monkeypatch.setattr(DataPipeline, "eval_batches", lambda self: (send(signal.SIGTERM), batches(self))[1])
    result = pretrain(tiny(out))
    assert (result.reason, result.state.step) == ("preempted", 0)
    assert not (out / "checkpoints").exists()
    assert "preempt: no step was made, there is nothing to save" in capsys.readouterr().out


def test_sighup_while_masks_are_filled_comes_too_late_to_stop_anything(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = finish._answer
    monkeypatch.setattr(finish, "_answer", lambda *args, **more: (send(signal.SIGHUP), real(*args, **more))[1])
    result = pretrain(tiny(tmp_path / "run", "trainer.max_steps=2", "trainer.fill_mask_texts=['a [MASK] b']"))
    assert (result.reason, result.state.step) == ("finished", 2)
    assert "predictions:" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "2" / "train_state.json").is_file()


def test_sighup_is_ignored_where_it_was_ignored_at_the_start(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    try:
        at_step(monkeypatch, 2, lambda: send(signal.SIGHUP))
        assert pretrain(tiny(tmp_path / "run", "trainer.max_steps=3")).state.step == 3
        # The agent of torchrun obeys SIGHUP all the same, and kills its processes soon after.
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
        assert signal.SIGHUP in stop_signals()
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_the_start_of_the_script_stops_it_with_75(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    (tmp_path / "run.yaml").write_text(config_to_yaml(tiny(tmp_path / "run")))
    monkeypatch.setattr("neobert.train.setup.check_runtime", lambda config: send(number))
    assert call("pretraining/pretrain.py", tmp_path / "run.yaml") == 75
    assert capsys.readouterr().err == "stopped\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_handler_is_installed_outside_the_main_thread(tiny: Tiny, tmp_path: Path) -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(pretrain(tiny(tmp_path / "run", "trainer.max_steps=2"))))
    thread.start()
    thread.join(60)
    assert [result.reason for result in results] == ["finished"]


def test_max_hours_leaves_room_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(preempt, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    stop = StopRequest(max_hours=0.1, is_main=True)  # 360 s, of which 5% are for a save that was not measured yet.

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    pass_time(341.9)
    assert stop.requests() == [0, 0]
    pass_time(0.2)
    assert stop.requests() == [0, 1]
    with stop.timing_save():
        pass_time(2)
    assert not stop.requested(), "a save is faster than that"
    with stop.timing_step():
        pass_time(7)
    now[0] = 1000 + 360 - 9.1
    assert not stop.requested()
    pass_time(0.2)
    assert stop.requested()
    assert not StopRequest(max_hours=0.1, is_main=False).requested(), "rank 0 decides"
    assert not StopRequest(max_hours=None, is_main=True).requested()
    assert stop.agree(0, 1)
    assert stop.reason == "out_of_time"


def test_max_hours_ends_a_run_and_it_continues_later(
    tiny: Tiny, whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    passed: list[int] = []
    with monkeypatch.context() as patch:
        # Three hours pass in step 7: of five, there is no room for another step as slow.
        patch.setattr(preempt, "time", types.SimpleNamespace(monotonic=lambda: 3 * 3600.0 * len(passed)))
        at_step(patch, 7, lambda: passed.append(1))
        result = pretrain(tiny(out, "trainer.max_hours=5"))
    assert (result.reason, EXIT_CODES[result.reason], result.state.step) == ("out_of_time", 75, 7)
    assert "preempt: trainer.max_hours: 5.0: stopping after step 7" in capsys.readouterr().out
    pretrain(tiny(out, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole_run())


def at_step_in_child(step: int, action: Callable[[], None]) -> Callable[[], None]:
    return lambda: at_step(pytest.MonkeyPatch(), step, action)


def test_a_second_interrupt_ends_the_process_at_once_and_tears_nothing(
    tiny: Tiny, whole_run: WholeRun, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def interrupt_twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # Only interrupts are counted: a launcher sends SIGTERM after Ctrl-C.
        send(signal.SIGINT)

    child = fork_run(tiny(out), tmp_path / "log", at_step_in_child(6, interrupt_twice))
    assert wait_for(child) == 130, (tmp_path / "log").read_text()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["4"]
    pretrain(tiny(out, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole_run())


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_sigkill_before_the_save_is_done(tiny: Tiny, whole_run: WholeRun, tmp_path: Path, seconds: float) -> None:
    """SIGTERM, and SIGKILL while the save runs: the checkpoint before it is there, and nothing else with a number."""
    out = tmp_path / "run"

    def slow_save() -> None:
        patch, save = pytest.MonkeyPatch(), torch.save
        patch.setattr(torch, "save", lambda *args, **settings: (time.sleep(0.4), save(*args, **settings)))
        at_step(patch, 6, lambda: send(signal.SIGTERM))

    child = fork_run(tiny(out), tmp_path / "log", slow_save)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() or "preempt: SIGTERM" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name[0].isdigit()] == ["4"]
    pretrain(tiny(out, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole_run())


def test_kill_9_between_two_micro_batches_leaves_no_gradient_behind(
    tiny: Tiny, whole_run: WholeRun, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = ["trainer.gradient_accumulation_steps=3", "trainer.max_steps=6", "trainer.save_steps=2", DROPOUT]
    # The forward pass of the second of three micro-batches of step 4.
    child = fork_run(tiny(out, *settings), tmp_path / "log", at_step_in_child(3 * 3 + 2, lambda: send(signal.SIGKILL)))
    assert wait_for(child) == -signal.SIGKILL, (tmp_path / "log").read_text()
    pretrain(tiny(out, *settings, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole_run(*settings))


def test_sigterm_to_one_rank_saves_the_same_step_on_both(tiny: Tiny, tmp_path: Path) -> None:
    out, whole, port = tmp_path / "run", tmp_path / "whole", free_port()
    settings = ["trainer.per_device_train_batch_size=2", "trainer.global_batch_size=4", DROPOUT]
    config = tiny(out, *settings)

    def launch(config: Config, log: str, port: int, *actions: Callable[[], None]) -> list[int]:
        children = [
            fork_run(config, tmp_path / f"{log}-{rank}", action, rank=rank, world=2, port=port)
            for rank, action in enumerate(actions)
        ]
        return [wait_for(child) for child in children]

    nothing = lambda: None  # noqa: E731
    codes = launch(config, "stop", port, nothing, at_step_in_child(6, lambda: send(signal.SIGTERM)))
    log = (tmp_path / "stop-0").read_text()
    assert codes == [75, 75], log + (tmp_path / "stop-1").read_text()
    assert "preempt: a signal to another process: stopping after step 6" in log
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [4, 6]
    names = sorted(p.name for p in (out / "checkpoints/6").glob("random*"))
    assert names == ["random_states_0.pkl", "random_states_1.pkl"]
    again = tiny(out, *settings, "trainer.resume_from_checkpoint=latest")
    assert launch(again, "again", free_port(), nothing, nothing) == [0, 0]
    assert launch(tiny(whole, *settings), "whole", free_port(), nothing, nothing) == [0, 0]
    assert exact_steps(out) == exact_steps(whole)


def test_a_rank_whose_data_cannot_be_read_stops_the_others(tiny: Tiny, tmp_path: Path) -> None:
    port, config = free_port(), tiny(tmp_path / "run", "trainer.per_device_train_batch_size=2")

    def lose_the_disk() -> None:
        patch, real = pytest.MonkeyPatch(), Loader.next_unless

        def next_unless(self: Loader, stop: Callable[[], bool]) -> Any:
            if self._assembler._next_row >= 12:
                raise OSError("the disk is gone")
            return real(self, stop)

        patch.setattr(Loader, "next_unless", next_unless)

    children = [
        fork_run(config, tmp_path / f"rank-{rank}", before, rank=rank, world=2, port=port)
        for rank, before in enumerate([lambda: None, lose_the_disk])
    ]
    assert [wait_for(child) for child in children] == [1, 1]
    assert "RankError: rank 1: OSError: the disk is gone" in (tmp_path / "rank-0").read_text()
    assert "the disk is gone" in (tmp_path / "rank-1").read_text()


def test_the_script_exits_with_75_when_its_process_group_is_terminated(tiny: Tiny, tmp_path: Path) -> None:
    out, config_file = tmp_path / "run", tmp_path / "run.yaml"
    config_file.write_text(config_to_yaml(tiny(out, "trainer.max_steps=100000", "trainer.logging_steps=1")))
    command = [sys.executable, "scripts/pretraining/pretrain.py", str(config_file)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or len(log_lines_so_far(out)) < 6:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get far enough"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    last = log_lines(out, "step")[-1]["step"]
    assert f"preempt: saved step {last} in" in output
    assert (out / "checkpoints" / str(last) / "train_state.json").is_file()


def log_lines_so_far(output_dir: Path) -> list[str]:
    return [x for x in (output_dir / "log.jsonl").read_text().splitlines() if '"loss_hex"' in x]


def test_every_way_to_end_has_an_exit_code() -> None:
    expected = {"finished": 0, "complete": 0, "disk": 74, "preempted": 75, "out_of_time": 75, "numbers": 76}
    assert expected == {reason: code for reason, code in EXIT_CODES.items() if reason in expected}
    assert loop.RunResult(state=TrainState(), reason="numbers").reason in EXIT_CODES
