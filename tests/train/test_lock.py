"""One run in a folder at a time; one folder for all ranks."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train import start as lock
from neobert.train.loop import pretrain
from neobert.train.start import acquire_lock, check_shared, release_lock

Tiny = Callable[..., Config]


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of a folder as a run does."""
    code = (
        "import fcntl, json, os, sys, time\n"
        f"handle = open({str(folder / '.lock')!r}, 'w')\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "handle.write(json.dumps({'pid': os.getpid(), 'host': 'node7'})); handle.flush()\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("more", [[], ["trainer.resume_from_checkpoint=latest"], ["trainer.overwrite_output_dir=true"]])
def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    other = hold(out)
    with pytest.raises(StartupError, match=rf"another run is writing into {out} \(pid {other.pid} on node7\)"):
        pretrain(tiny(out, "trainer.max_steps=1", *more))
    assert sorted(p.name for p in out.iterdir()) == [".lock"], "nothing was touched"
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert pretrain(tiny(out, "trainer.max_steps=1", *more)).state.step == 1


def test_the_lock_names_its_holder_and_is_released(tmp_path: Path) -> None:
    acquire_lock(tmp_path)
    acquire_lock(tmp_path)  # A start that failed in this process left it: it is taken over.
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with (tmp_path / ".lock").open() as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_lock(tmp_path)
    with (tmp_path / ".lock").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_was_replaced_has_a_lock_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    acquire_lock(folder)
    folder.rename(tmp_path / "aside")
    folder.mkdir()
    acquire_lock(folder)
    with (folder / ".lock").open() as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_lock(folder)


def test_ranks_that_see_different_folders_stop_with_that_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "VISIBLE_SECONDS", 0.3)
    for name in ("node0", "node1"):
        (tmp_path / name).mkdir()

    def message(runtime: Any, folder: Path) -> str | None:
        try:
            check_shared(folder, runtime)
        except StartupError as error:
            return str(error)
        return None

    one, other = run_ranks(2, lambda runtime: message(runtime, tmp_path / f"node{runtime.rank}"))
    assert one is not None
    assert "is not one folder for all processes: rank 1 on" in one
    assert other is not None
    assert run_ranks(2, lambda runtime: message(runtime, tmp_path / "node0")) == [None, None]
    assert list((tmp_path / "node0").iterdir()) == [], "the probe is gone"
