"""Fingerprints that are kept between starts, and every way in which files may have changed since."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neobert.data.source import files, known_fingerprints
from neobert.data.source.files import fingerprint_files, local_file

Read = Callable[[], tuple[str, int]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files that are old enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_fingerprints, "FEWEST_FILES", 4)
    monkeypatch.setattr(known_fingerprints.time, "time_ns", lambda: time.clock_gettime_ns(time.CLOCK_REALTIME) + 10**12)
    (tmp_path / "data").mkdir()
    for number in range(4):
        (tmp_path / "data" / f"{number}.jsonl").write_text(f"text {number}\n")
    return tmp_path / "data"


@pytest.fixture
def read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The fingerprint, and how often the files were read for it."""
    calls, real = [], files._read_fingerprint

    def counted(*arguments: object, **options: object) -> str:
        calls.append(1)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_read_fingerprint", counted)

    def fingerprint() -> tuple[str, int]:
        calls.clear()
        return fingerprint_files([local_file(path) for path in sorted(folder.iterdir())]), len(calls)

    return fingerprint


def edit_in_place(folder: Path) -> None:
    """With the size and the date of before."""
    path = folder / "2.jsonl"
    stat = path.stat()
    with path.open("r+") as file:
        file.write("TEXT")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_file(folder: Path) -> None:
    """By another inode of the same size and date."""
    path, stat = folder / "1.jsonl", (folder / "1.jsonl").stat()
    other = folder.parent / "other"
    other.write_text("text X\n")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def append(folder: Path) -> None:
    with (folder / "3.jsonl").open("a") as file:
        file.write("more\n")


def test_unchanged_files_are_not_read_again(read: Read) -> None:
    first, calls = read()
    assert calls == 1
    assert read() == (first, 0)


@pytest.mark.parametrize("change", [edit_in_place, replace_file, append])
def test_every_change_is_seen(read: Read, folder: Path, change: Callable[[Path], None]) -> None:
    first, _ = read()
    time.sleep(0.02)  # The clock of a file system ticks in milliseconds.
    change(folder)
    second, calls = read()
    assert calls == 1
    assert second != first


def test_files_of_the_last_minute_are_read_every_time(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        known_fingerprints.time, "time_ns", lambda: time.clock_gettime_ns(time.CLOCK_REALTIME) + 30 * 10**9
    )
    assert [read()[1] for _ in range(2)] == [1, 1]


def test_a_damaged_record_and_a_folder_that_cannot_be_written_cost_a_reading(
    read: Read, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = read()
    (record,) = (folder.parent / "cache" / "neobert" / "fingerprints").iterdir()
    record.write_text("sha256:cut off")
    assert read() == (first, 1)
    assert read() == (first, 0)
    (folder.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    assert [read() for _ in range(2)] == [(first, 1)] * 2


def test_the_number_of_kept_listings_is_bounded(read: Read, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_fingerprints, "MOST_LISTINGS", 2)
    for number in range(4, 8):
        (folder / f"{number}.jsonl").touch()
        read()
    assert len(list((folder.parent / "cache" / "neobert" / "fingerprints").iterdir())) == 2
