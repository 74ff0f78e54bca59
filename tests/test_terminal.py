"""Bars, tables and boxes of a terminal, and that there are lines alone elsewhere."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from neobert.cli import show_cursor
from neobert.errors import StartupError
from neobert.terminal import build_progress, describe_error, is_interactive, progress_bar
from neobert.train import loop
from neobert.train.record.console import MOST_LETTERS, Reporter, build_settings_table

ROOT = Path(__file__).parents[1]
SENTENCE = "trainer.max_steps: -1 must be at least 1; write 100"


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What is captured counts as a terminal of 80 columns."""
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    return monkeypatch


def terminal(width: int, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    return Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)


def written(console: Console) -> list[str]:
    console.file.flush()
    return console.file.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CI", "true", False),
        ("CI", "false", True),
        ("NO_COLOR", "1", False),
        ("TERM", "dumb", False),
        ("TERM", "xterm", True),
    ],
)
def test_who_watches(on_terminal: pytest.MonkeyPatch, name: str, value: str, expected: bool) -> None:
    assert is_interactive(Console())
    on_terminal.setenv(name, value)
    assert is_interactive(Console()) == expected
    on_terminal.delenv("TTY_COMPATIBLE")
    assert not is_interactive(Console(file=io.StringIO()))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, ["training", "12%", "loss 3.2104"]),
        (80, ["120/1000", "loss 3.2104", "ppl 24.79", "1,234 tok/s"]),
        (120, ["120/1000", "loss 3.2104", "ppl 24.79", "1,234 tok/s", "ETA"]),
    ],
)
def test_a_bar_fits_its_terminal(on_terminal: pytest.MonkeyPatch, width: int, shown: list[str], encoding: str) -> None:
    console = terminal(width, encoding)
    bar = build_progress(console)
    bar.add_task("training", total=1000, completed=120, notes=("loss 3.2104", "ppl 24.79", "1,234 tok/s"))
    console.print(bar.get_renderable())
    (line,) = written(console)
    assert all(part in line for part in shown), line
    assert len(line) <= width
    assert "..." not in line
    assert "…" not in line


