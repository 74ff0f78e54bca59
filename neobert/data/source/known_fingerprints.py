"""Fingerprints of many files, kept between starts: 16 blocks of each of 100,000 files are minutes of seeking on a disk
that does not have them in memory, and nothing has changed since the last start.

Kept is one fingerprint for a listing: for every file its path, size, times of change and inode. The inode's own time
(ctime) cannot be set back, so an edit that keeps size and date, or another file of the same name and date, is noticed.
A file that changed in the last minute may change again without another time, so such a listing is not kept. Nor is one
of few files, which costs nothing, of remote files, whose stamps are not read, or of files of which some are skipped.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from neobert.disk import cache_folder, write_text

FEWEST_FILES = 1000
SETTLED_SECONDS = 60
MOST_LISTINGS = 50
"""Kept; the oldest are removed."""

_FORM = "1 sha256 of 16 blocks of 4096 bytes"


def recall(paths: Sequence[str], find: Callable[[], str]) -> str:
    """The fingerprint of local files: the one that is kept of exactly these, else what `find` finds, which is kept."""
    record = _record_of(paths) if len(paths) >= FEWEST_FILES else None
    if record is None:
        return find()
    try:
        text = record.read_text()
    except (OSError, ValueError):  # Damaged, it may be no text.
        text = ""
    if text.startswith("sha256:") and text.endswith("\n"):
        return text.rstrip("\n")
    found = find()
    _keep(record, found)
    return found


def _record_of(paths: Sequence[str]) -> Path | None:
    """Where the fingerprint of these files is kept; None where it is not to be."""
    folder, digest, newest = cache_folder("fingerprints"), hashlib.sha256(_FORM.encode()), 0
    if folder is None:
        return None
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:  # Reading it says what is wrong.
            return None
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        facts = f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    is_settled = newest < time.time_ns() - SETTLED_SECONDS * 10**9
    return folder / f"{digest.hexdigest()[:32]}.txt" if is_settled else None


def _keep(record: Path, found: str) -> None:
    """Writes a fingerprint down; a cache folder that cannot be written costs the next start a reading."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, f"{found}\n")
        kept = sorted(record.parent.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-MOST_LISTINGS]:
            old.unlink(missing_ok=True)
    except OSError:
        return
