"""A name means one thing: no class and no module is called like another. Words that are no terms stay out."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "neobert"

WORDS = re.compile(
    r"passed over|\banew\b|for ever\b|for good\b|dearest|obstacle|\bmend(s|ed|ing)?\b|\btold\b|\bwish(es|ed)?\b"
    r"|\bfigures?\b|\bsettle[sd]?\b|\bshares? out\b|in the place of|what stands|as (it|they) stands?\b|has no place in",
    re.IGNORECASE,
)
"""Of the list in docs/architecture.md: what has no other use in code and pages."""


def named_twice(files: Iterable[Path]) -> dict[str, list[str]]:
    """Every name that several classes or several modules have, with where they are."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files:
        if path.stem != "__init__":
            found["module", path.stem].append(str(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found["class", node.name].append(f"{path}:{node.lineno}")
    return {name: found_at for (_, name), found_at in found.items() if len(found_at) > 1}


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


def find_words(pages: Iterable[Path]) -> list[str]:
    """Lines with one of the words; the list itself is left out."""
    found = []
    for path in pages:
        text = re.sub(r"^## Words\n.*?(?=^## |\Z)", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [f"{path}: {line.strip()}" for line in text.splitlines() if WORDS.search(line)]
    return found


def test_pages_and_code_use_the_terms_of_the_list(tmp_path: Path) -> None:
    pages = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]
    assert len(pages) > 200
    assert find_words(pages) == []

    page = tmp_path / "page.md"
    page.write_text(
        "A record is passed over.\n## Words\n| fix | mend |\n## Next\nThe figures settle.\nMetrics are read.\n"
    )
    assert find_words([page]) == [f"{page}: A record is passed over.", f"{page}: The figures settle."]
