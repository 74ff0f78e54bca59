"""Which packages are installed, against what this one needs. Nothing of them is needed to ask."""

import importlib
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_MODULES = {"pyyaml": "yaml"}
"""Packages whose module has another name."""


def read_requirements(project: Path = _PROJECT) -> dict[str, str]:
    """Package -> versions that work (`>=2.11,<2.14`), without those of extras.

    They are in pyproject.toml where the package runs from its folder, else in what was installed.
    """
    known = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}) if project.is_file() else {}
    if known.get("name") == "neobert":
        lines: list[str] = known["dependencies"]
    else:
        lines = [line for line in requires("neobert") or () if "extra ==" not in line]
    split = (re.fullmatch(r"([\w.-]+)\s*(.*)", line.partition(";")[0].strip()) for line in lines)
    return {found[1]: found[2] for found in split if found is not None}


def find_package_problems(requirements: dict[str, str]) -> list[str]:
    """Why a package cannot be used, one sentence each, with the remedy; each that is there is imported."""
    return [problem for name, bounds in requirements.items() if (problem := _find_problem(name, bounds)) is not None]


def _find_problem(name: str, bounds: str) -> str | None:
    remedy = f"run `pip install '{name}{bounds}'`"
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"the package {name} is not installed; {remedy}"
    if not is_within(found, bounds):
        return f"{name} {found} is installed, and {name}{bounds} is needed; {remedy}"
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # A library that is missing, another numpy, a CPU without its instructions: any kind.
        reason = next(iter(str(error).strip().splitlines()), "no message")
        return (
            f"{name} {found} is installed and cannot be imported ({type(error).__name__}: {reason}); run `pip install "
            f"--force-reinstall '{name}{bounds}'`"
        )
    return None


def is_within(found: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `>=2.11,<2.14`; what follows its numbers does not count."""
    number = _numbers(found)
    limits = re.findall(r"(>=|<)\s*([\d.]+)", bounds)
    return all(number >= _numbers(bound) if sign == ">=" else number < _numbers(bound) for sign, bound in limits)


def _numbers(text: str) -> list[int]:
    """Of `2.11.0+cpu`: 2 and 11. Zeros at the end say nothing."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in re.sub(r"(\.0+)+$", "", leading[0]).split(".")] if leading is not None else []
