"""docs/extending.md: its diffs apply to the package, their sizes are those of its table, and what they add works."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import pytest

from neobert.config.fields import FIELDS
from neobert.config.schema_data import FILLS_MASKS, PREDICTS_TOKENS
from neobert.data.source.files import FORMATS
from neobert.key import Condition
from neobert.model.attention import ATTENTION
from neobert.objectives.masking import UNITS
from neobert.objectives.table import OBJECTIVES
from neobert.optim.optimizers import OPTIMIZERS
from neobert.optim.schedule import COOLDOWNS, SCHEDULES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PRETRAINING = {name: objective for name, objective in OBJECTIVES.items() if objective.task == "pretraining"}


class Hunk(NamedTuple):
    """A change of one file: the lines that it finds, and those that it leaves."""

    path: str
    before: str
    after: str
    added: int
    is_new: bool


def read_walks(page: str) -> dict[str, list[Hunk]]:
    """The hunks of every section that has a diff, by its title."""
    sections = (re.split(r"\n", section, maxsplit=1) for section in re.split(r"(?m)^## ", page)[1:])
    found = {title: re.findall(r"(?ms)^```diff\n(.*?)^```", text) for title, text in sections}
    return {title: list(read_hunks(*diffs)) for title, diffs in found.items() if diffs}


def read_hunks(diff: str) -> Iterator[Hunk]:
    """The hunks of a unified diff, whose counts must be right for `git apply` and `patch -p1`."""
    for part in re.split(r"(?m)^(?=--- )", diff)[1:]:
        head, *hunks = re.split(r"(?m)^(?=@@ )", part)
        old, new = re.fullmatch(r"--- (\S+)\n\+\+\+ b/(\S+)\n", head).groups()
        assert old in ("/dev/null", f"a/{new}")
        for hunk in hunks:
            first, *lines = hunk.splitlines(keepends=True)
            lines = [" \n" if line == "\n" else line for line in lines]  # Pages have no blanks at the end of a line.
            before = [line[1:] for line in lines if line[0] in " -"]
            after = [line[1:] for line in lines if line[0] in " +"]
            counts = re.match(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", first).groups()
            assert counts == (str(len(before)), str(len(after))), first
            added = sum(line[0] == "+" for line in lines)
            yield Hunk(new, "".join(before), "".join(after), added, old == "/dev/null")


def apply(hunk: Hunk, root: Path) -> None:
    """Makes the change; its lines must be there exactly once, wherever they have moved to."""
    path = root / hunk.path
    if hunk.is_new:
        assert not path.exists(), f"{hunk.path} exists"
        path.write_text(hunk.after, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    assert text.count(hunk.before) == 1, f"docs/extending.md: {hunk.path} does not have, once:\n{hunk.before}"
    path.write_text(text.replace(hunk.before, hunk.after), encoding="utf-8")


WALKS = read_walks(PAGE)


def test_the_table_has_the_sizes_of_the_diffs() -> None:
    rows = re.findall(r"(?m)^\| \[(.*?)\]\(#(.*?)\) \| (.*?) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE)
    expected = []
    for title, hunks in WALKS.items():
        new = [hunk for hunk in hunks if hunk.is_new]
        changed = [hunk for hunk in hunks if not hunk.is_new]
        names = ", ".join(f"`{hunk.path.removeprefix('neobert/')}`" for hunk in new) or "none"
        sizes = (sum(h.added for h in new), len({h.path for h in changed}), sum(h.added for h in changed))
        expected.append((title, title.lower().replace(" ", "-"), names, *map(str, sizes)))
    assert len(WALKS) == 6
    assert rows == expected


def test_what_the_walks_add_works(tmp_path: Path) -> None:
    """One process for all: importing torch takes longer than any of them."""
    shutil.copytree(ROOT / "neobert", tmp_path / "neobert", ignore=shutil.ignore_patterns("__pycache__"))
    for hunks in WALKS.values():
        for hunk in hunks:
            apply(hunk, tmp_path)
    paths = [str(tmp_path), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "extended.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "failures.json").read_text())
    assert result["source"] == str(tmp_path / "neobert" / "__init__.py")
    assert not result["failures"], "\n".join(result["failures"].values())


def test_a_diff_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    hunks = WALKS["A data format"]
    (tmp_path / "neobert" / "data" / "source").mkdir(parents=True)
    (tmp_path / "neobert" / "data" / "source" / "files.py").write_text("FORMATS = {}\n")
    apply(next(hunk for hunk in hunks if hunk.is_new), tmp_path)
    with pytest.raises(AssertionError, match=r"files\.py does not have"):
        apply(next(hunk for hunk in hunks if not hunk.is_new), tmp_path)


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("model.attn_backend", {"auto", *ATTENTION}),
        ("optimizer.name", OPTIMIZERS),
        ("scheduler.name", SCHEDULES),
        ("scheduler.cooldown_shape", COOLDOWNS),
        ("datacollator.mask_units", UNITS),
        ("trainer.objective", PRETRAINING),
    ],
)
def test_the_choices_of_a_key_are_the_entries_of_its_table(key: str, table: set[str]) -> None:
    assert set(FIELDS[key].choices) == set(table)


def test_keys_of_tokens_and_of_masks_name_the_objectives_that_have_them() -> None:
    for text, flag in ((PREDICTS_TOKENS, "predicts_tokens"), (FILLS_MASKS, "fills_masks")):
        ((name, values),) = Condition.parse(text).alternatives
        assert name == "trainer.objective"
        assert set(values) == {name for name, objective in PRETRAINING.items() if getattr(objective, flag)}


def test_the_openers_of_all_formats_are_there() -> None:
    assert all(callable(resolve_name(found.opener)) for found in FORMATS.values())
