"""`neobert gpu-check` on a machine without a GPU: all of it as a dry run, resumed, and within its minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neobert.benchmark.gpu import gpu_check, gpu_kernels, gpu_rank, gpu_runs, gpu_worker
from neobert.benchmark.gpu.gpu_check import Machine, run_checks
from neobert.benchmark.gpu.gpu_table import CHECKS, Bench, Found, GpuCheck, NotAsExpected
from neobert.config.schema import Config
from neobert.errors import DataError
from neobert.model.attention import ATTENTION

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is no dry run where there is a GPU")


def test_a_dry_run_of_every_check(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neobert", "gpu-check", "--output", str(tmp_path / "out"), "--minutes", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    record = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    results = record["checks"]
    failed = {name: result for name, result in results.items() if result["state"] not in ("done", "skipped")}
    assert failed == {}, (tmp_path / "out" / "gpu-check.log").read_text()[-6000:]
    assert done.returncode == 0, done.stderr
    assert record["machine"] == {"device": "cpu", "gpus": 0}
    assert list(CHECKS) == [name for name in CHECKS if name in results]
    assert all(result["dry_run"] for result in results.values())
    skipped = {name: result["reason"] for name, result in results.items() if result["state"] == "skipped"}
    assert skipped == {"two-gpus": "needs 2 GPUs, and this machine has 0"}
    lines = done.stdout.splitlines()
    assert len(lines) >= len(CHECKS)
    assert all("dry run" in line for line in lines), "nobody takes it for a result"
    rows = (tmp_path / "out" / "gpu-check.md").read_text().splitlines()
    assert [row for row in rows[4:] if "dry run" not in row] == []
    assert [name for name, known in CHECKS.items() if not any(known.expects in row for row in rows)] == []


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, GpuCheck]:
    """Workers that are a few lines of Python, and a table of checks that go wrong in several ways."""
    checks = {
        name: GpuCheck(runs=name, expects="x", minutes=0.005, function="x:y")
        for name in ("fails", "hangs", "dies", "works")
    }
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    name = json.loads(line)['name']\n"
        "    if name is None:\n"
        "        gpus = int(os.environ.get('GPUS_OF_THE_TEST', '0'))\n"
        "        print(json.dumps({'device': 'H200' if gpus else 'cpu', 'gpus': gpus}), flush=True)\n"
        "        continue\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(name + ' ' + str(os.getpid()) + '\\n')\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    if name == 'dies': os._exit(9)\n"
        "    state = {'state': 'done', 'lines': ['7 ms']}\n"
        "    if name == 'fails': state = {'state': 'failed', 'reason': 'wrong'}\n"
        "    print(json.dumps(state), flush=True)\n"
    )
    real = subprocess.Popen

    def start(command: list[str], **settings: Any) -> Any:
        return real([sys.executable, str(script)], **settings)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", start)
    return checks


def test_each_check_has_a_process_and_a_limit(small: dict[str, GpuCheck], tmp_path: Path) -> None:
    """A hang, a crash and a failure cost no other check; a second start tries them again and nothing else."""
    said: list[str] = []
    assert not run_checks(tmp_path / "out", minutes=1, say=said.append)
    results = json.loads((tmp_path / "out" / "gpu-check.json").read_text())["checks"]
    assert {name: (r["state"], r.get("reason")) for name, r in results.items()} == {
        "fails": ("failed", "wrong"),
        "hangs": ("failed", "stopped after 1 s"),
        "dies": ("failed", "the process ended with 9"),
        "works": ("done", None),
    }
    assert "dry run (CPU, tiny):   7 ms" in said
    run_checks(tmp_path / "out", minutes=1, say=said.append)
    assert calls(tmp_path) == ["fails", "hangs", "dies", "works", "fails", "hangs", "dies"]
    assert len({*calls(tmp_path, 1)}) == 3 + 2, "of the two starts: what hung or died is replaced, others serve again"


def calls(folder: Path, column: int = 0) -> list[str]:
    """Names of the checks that were run, or the processes that ran them."""
    return [line.split()[column] for line in (folder / "calls").read_text().splitlines()]


def test_on_a_gpu_no_two_checks_share_a_process(
    small: dict[str, GpuCheck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUS_OF_THE_TEST", "1")
    said: list[str] = []
    run_checks(tmp_path / "out", minutes=1, say=said.append)
    assert len({*calls(tmp_path, 1)}) == len(small) == 4
    assert not any("dry run" in line for line in said)
    assert "works: done" in said[-2]


def test_what_does_not_fit_is_not_run(
    small: dict[str, GpuCheck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_checks(tmp_path / "out", minutes=0.001, say=lambda line: None)
    results = json.loads((tmp_path / "out" / "gpu-check.json").read_text())["checks"]
    assert {result["state"] for result in results.values()} == {"not run"}
    assert "no time left" in results["works"]["reason"]
    assert not (tmp_path / "calls").exists()


def test_results_of_a_gpu_are_not_mixed_with_others(small: dict[str, GpuCheck], tmp_path: Path) -> None:
    machine, checks = {"device": "NVIDIA H200", "gpus": 1}, {"works": {"state": "done", "lines": []}}
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "gpu-check.json"
    file.write_text(json.dumps({"machine": machine, "checks": checks}))
    with pytest.raises(DataError, match=r"holds results of 1 x NVIDIA H200.*write another --output"):
        run_checks(tmp_path / "out", minutes=1, say=lambda line: None)
    assert json.loads(file.read_text())["checks"] == checks
    file.write_text("{}")
    with pytest.raises(DataError, match="holds no results of gpu-check"):
        run_checks(tmp_path / "out", minutes=1, say=lambda line: None)


def test_a_dry_run_leaves_nothing_to_a_gpu(tmp_path: Path) -> None:
    gpu_check.CheckRecord(machine=Machine(device="cpu", gpus=0), results={"gemm": {"state": "done"}}).write(tmp_path)
    read = gpu_check.CheckRecord.read
    assert read(tmp_path, Machine(device="cpu", gpus=0)).is_done("gemm")
    assert not read(tmp_path, Machine(device="NVIDIA H200", gpus=1)).is_done("gemm")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "accelerate" else object())
    refused = gpu_check._refuse(CHECKS["run"], Machine(device="x", gpus=1), 1e9)
    assert refused == {"state": "skipped", "reason": "needs accelerate: run `pip install accelerate`"}
    assert gpu_check._refuse(CHECKS["gemm"], Machine(device="x", gpus=1), 1e9) is None


def test_a_gpu_that_torch_cannot_use_is_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "find_unused_gpu", lambda: "there is a GPU")
    with pytest.raises(NotAsExpected, match="there is a GPU") as failed:
        gpu_kernels.check_machine(Bench(device="cpu", folder=Path()))
    assert "versions" in failed.value.found.values


def test_borders_that_fill_up_reach_the_kernel_where_their_cost_is_measured() -> None:
    bench = Bench(device="cpu", folder=Path())
    real = gpu_kernels._segments(bench, rows=2, length=64, mean=20.0)
    borders = gpu_kernels.filled(torch.unique(real.cu_seqlens_cpu), 40)
    segments, backend = gpu_kernels.with_borders(real, borders), ATTENTION["flash_attn_varlen"]
    (launch,) = gpu_kernels.prepare_all_borders(backend, segments).launches
    assert (len(launch[0]), launch[1]) == (40, 2 * 64)
    assert len(backend.prepare(segments).launches[0][0]) < 40, "a run leaves them out"


def test_the_table_is_complete() -> None:
    modules = {"gpu_kernels", "gpu_steps", "gpu_runs"}
    for name, known in CHECKS.items():
        module, function = known.function.split(":")
        source = (ROOT / "neobert" / "benchmark" / "gpu" / f"{module}.py").read_text()
        assert module in modules
        assert f"def {function}(bench: Bench) -> Found:" in source, name
    assert sum(known.minutes for known in CHECKS.values()) > 9, "the order decides what is left out"


def test_what_is_wrong_leaves_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(bench: Bench) -> Found:
        found = Found()
        found.add("a product", "3 ms", name="a product", ms=3)
        raise NotAsExpected("too slow", found)

    monkeypatch.setattr(gpu_kernels, "check_products", check)
    assert gpu_worker.answer("gemm", "cpu") == {
        "state": "failed",
        "reason": "NotAsExpected: too slow",
        "lines": ["a product: 3 ms"],
        "values": {"a product": {"name": "a product", "ms": 3}},
    }


class _Built(Exception):
    pass


@pytest.mark.parametrize("name", ["run", "equality", "micro_batch", "profiler", "muonclip", "two_gpus"])
def test_the_config_of_a_run_on_a_gpu_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dry run does not use."""

    def stop(config: Config) -> None:
        assert config.trainer.torch_compile
        assert not config.trainer.use_cpu
        assert config.trainer.torch_compile_backend == "inductor"
        raise _Built

    monkeypatch.setattr(gpu_runs, "_train", stop)
    with pytest.raises(_Built):
        getattr(gpu_runs, f"check_{name}")(Bench(device="cuda", folder=tmp_path))


