"""`neobert gpu-check`: everything that has to be seen on a GPU once, in one resumable command.

`CHECKS` in `gpu_table` says what is run, what is expected of it and about how long it takes. Each check has a process
of its own with a time limit (`gpu_worker`); the next process imports its libraries while a check runs. Results are in
gpu-check.json as soon as they are there, and in gpu-check.md beside what was expected. The same command again skips
what is done and tries again what failed, was skipped or did not fit.

Without a GPU every check runs on the CPU with tiny sizes, in one process: a dry run, which says that nothing is wrong
with the checks themselves, and nothing about a GPU.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from neobert.benchmark.gpu.gpu_table import CHECKS, GpuCheck
from neobert.disk import locked, write_json, write_text
from neobert.errors import DataError, UserError

RECORD, TABLE, LOG = "gpu-check.json", "gpu-check.md", "gpu-check.log"

_ROOT = str(Path(__file__).parents[3])
"""Where the package is, installed or not."""

_START_SECONDS = 120.0
"""In which a worker imports its libraries."""

_STOPPED = "stopped after"

_GRACE = 3.0
"""Times the estimated cost that a check may take, when the budget has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a worker says of where it is."""

    device: str
    """Name of the GPU, or `cpu`."""

    gpus: int

    @property
    def dry(self) -> bool:
        return self.gpus == 0


# --- one process -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that has imported torch and waits for the name of a check."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "neobert.benchmark.gpu.gpu_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # A compiler's helpers end with it.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))},
            )

    def describe_machine(self) -> Machine:
        """What it runs on.

        Raises:
            UserError: torch cannot be imported or does not answer.
        """
        try:
            self._send({"name": None})
            return Machine(**self._read(_START_SECONDS))
        except (TimeoutError, BrokenPipeError, EOFError) as error:
            raise UserError(f"the process of the checks did not start; the last lines of {LOG} say why") from error

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The result of a check, `failed` where it does not come in time. A worker that failed is not used again."""
        try:
            self._send({"name": name})
            return self._read(seconds)
        except TimeoutError:
            self.close()
            return {"state": "failed", "reason": f"{_STOPPED} {seconds:.0f} s"}
        except (BrokenPipeError, EOFError):
            return {"state": "failed", "reason": f"the process ended with {self._process.wait()}"}

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in filter(None, (self._process.stdin, self._process.stdout)):
            with suppress(BrokenPipeError):  # What was not read.
                stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        """Raises TimeoutError, or EOFError where the process is gone."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(seconds, 0)):
                raise TimeoutError
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer


class Workers:
    """One worker that serves, and on a GPU the next one, which imports meanwhile: a check has a process of its own."""

    def __init__(self, log: Path, first: Worker, machine: Machine) -> None:
        self._log, self._machine = log, machine
        self._current: Worker | None = first
        self._next: Worker | None = None

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The result of a check, with its seconds."""
        if self._current is None:
            self._current, self._next = self._next or Worker(self._log), None
        if not self._machine.dry:
            self._next = Worker(self._log)
        started = time.monotonic()
        result = self._current.run(name, seconds)
        result["seconds"] = round(time.monotonic() - started, 1)
        if not self._machine.dry or not self._current.is_alive:
            self._current.close()
            self._current = None
        return result

    def close(self) -> None:
        for worker in filter(None, (self._current, self._next)):
            worker.close()


