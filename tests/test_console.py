"""Output cannot fail a command: closed pipes, full disks, closed streams, terminals without UTF-8, on both streams."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

COMMAND = """
import sys, warnings, logging
from neobert import cli

def main():
    for number in range(300):
        print("naïve \\ud800 line", number)
        print("naïve \\ud800 line", number, file=sys.stderr)
    warnings.warn("über")
    logging.warning("über")
    print("unfinished", end="")
    open(sys.argv[1], "w").write("done")
    if len(sys.argv) > 2:
        cli.print_result("the result")
    return 7

cli.run(main)
"""
"""Does its work between prints, more than a pipe's buffer would hide."""


def start(folder: Path, *, closing: str = "", options: tuple[str, ...] = (), words: str = "", **more: Any) -> Any:
    """The command, with a redirection of the shell."""
    python = " ".join([sys.executable, *options])
    (folder / "command.py").write_text(more.pop("command", COMMAND), encoding="utf-8")
    line = f"exec {python} {folder}/command.py {folder}/done {words} {closing}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("variables", {})}
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True, **more)


def gone_pipe() -> int:
    """The writing end of a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    ("closing", "options"),
    [
        ("> /dev/full", ()),
        ("> /dev/full 2>&1", ()),
        ("2> /dev/full", ()),
        (">&-", ()),
        ("2>&-", ()),
        (">&- 2>&- <&-", ()),
        (">&{gone}", ()),
        (">&{gone} 2>&1", ()),
        (">&{gone} 2>&1", ("-u",)),
        ("2>&{gone}", ("-u",)),
    ],
)
def test_a_console_that_cannot_be_written_changes_nothing(
    tmp_path: Path, closing: str, options: tuple[str, ...]
) -> None:
    gone = gone_pipe()
    found = start(tmp_path, closing=closing.format(gone=gone), options=options, pass_fds=[gone])
    os.close(gone)
    assert (tmp_path / "done").read_text() == "done", "no file takes the number of a closed stream"
    assert found.returncode == 7, "neither an error nor the 120 of a flush that failed at exit"
    assert b"Error" not in found.stdout + found.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_what_a_terminal_cannot_show_is_written_in_another_way(tmp_path: Path, encoding: str) -> None:
    found = start(tmp_path, variables={"PYTHONIOENCODING": encoding})
    assert found.returncode == 7, found.stderr
    shown = {"ascii": rb"na\xefve", "latin-1": "naïve".encode("latin-1")}.get(encoding, "naïve".encode())
    assert shown + rb" \ud800 line 299" in found.stdout
    assert shown + rb" \ud800 line 299" in found.stderr


def test_files_are_utf8_in_a_locale_that_is_not(tmp_path: Path) -> None:
    code = COMMAND.replace('write("done")', 'write("über")')
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = start(tmp_path, command=code, variables=ascii_only)
    assert found.returncode == 7, found.stderr
    assert rb"na\xefve" in found.stdout
    assert (tmp_path / "done").read_text(encoding="utf-8") == "über"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    code = "import os; os.set_blocking(1, False)\n" + COMMAND
    found = start(tmp_path, command=code)
    assert found.returncode == 7
    assert len(found.stdout.splitlines()) == 301


def test_a_result_that_was_not_written_is_reported(tmp_path: Path) -> None:
    full = start(tmp_path, words="result", closing="> /dev/full")
    assert full.returncode == 74
    assert b"error: the result could not be written to the standard output (No space left on device)" in full.stderr
    gone = gone_pipe()
    closed = start(tmp_path, words="result", closing=f">&{gone}", pass_fds=[gone])
    os.close(gone)
    assert closed.returncode == 141, "as a program that SIGPIPE ends"
    assert b"rror" not in closed.stderr
    assert start(tmp_path, words="result").returncode == 7