@pytest.mark.parametrize("contexts", [([0], [1]), ([0], [0, 1])])
def test_each_of_two_processes_has_one_gpu(
    contexts: tuple[list[int], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the processes of two GPUs leave is made up here: the losses of the resumed run, and where they computed."""
    made: list[Path] = []

    def train(config: Config) -> None:
        made.append(Path(config.trainer.output_dir))
        (made[-1] / "checkpoints" / "8").mkdir(parents=True)
        (made[-1] / "log.jsonl").write_text(json.dumps({"kind": "step", "loss": 3.0}) + "\n")

    def start(command: list[str], *, seconds: float) -> None:
        folder = made[-1].parent
        assert command[-3:] == ["neobert.benchmark.gpu.gpu_rank", str(folder / "two.yaml"), str(folder)]
        for rank, used in enumerate(contexts):
            with monkeypatch.context() as patch:
                patch.setenv("RANK", str(rank))
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.cuda, "device_count", lambda: 2)
                patch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda n, used=used: n in used, raising=False)
                patch.setattr(gpu_rank, "pretrain", lambda config: None)
                gpu_rank.main(*command[-2:])

    monkeypatch.setattr(gpu_runs, "_train", train)
    monkeypatch.setattr(gpu_runs, "_run_quietly", start)
    bench = Bench(device="cuda", folder=tmp_path)
    if contexts == ([0], [1]):
        values = gpu_runs.check_two_gpus(bench).values
        assert [value["difference"] for value in values.values()] == [0, 0]
    else:
        with pytest.raises(NotAsExpected, match=r"GPUs by process: \[\[0\], \[0, 1\]\]"):
            gpu_runs.check_two_gpus(bench)
