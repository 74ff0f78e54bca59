"""The import direction of the packages, and what must run without the training stack."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "neobert"
HOUSE = ROOT / "docs" / "images" / "house.svg"
LAYERS = [
    {"secrets", "host", "correlation", "terminal"},
    {"errors", "key"},
    {"model", "kernels"},
    {"config"},
    {"types", "splitmix", "cli", "disk"},
    {"data", "objectives", "optim", "testing"},
    {"weights"},
    {"inference"},
    {"train"},
    {"contrastive", "finetune", "export", "benchmark"},
    {"glue"},
    {"commands"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BARE = [
    "types",
    "config.schema",
    "model.encoder",
    "kernels.linear_cross_entropy",
    "objectives.table",
    "optim.optimizers",
    "optim.schedule",
    "benchmark.step_time",
    "benchmark.profile_analysis",
    "commands.benchmark_commands",
    "benchmark.loss_kernels",
    "benchmark.gpu.gpu_worker",
    "benchmark.gpu.gpu_kernels",
    "benchmark.gpu.gpu_steps",
    "benchmark.ledger",
    "commands.machine_commands",
]
STACK = ["omegaconf", "datasets", "accelerate", "transformers", "pyarrow", "rich"]


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports at run time (imports for type checkers only do not count)."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("neobert"):
            names.update([node.module] if node.module != "neobert" else [f"neobert.{a.name}" for a in node.names])
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name.startswith("neobert."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name.split(".")[1] for name in names if "." in name}


def violations(files: list[Path]) -> list[str]:
    found = []
    for path in files:
        here = room(path)
        if here in ("__init__", "__main__"):  # The package itself, above all others.
            continue
        for there in imported_rooms(path):
            allowed = there == here or LEVEL[there] < LEVEL[here]
            if not allowed:
                found.append(f"{path.relative_to(ROOT)} imports {there}")
    return found


def test_no_package_imports_upwards_or_sideways() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    assert violations(files) == []


def test_the_documented_order_is_the_one_that_is_checked() -> None:
    line = next(x for x in (ROOT / "docs" / "architecture.md").read_text().splitlines() if x.endswith(" < scripts"))
    documented = [set(re.findall(r"\w+", names)) for names in line.split("<")[:-1]]
    rooms = {room(path) for path in PACKAGE.rglob("*.py")}
    assert documented == [names & rooms - {"testing"} for names in LAYERS]


def test_the_picture_of_the_house_has_the_floors_that_are_checked() -> None:
    texts = re.findall(r'<text x="[^"]*" y="([^"]*)".*font-weight="bold">(.*)</text>', HOUSE.read_text())
    floors = {y: {name for y2, names in texts if y2 == y for name in names.split(", ")} for y, _ in texts}
    from_the_ground = [floors[y] for y in sorted(floors, key=float, reverse=True)]
    assert from_the_ground == LAYERS


def test_the_check_sees_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "model" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("from neobert.train.loop import pretrain\nfrom neobert import cli\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert sorted(violations([bad])) == ["model/bad.py imports cli", "model/bad.py imports train"]


def test_the_step_runs_without_the_training_stack() -> None:
    """A bare GPU machine has torch and numpy: the model, the loss and the optimizer must import there."""
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in STACK)
    imports = "\n".join(f"import neobert.{name}" for name in [*BARE, "train.step"])
    code = f"import sys\n{block}\n{imports}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