@contextmanager
def _workers(log: Path) -> Iterator[tuple[Workers, Machine]]:
    first = Worker(log)
    try:
        machine = first.describe_machine()
    except BaseException:
        first.close()
        raise
    workers = Workers(log, first, machine)
    try:
        yield workers, machine
    finally:
        workers.close()


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class CheckRecord:
    """gpu-check.json."""

    machine: Machine
    results: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, output: Path, machine: Machine) -> Self:
        """What an earlier start on this kind of machine left; a dry run leaves nothing to a GPU.

        Raises:
            DataError: the results in `output` are of another GPU, or no results.
        """
        file = output / RECORD
        if not file.exists():
            return cls(machine=machine, results={})
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            before, results = Machine(**saved["machine"]), dict(saved["checks"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} holds no results of gpu-check ({error}); write another --output") from error
        if not before.dry and before != machine:
            raise DataError(
                f"--output: {output} holds results of {before.gpus} x {before.device}, and this machine has "
                f"{machine.device}; write another --output"
            )
        return cls(machine=machine, results=results if before == machine else {})

    def write(self, output: Path) -> None:
        """Both files, each replaced as a whole."""
        machine = {"device": self.machine.device, "gpus": self.machine.gpus}
        write_json(output / RECORD, {"machine": machine, "checks": self.results})
        write_text(output / TABLE, describe(self))

    def is_done(self, name: str) -> bool:
        return self.results.get(name, {}).get("state") == "done"


def describe(record: CheckRecord) -> str:
    """Expectation beside result, as Markdown."""
    mark = "dry run on a CPU, tiny sizes: " if record.machine.dry else ""
    lines = [f"# {mark}GPU check on {record.machine.device}", ""]
    lines += ["| check | what it runs | expected on an H200 | result | s |", "|---|---|---|---|---|"]
    for name, check in CHECKS.items():
        result = record.results.get(name, {"state": "not run", "reason": "not reached"})
        text = "<br>".join([_headline(result), *result.get("lines", [])]).replace("|", "\\|")
        lines.append(f"| {name} | {check.runs} | {check.expects} | {mark}{text} | {result.get('seconds', '')} |")
    return "\n".join(lines) + "\n"


def _headline(result: dict[str, Any]) -> str:
    reason = result.get("reason")
    state: str = result["state"]
    return state if reason is None else f"{state}: {reason}"


# --- all of it -------------------------------------------------------------------------------------------------------


def run_checks(output: Path, *, minutes: float, say: Callable[[str], None]) -> bool:
    """Runs what fits into the minutes and is not done yet; whether nothing failed.

    Args:
        say: takes a line for each check.

    Raises:
        DataError: the results in `output` are of another GPU, or another process writes there.
        UserError: torch cannot be imported.
    """
    deadline = time.monotonic() + 60 * minutes
    with locked(output), _workers(output / LOG) as (workers, machine):
        record = CheckRecord.read(output, machine)
        mark = "dry run (CPU, tiny): " if machine.dry else ""
        for name, check in CHECKS.items():
            if record.is_done(name):
                say(f"{mark}{name}: done before")
                continue
            left = deadline - time.monotonic()
            limit = _GRACE * 60 * check.minutes
            result = _refuse(check, machine, left) or workers.run(name, min(left, limit))
            if left < limit and result.get("reason", "").startswith(_STOPPED):
                result |= {"state": "not run", "reason": f"no time left; {result['reason']}"}
            record.results[name] = {"dry_run": machine.dry, "expects": check.expects, **result}
            record.write(output)
            seconds = f" ({result['seconds']} s)" if "seconds" in result else ""
            for line in [f"{name}: {_headline(result)}{seconds}", *(f"  {x}" for x in result.get("lines", []))]:
                say(mark + line)
        return all(result["state"] != "failed" for result in record.results.values())


def _refuse(check: GpuCheck, machine: Machine, seconds_left: float) -> dict[str, Any] | None:
    """The result of a check that is not tried; None for one that is."""
    missing = [name for name in check.packages if find_spec(name) is None]
    if missing:
        return {"state": "skipped", "reason": f"needs {', '.join(missing)}: run `pip install {' '.join(missing)}`"}
    if check.gpus > max(machine.gpus, 1):
        return {"state": "skipped", "reason": f"needs {check.gpus} GPUs, and this machine has {machine.gpus}"}
    cost = 0.05 if machine.dry else check.minutes
    if seconds_left < 60 * cost:
        return {"state": "not run", "reason": "no time left; the same command with more --minutes runs it"}
    return None
