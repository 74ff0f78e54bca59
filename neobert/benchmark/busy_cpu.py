"""Training steps beside processes that want the same CPUs, by how the threads of OpenMP wait for each other.

How threads wait is read once, when torch is imported: each way is measured in its own process, quiet and beside 1, 2
and 4 processes that never pause, and the ways take turns. The fair fraction of n CPUs beside k such processes is
n / (n + k) of the speed on a quiet machine.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import build_stepper
from neobert.host import SPIN_COUNT, WAITING, available_cpus

DEFAULT = "OpenMP's default"

WAYS: dict[str, dict[str, str]] = {
    DEFAULT: {"GOMP_SPINCOUNT": "300000"},
    f"GOMP_SPINCOUNT={SPIN_COUNT}": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""Environment of each; `neobert` sets the second."""


QUICKSTART = StepSettings(
    preset="quickstart",
    vocab_size=8192,
    tied=True,
    length=128,
    rows=16,
    mean_document=100.0,
    probability=0.3,
    precision="fp32",
)
"""The rows of configs/pretraining/quickstart.yaml, its model and AdamW, in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BusySettings:
    """What is measured."""

    loads: tuple[int, ...] = (0, 1, 2, 4)
    """Competing processes; 0 is among them, with which the others are compared."""

    seconds: float = 4.0
    """Of each measurement."""

    repeats: int = 3
    step: StepSettings = QUICKSTART


def measure_ways(settings: BusySettings) -> dict[str, dict[int, float]]:
    """Way -> number of competing processes -> real tokens a second, the median of the repeats."""
    rates: dict[str, dict[int, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for _ in range(settings.repeats):
        for way, variables in WAYS.items():
            for load, rate in _measure_in_a_process(settings, variables).items():
                rates[way][load].append(rate)
    return {way: {load: statistics.median(r) for load, r in found.items()} for way, found in rates.items()}


def _measure_in_a_process(settings: BusySettings, variables: dict[str, str]) -> dict[int, float]:
    unset = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "neobert.benchmark.busy_cpu", str(settings.seconds), *map(str, settings.loads)]
    command += [json.dumps(asdict(settings.step))]
    done = subprocess.run(command, env={**unset, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    return {int(load): rate for load, rate in json.loads(done.stdout).items()}


def measure_loads(step: StepSettings, loads: Sequence[int], seconds: float) -> dict[int, float]:
    """Number of competing processes -> real tokens a second of this process, by the clock on the wall."""
    make_step = build_stepper(step)
    make_step()
    rates = {}
    for load in loads:
        with competing(load):
            make_step()
            tokens, start = 0, time.perf_counter()
            while not tokens or time.perf_counter() - start < seconds:
                tokens += make_step().num_tokens
            rates[load] = tokens / (time.perf_counter() - start)
    return rates


@contextmanager
def competing(count: int) -> Iterator[None]:
    """So many processes that never pause, while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def describe(settings: BusySettings, rates: dict[str, dict[int, float]]) -> str:
    """The table: a row for each way, and how much of the fair fraction it keeps."""
    cpus, quiet = available_cpus(), rates[DEFAULT][0]
    titles = ["quiet" if load == 0 else f"beside {load}" for load in settings.loads]
    lines = [
        f"real tokens a second on {cpus} CPUs (of the fair fraction)",
        f"{'':<26}" + "".join(f"{t:>18}" for t in titles),
    ]
    for way, found in rates.items():
        cells = (f"{found[load]:,.0f} ({found[load] / (quiet * cpus / (cpus + load)):.0%})" for load in settings.loads)
        lines.append(f"{way:<26}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    seconds, *loads, values = sys.argv[1:]
    print(json.dumps(measure_loads(StepSettings(**json.loads(values)), [int(x) for x in loads], float(seconds))))
