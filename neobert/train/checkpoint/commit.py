"""The write protocol of a checkpoint folder: complete under its name, or not there.

1. Rank 0 makes `.tmp-<step>-<nonce>` and sends the others its name.
2. Every rank writes its own files, flushes each to the disk (fsync) and takes its length and SHA-256.
3. The records are gathered. If any rank failed, rank 0 removes the folder and every rank learns why.
4. Rank 0 writes `manifest.json` last, flushes every folder, renames the folder to `<step>`, flushes `checkpoints/`.

Only rank 0 creates, renames or deletes folders. A kill at any instant leaves the old checkpoints and at most a folder
whose name starts with a dot, which the next save removes. A rename can reach the disk before the data it names: without
step 2 and 4's flushes a power loss leaves empty files under a valid name.

In the background a thread does step 2, and in a single process 3 and 4 as well, so that the checkpoint is there as soon
as it is written and even a run that ends by an exception leaves it. Several processes need collectives for 3, and these
stay on the main thread (a second thread would mix its messages with the training step's): there `poll`, called after
every step, asks whether all ranks have written and then does 3 and 4. One save is in flight at most.
"""

import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from neobert.disk import sync
from neobert.testing.faults import fault_point
from neobert.train.hardware.machine import Runtime
from neobert.weights.folder import MANIFEST, FileRecord, Manifest, record_file

Write = Callable[[Path], None]
"""Writes one file, or one folder of files, at a path."""

MOST_FAILURES = 3
"""Saves that may fail in a row before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """How a save ended; equal on every rank."""

    step: int
    path: Path | None
    """The new checkpoint; None when there is none."""

    problem: str | None = None
    fatal: bool = False
    """Another attempt cannot succeed."""

    num_bytes: int = 0
    manifest: str | None = None
    """Digest of the manifest, where there is a checkpoint."""

    seconds: float = 0.0
    """From the first file to the rename."""


@dataclass(kw_only=True, slots=True)
class _Written:
    """What one rank wrote."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    problem: str | None = None


@dataclass(kw_only=True, slots=True)
class _Flight:
    """A save that is not committed yet."""

    step: int
    temporary: Path
    started: float
    written: _Written | None = None
    outcome: SaveResult | None = None
    thread: threading.Thread | None = None


