"""Sets that several machines prepare in parts: the bytes of one machine, whoever finishes last."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neobert.config.load import parse_config
from neobert.config.schema import Config
from neobert.contrastive.prepare_sets import prepare
from neobert.contrastive.set_parts import prepare_part
from neobert.disk import locked
from neobert.errors import DataError

COUNT = 3


def write_files(folder: Path, label: str) -> None:
    """Five files of different sizes; classes in another order in each."""
    folder.mkdir()
    for number in range(5):
        rows = [{"text": f"{label} {number} {n}", "label": f"class {(n * 7 + number) % 4}"} for n in range(9 - number)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Config]:
    """A config of two folders of files, and of two single ones, which are not cut; `build(where, ...)`."""
    for name in ("first", "second"):
        write_files(tmp_path / name, name)
    names = [tmp_path / "first", tmp_path / "one.jsonl", tmp_path / "second", tmp_path / "two.jsonl"]
    for path in (names[1], names[3]):
        path.write_text(json.dumps({"anchor": path.stem, "positive": "p", "negatives": ["x", "y"]}) + "\n")
    sets = ", ".join(f"{{name: {name}}}" for name in names)

    def config(where: str, *more: str) -> Config:
        base = ["task=contrastive", f"dataset.path={tmp_path / where}", f"contrastive.sets=[{sets}]", *more]
        base += ["trainer.max_steps=1", "contrastive.allow_random_weights=true", "tokenizer.path=t"]
        return parse_config("", base)

    return config


def read_all(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_parts_make_the_sets_of_one_machine(build: Callable[..., Config], tmp_path: Path) -> None:
    prepare(build("one-machine"))
    config = build("three")
    notes = {number: [item.note for item in prepare_part(config, (number, COUNT))] for number in (2, 0, 1)}
    waiting = "part 3 of 3; the machine that finishes last joins them"
    assert notes[2] == [waiting, "left to --shard 1/3, as a whole", waiting, "left to --shard 2/3, as a whole"]
    assert notes[1] == ["joined from 3 parts", "there already", "joined from 3 parts", "written"]
    assert read_all(tmp_path / "three") == read_all(tmp_path / "one-machine")
    again = prepare_part(config, (2, COUNT))
    assert [item.note for item in again] == ["there already"] * 4


def test_a_part_that_is_there_is_kept(build: Callable[..., Config], tmp_path: Path) -> None:
    config = build("sets")
    prepare_part(config, (0, COUNT))
    part = tmp_path / "sets" / "all" / ".parts" / "first" / "part-00001-of-00003" / "set.json"
    written = part.stat().st_mtime_ns
    prepare_part(config, (0, COUNT))
    assert part.stat().st_mtime_ns == written


def test_only_one_machine_joins(build: Callable[..., Config], tmp_path: Path) -> None:
    config = build("sets")
    for number in (0, 1):
        prepare_part(config, (number, COUNT))
    with locked(tmp_path / "sets" / "all" / ".parts" / "first"):
        assert prepare_part(config, (2, COUNT))[0].note.startswith("part 3 of 3")
    assert prepare_part(config, (2, COUNT))[0].note == "joined from 3 parts", "after the other one was killed"


@pytest.mark.parametrize(
    ("part", "more", "message"),
    [
        ((1, 2), [], r"holds part-00001-of-00003, but --shard is set for 2 parts"),
        ((1, 3), ["dataset.force_redownload=true"], r"dataset.force_redownload: true prepares all sets at once"),
    ],
)
def test_what_does_not_go_together_is_refused(
    build: Callable[..., Config], part: tuple[int, int], more: list[str], message: str
) -> None:
    prepare_part(build("sets"), (0, COUNT))
    with pytest.raises(DataError, match=message):
        prepare_part(build("sets", *more), part)
