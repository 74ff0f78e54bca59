"""The training step beside processes that want the same CPUs."""

import subprocess
from dataclasses import replace

import pytest

from neobert.benchmark import busy_cpu
from neobert.benchmark.busy_cpu import QUICKSTART, BusySettings, competing, describe, measure_loads, measure_ways
from neobert.commands.machine_commands import benchmark_busy

TINY = replace(QUICKSTART, preset="tiny", vocab_size=64, rows=2, length=32, mean_document=10.0)


def test_each_way_is_measured_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_cpu, "WAYS", {"chosen": {"GOMP_SPINCOUNT": "5000", "OMP_NUM_THREADS": "1"}})
    rates = measure_ways(BusySettings(loads=(0, 1), seconds=0.01, repeats=1, step=TINY))
    assert list(rates) == ["chosen"]
    assert all(rates["chosen"][load] > 0 for load in (0, 1))


def test_competing_processes_run_during_the_measurement_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def note(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(start(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    with competing(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
    assert list(measure_loads(TINY, [0, 1], 0.0)) == [0, 1]
    assert len(started) == 3


def test_the_machine_alone_is_always_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        busy_cpu, "measure_ways", lambda settings: {way: dict.fromkeys(settings.loads, 10.0) for way in busy_cpu.WAYS}
    )
    benchmark_busy("neobert benchmark-busy", ["--loads", "2"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["quiet", "beside", "2"]


def test_the_table_says_how_much_of_the_fair_fraction_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_cpu, "available_cpus", lambda: 2)
    rates = {"OpenMP's default": {0: 1000.0, 2: 100.0}, "short": {0: 980.0, 2: 400.0}}
    lines = describe(BusySettings(loads=(0, 2)), rates).splitlines()
    assert lines[1].split() == ["quiet", "beside", "2"]
    assert lines[2].split()[-4:] == ["1,000", "(100%)", "100", "(20%)"]
    assert lines[3].split()[-4:] == ["980", "(98%)", "400", "(80%)"]
