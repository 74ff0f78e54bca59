"""How many threads compute, and how they wait: chosen before torch is imported, only where the user chose nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neobert import host


def make_system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("5:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("5:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("7:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000"}, 8),
    ],
)
def test_cpus_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(host, "affine_cpus", lambda: 8)
    assert host.available_cpus(make_system(tmp_path, cgroup, files)) == expected


@pytest.mark.parametrize(
    ("found", "available", "changes"),
    [
        ({}, 8, {"GOMP_SPINCOUNT": str(host.SPIN_COUNT)}),
        ({}, 3, {"GOMP_SPINCOUNT": str(host.SPIN_COUNT), "OMP_NUM_THREADS": "3"}),
        ({"OMP_NUM_THREADS": "6"}, 3, {"GOMP_SPINCOUNT": str(host.SPIN_COUNT)}),
        ({"OMP_WAIT_POLICY": "active"}, 8, {}),
        ({"GOMP_SPINCOUNT": "7"}, 8, {}),
    ],
)
def test_only_what_the_user_left_open_is_chosen(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], available: int, changes: dict[str, str]
) -> None:
    monkeypatch.setattr(host, "affine_cpus", lambda: 8)
    monkeypatch.setattr(host, "available_cpus", lambda: available)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = dict(found)
    host.prepare_threads(environment)
    assert environment == found | changes
    monkeypatch.setitem(sys.modules, "torch", None)
    environment = dict(found)
    host.prepare_threads(environment)
    assert environment == found, "torch has read its environment already"


def test_commands_and_python_choose_before_torch_is_there() -> None:
    code = (
        "import os, sys, neobert; assert 'torch' not in sys.modules; neobert.load_config; import torch; "
        "from neobert.host import describe_waiting; print(torch.get_num_threads(), describe_waiting())"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"1 GOMP_SPINCOUNT={host.SPIN_COUNT}"