class Committer:
    """Writes checkpoints of one run, one at a time, and counts the saves that failed in a row."""

    def __init__(self, runtime: Runtime, output_dir: Path) -> None:
        self._runtime, self._output_dir = runtime, output_dir
        self._folder = output_dir / "checkpoints"
        self._flight: _Flight | None = None
        self._failures = 0
        self._is_writing = False
        """Whether any rank was, when they last agreed."""

    @property
    def gave_up(self) -> bool:
        """Whether so many saves failed in a row that the run must not continue without checkpoints."""
        return self._failures >= MOST_FAILURES

    @property
    def failed(self) -> bool:
        """Whether the last save failed."""
        return self._failures > 0

    def begin(self, step: int, files: Mapping[str, Write], *, background: bool) -> None:
        """Starts writing `files` (of this rank) as the checkpoint of `step`; `poll` reports how it ended.

        In the background `files` must not read anything that training changes. Collective.
        """
        assert self._flight is None, "one save is in flight at most: poll(wait=True) first"
        # Patient: a save may take longer than a step ever does, and a rank that is lost is noticed by its heartbeat.
        staged = self._runtime.object_from_main(self._stage(step) if self._runtime.is_main else None, patient=True)
        assert staged is not None, "rank 0 says so"
        name, problem, fatal = staged
        flight = _Flight(step=step, temporary=self._folder / (name or ""), started=time.perf_counter())
        self._flight = flight
        if problem is not None:
            flight.outcome = SaveResult(step=step, path=None, problem=problem, fatal=fatal)
        elif background:
            # Not a daemon: whatever ends the interpreter but a kill waits until the files are written.
            flight.thread = threading.Thread(target=self._write, args=(flight, files), name="checkpoint")
            flight.thread.start()
            self._is_writing = True
        else:
            self._write(flight, files)

    def is_writing(self) -> bool:
        """Whether this rank still writes a save in the background."""
        return self._flight is not None and self._flight.thread is not None and self._flight.thread.is_alive()

    def agree(self, num_writing: int) -> None:
        """Takes the sum of `is_writing` over all ranks, which each step makes."""
        self._is_writing = num_writing > 0

    def poll(self, *, wait: bool = False) -> SaveResult | None:
        """The outcome of the save in flight, once; None while it is written and when there is none. Collective."""
        flight = self._flight
        if flight is None:
            return None
        if flight.thread is not None:
            if wait:
                flight.thread.join()
            elif self._is_writing:
                return None
        if flight.outcome is None:
            self._conclude(flight)
        outcome, self._flight = flight.outcome, None
        assert outcome is not None
        self._failures = MOST_FAILURES if outcome.fatal else self._failures + 1 if outcome.problem else 0
        return outcome

    def _stage(self, step: int) -> tuple[str | None, str | None, bool]:
        """Rank 0: makes the temporary folder; (its name, or what went wrong, whether permanently)."""
        name = f".tmp-{step}-{secrets.token_hex(4)}"
        if not self._output_dir.is_dir():
            reason = f"trainer.output_dir: {self._output_dir} was removed while the run was writing into it"
            return None, reason, True
        try:
            if not self._folder.is_dir():
                self._folder.mkdir()
                sync(self._output_dir)
            for leftover in self._folder.glob(".tmp-*"):  # Of a run that was killed: the lock says nobody writes it.
                remove_tree(leftover)
            (self._folder / name).mkdir()
            fault_point("commit.staged", step)
        except OSError as error:
            return None, describe_failure(error, self._output_dir), False
        return name, None, False

    def _write(self, flight: _Flight, files: Mapping[str, Write]) -> None:
        flight.written = _write_files(flight.temporary, files, flight.step)
        if self._runtime.world == 1:
            self._conclude(flight)

    def _conclude(self, flight: _Flight) -> None:
        every = self._runtime.gather_to_main(flight.written, patient=True)
        outcome = None if every is None else self._commit(flight, every)
        flight.outcome = self._runtime.object_from_main(outcome, patient=True)

    def _commit(self, flight: _Flight, every: list[_Written]) -> SaveResult:
        problems = [f"rank {rank}: {w.problem}" if rank else w.problem for rank, w in enumerate(every) if w.problem]
        problem = "; ".join(p for p in problems if p) or None
        files = {name: record for written in every for name, record in written.files.items()}
        manifest = Manifest(step=flight.step, world_size=len(every), files=files)
        final = self._folder / str(flight.step)
        if problem is None:
            try:
                _finish(flight.temporary, final, manifest)
            except OSError as error:
                problem = describe_failure(error, self._output_dir)
        if problem is not None:
            remove_tree(flight.temporary)
            return SaveResult(step=flight.step, path=None, problem=problem, fatal=not self._output_dir.is_dir())
        seconds = time.perf_counter() - flight.started
        return SaveResult(
            step=flight.step, path=final, num_bytes=manifest.num_bytes, manifest=manifest.digest, seconds=seconds
        )


def _write_files(folder: Path, files: Mapping[str, Write], step: int) -> _Written:
    written = _Written()
    try:
        for name, write in files.items():
            fault_point(f"commit.write.{name}", step)
            write(folder / name)
            for path in [p for p in (folder / name).rglob("*") if p.is_file()] or [folder / name]:
                os.chmod(path, 0o644)  # safetensors makes files that nobody else can read.
                sync(path)
                written.files[path.relative_to(folder).as_posix()] = record_file(path)
            fault_point(f"commit.written.{name}", step)
    except Exception as error:  # A full disk is a RuntimeError or a SafetensorError by the time it gets here.
        written.problem = describe_failure(error, folder)
    return written


def _finish(temporary: Path, final: Path, manifest: Manifest) -> None:
    path = temporary / MANIFEST
    path.write_text(manifest.to_text())
    sync(path)
    for parent, _, _ in os.walk(temporary):
        sync(Path(parent))
    fault_point("commit.manifest", manifest.step)
    if final.exists():  # A damaged one of the same step: `begin` is not called over a valid one.
        os.rename(final, final.with_name(f".superseded-{final.name}-{secrets.token_hex(4)}"))
    os.rename(temporary, final)
    fault_point("commit.renamed", manifest.step)
    sync(final.parent)
    fault_point("commit.flushed", manifest.step)


def remove_tree(folder: Path) -> str | None:
    """Deletes a folder; what went wrong, if anything did. A later sweep tries again."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder} could not be deleted: {error}"
    return None


def describe_failure(error: Exception, folder: Path) -> str:
    """An error of a save as text, with the free space of the disk.

    torch reports a write that the disk cut short as `unexpected pos 576 vs 534`, whatever the cause.
    """
    try:
        free = shutil.disk_usage(folder).free
        space = f"{free:,} bytes are free on the disk of {folder}"
    except OSError:
        space = f"{folder} cannot be reached"
    if isinstance(error, OSError) and error.errno is not None:
        return f"[{errno.errorcode.get(error.errno, error.errno)}] {error}; {space}"
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    if "unexpected pos" in text:
        return f"a write was cut short, as by a full disk, a quota or a limit on file sizes ({text}); {space}"
    return f"{type(error).__name__}: {text}; {space}"