def test_a_bar_is_on_the_error_output(on_terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("cells", 30) as show:
        show(30)
    out, err = capsys.readouterr()
    assert not out
    assert "30/30" in err


def test_an_error_is_shown_with_its_key_its_value_and_the_fix() -> None:
    text = describe_error(f"2 errors in run.yaml:\n  - {SENTENCE}\n  - seed: 'x' is not an integer; it has a y")
    assert text.plain.splitlines() == [
        "2 errors in run.yaml:",
        "  - trainer.max_steps: -1 must be at least 1",
        "      fix: write 100",
        "  - seed: 'x' is not an integer",
        "      it has a y",
    ]
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled == {"bold red": "trainer.max_steps", "bold": ": -1", "green": "write 100"}


def test_a_long_value_does_not_push_its_error_off_the_screen() -> None:
    text = describe_error(f"trainer.max_steps: {'x' * 100_000!r} is not an integer").plain
    assert len(text) < 300
    assert "100,002 letters" in text
    assert text.endswith("is not an integer")


def fail_on(stream: int, more: dict[str, str]) -> subprocess.Popen[bytes]:
    code = f"from neobert import cli, errors\ndef main():\n raise errors.UserError({SENTENCE!r})\ncli.run(main)"
    plain = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    variables = {**plain, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "60", **more}
    return subprocess.Popen([sys.executable, "-c", code], stderr=stream, stdout=subprocess.DEVNULL, env=variables)


@pytest.mark.parametrize(("more", "boxed"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_box_on_a_terminal_and_a_line_elsewhere(more: dict[str, str], boxed: bool) -> None:
    ours, theirs = os.openpty()
    child = fail_on(theirs, more)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux says that the other end is closed.
        pass
    os.close(ours)
    assert child.wait() == 2
    text = shown.decode()
    assert ("fix: " in text) == boxed
    assert ("error: trainer.max_steps: -1" in text) != boxed
    piped = fail_on(subprocess.PIPE, {})
    assert piped.communicate()[1].decode() == f"error: {SENTENCE}\n"


def test_settings_of_a_terminal_are_a_table_of_what_differs(
    on_terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reporter = Reporter(active=True, show_progress=True)
    reporter.open_file(tmp_path / "training.log")
    reporter.show_settings(["[run] task=pretraining seed=0"], {"trainer": {"max_steps": "100"}})
    shown = capsys.readouterr().out
    assert "max_steps" in shown
    assert "seed" not in shown
    assert (tmp_path / "training.log").read_text() == "[run] task=pretraining seed=0\n"
    plain = Reporter(active=True, show_progress=True, mode="plain")
    plain.show_settings(["[run] task=pretraining seed=0"], {"trainer": {"max_steps": "100"}})
    assert "[run] task=pretraining seed=0" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_value_does_not_fill_the_screen(width: int) -> None:
    console = terminal(width)
    changed = {"dataset": {"path": "x" * 100_000}, "trainer": {"per_device_train_batch_size": "16"}}
    console.print(build_settings_table(changed, width))
    lines = written(console)
    assert len(lines) < MOST_LETTERS // (width // 3) + 8
    assert max(map(len, lines)) <= width
    assert sum(line.count("x") for line in lines) == MOST_LETTERS
    assert "100,000" in " ".join(lines)


def test_a_secret_is_not_in_the_table() -> None:
    console = terminal(80)
    console.print(build_settings_table({"dataset": {"path": "https://me:pa55word@host/x"}}, 80))
    assert "pa55word" not in "\n".join(written(console))


def test_quiet_prints_warnings_alone_and_records_everything(
    on_terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reporter = Reporter(active=True, show_progress=True, mode="quiet")
    reporter.open_file(tmp_path / "training.log")
    reporter.show_settings(["[run] seed=0"], {})
    reporter.start_progress(done=0, total=10)
    reporter.say("a line")
    reporter.warn("too hot")
    reporter.stop_progress()
    out, err = capsys.readouterr()
    assert "warning: too hot" in out
    assert "a line" not in out + err
    assert "training" not in out + err
    assert (tmp_path / "training.log").read_text().splitlines() == ["[run] seed=0", "a line", "warning: too hot"]


def test_lines_of_a_run_come_above_its_bars(
    on_terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(active=True, show_progress=True)
    reporter.start_progress(done=0, total=10)
    reporter.note("loss 2.5000", "ppl 12.18")
    with reporter.bar("evaluating", 3) as advance:
        advance()
        reporter.say("a line")
    reporter.stop_progress()
    reporter.say("after")
    shown = capsys.readouterr().out
    before, _, rest = shown.partition("a line")
    assert before.rstrip().endswith("\x1b[2K"), "the bars are erased first"
    assert rest.index("training") < rest.index("evaluating") < rest.index("after")
    assert "loss 2.5000 ppl 12.18" in rest
    assert rest.rindex("evaluating") < rest.rindex("training"), "its bar is gone when it is over"


def test_what_ends_at_once_gives_the_terminal_its_cursor_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as screen, (tmp_path / "file").open("w") as file:
        monkeypatch.setattr(sys, "stdout", screen)
        show_cursor()
        assert b"\x1b[?25h" in os.read(leader, 100)
        monkeypatch.setattr(sys, "stdout", file)
        show_cursor()
    os.close(leader)
    assert (tmp_path / "file").read_text() == ""
    show_cursor()  # A closed stream is no terminal.


def test_an_error_is_shown_when_the_bars_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    reporter = SimpleNamespace(stop_progress=lambda: stopped.append(True))

    def fail(run: object) -> None:
        assert not stopped
        raise StartupError("no")

    monkeypatch.setattr(loop, "_train", fail)
    run: Any = SimpleNamespace(runtime=SimpleNamespace(heartbeat=None), reporter=reporter)
    with pytest.raises(StartupError, match="no"):
        loop.train(run)
    assert stopped == [True]
