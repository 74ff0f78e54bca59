"""The lowest versions: each dependency has one, and the script that installs them reads it where it is declared."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from neobert.train.hardware.compile_check import KNOWN_RIGHT

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "floor_requirements.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_floor(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(root / ".ci" / SCRIPT.name)], capture_output=True, text=True)


def test_every_dependency_has_a_floor() -> None:
    lines = read_floor(ROOT).stdout.splitlines()
    assert {"torch==2.11", "numpy==2", "tokenizers==0.23.1", "pytest==8", "pytest-xdist==3.6.1"} <= set(lines)
    with_floor = sum(">=" in requirement for requirement in PROJECT["optional-dependencies"]["dev"])
    assert len(lines) == len(PROJECT["dependencies"]) + with_floor


@pytest.mark.parametrize("requirement", ["new-package", "new-package<3", "new-package>2"])
def test_a_dependency_without_a_floor_is_an_error(requirement: str, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / SCRIPT.name).write_text(SCRIPT.read_text())
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(
        text.replace("dependencies = [", f'dependencies = [\n    "{requirement}",', 1)
    )
    done = read_floor(tmp_path)
    assert done.returncode == 1
    assert f"pyproject.toml: '{requirement}' names no lowest version; write NAME>=VERSION" in done.stderr


def test_the_torch_that_is_recommended_is_allowed() -> None:
    (torch,) = (requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch"))
    low, high = (tuple(map(int, part.split(".")[:2])) for part in torch.removeprefix("torch>=").split(",<"))
    assert low <= tuple(map(int, KNOWN_RIGHT.split("."))) < high
