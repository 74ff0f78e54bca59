"""A name stands for one thing: no class and no module of the package is called like another."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "neobert"


def named_twice(files: Iterable[Path]) -> dict[str, list[str]]:
    """Every name that several classes or several modules have, with where they are."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files:
        if path.stem != "__init__":
            found["module", path.stem].append(str(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found["class", node.name].append(f"{path}:{node.lineno}")
    return {name: places for (_, name), places in found.items() if len(places) > 1}


def test_no_class_and_no_module_is_called_like_another() -> None:
    found = named_twice(sorted(PACKAGE.rglob("*.py")))
    assert found == {}


def test_the_check_sees_a_name_that_occurs_twice(tmp_path: Path) -> None:
    def write() -> Iterator[Path]:
        for name in ("a/__init__", "a/same", "b/__init__", "b/same", "b/other"):
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text("class Same: ..." if "same" in name else "class Other: ..." if "other" in name else "")
            yield path

    assert set(named_twice(write())) == {"same", "Same"}
