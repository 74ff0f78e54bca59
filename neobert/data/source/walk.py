"""Local files below a folder or of a pattern: links are followed, circles of links are not, and nothing is dropped
without a reason."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from neobert.errors import DataError

_RECURSIVE = "**"
_NO_STATUS = os.stat_result([0] * 10)


class FoundPath(NamedTuple):
    """A regular file."""

    path: str
    below: tuple[str, ...]
    """Names of the folders and of the file below the path that was listed."""

    stat: os.stat_result
    real: str
    """Its path without links: two links to one file have the same."""

    linked: bool
    """Whether a link below the path led to it."""


class LeftOut(NamedTuple):
    """Something that was found and is not read."""

    url: str
    reason: str
    is_fault: bool = False
    """Whether data is missing, not only unused."""


@dataclass(kw_only=True, slots=True)
class Walk:
    """Everything below a path."""

    files: list[FoundPath] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    linked: dict[str, str] = field(default_factory=dict)
    """Folders that a link led to, each with that link: they are read by one link only."""


class _Folder(NamedTuple):
    path: str
    below: tuple[str, ...]
    real: str
    above: frozenset[str]
    """The folders it is in, and itself, without links."""

    linked: bool = False


def walk(url: str) -> Walk:
    """The files of a path: itself, all below a folder, or all that a pattern matches and all below that.

    Names that start with a dot or an underscore are left out, unless the path names them.

    Raises:
        DataError: a folder cannot be listed.
    """
    found, path = Walk(), Path(url).expanduser()
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        if path.is_dir():
            _walk(_top(path), found)
        elif os.path.lexists(path):
            _add(FoundPath(str(path), (path.name,), _NO_STATUS, os.path.realpath(path), path.is_symlink()), found)
    else:
        first = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
        _match(_top(Path(*path.parts[:first])), path.parts[first:], found, set())
    found.files.sort(key=lambda item: item.below)
    found.left_out[:] = dict.fromkeys(found.left_out)  # A pattern may reach one path in several ways.
    return found


def covers(url: str, file: str) -> bool:
    """Whether `walk(url)` lists a file `file` (absolute, without links), links below the path of `url` aside.

    >>> covers("/data", "/data/a/b.txt"), covers("/data/*.csv", "/data/b.txt"), covers("/data", "/data/.git/b.txt")
    (True, False, False)
    """
    path = Path(url).expanduser()
    magic = (number for number, part in enumerate(path.parts) if glob.has_magic(part))
    first = len(path.parts) if os.path.lexists(path) else next(magic, len(path.parts))
    top = Path(os.path.realpath(Path(*path.parts[:first])))
    return Path(file).is_relative_to(top) and _covers(Path(file).relative_to(top).parts, path.parts[first:])


def _covers(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not parts:
        return not any(map(is_hidden, names))
    if parts[0] == _RECURSIVE:
        deeper = bool(names) and not is_hidden(names[0]) and _covers(names[1:], parts)
        return deeper or _covers(names, parts[1:])
    if not names or not _fits(names[0], parts[0]) or (is_hidden(names[0]) and glob.has_magic(parts[0])):
        return False
    return _covers(names[1:], parts[1:])


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out."""
    return name.startswith((".", "_"))


def _top(path: Path) -> _Folder:
    real = os.path.realpath(path)
    return _Folder(str(path), (), real, frozenset([real]))


def _walk(folder: _Folder, found: Walk) -> None:
    for entry in _entries(folder):
        if not is_hidden(entry.name):
            _visit(folder, entry, found)
        elif entry.name.startswith("_"):
            found.left_out.append(LeftOut(_join(folder, entry), "its name starts with an underscore"))


def _visit(folder: _Folder, entry: "os.DirEntry[str]", found: Walk) -> None:
    if not _is_folder(entry):
        below, linked = (*folder.below, entry.name), folder.linked or entry.is_symlink()
        _add(FoundPath(_join(folder, entry), below, _NO_STATUS, _real(folder, entry), linked), found)
    elif (inner := _enter(folder, entry, found)) is not None:
        _walk(inner, found)


def _enter(folder: _Folder, entry: "os.DirEntry[str]", found: Walk) -> _Folder | None:
    """A folder in a folder; None where a link leads back, or to what another link led to."""
    path, real = _join(folder, entry), _real(folder, entry)
    if entry.is_symlink():
        if real in folder.above or folder.real.startswith(real.rstrip(os.sep) + os.sep):
            found.left_out.append(LeftOut(path, "is a link back to a folder that it is in"))
            return None
        if (other := found.linked.setdefault(real, path)) != path:
            found.left_out.append(LeftOut(path, f"is a link to the folder that {other} leads to"))
            return None
    return _Folder(path, (*folder.below, entry.name), real, folder.above | {real}, folder.linked or entry.is_symlink())


def _join(folder: _Folder, entry: "os.DirEntry[str]") -> str:
    return entry.name if folder.path == "." else os.path.join(folder.path, entry.name)


def _real(folder: _Folder, entry: "os.DirEntry[str]") -> str:
    return os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(folder.real, entry.name)


def _add(item: FoundPath, found: Walk) -> None:
    """Adds what is no folder."""
    try:
        status = os.stat(item.path)
    except OSError as error:
        target = f"is a link to {os.readlink(item.path)}, which " if os.path.islink(item.path) else ""
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        found.left_out.append(LeftOut(item.path, target + reason, is_fault=True))
        return
    if stat.S_ISREG(status.st_mode):
        found.files.append(item._replace(stat=status))
    else:
        found.left_out.append(LeftOut(item.path, "is no regular file"))


def _match(folder: _Folder, parts: tuple[str, ...], found: Walk, done: set[tuple[str, tuple[str, ...]]]) -> None:
    """Adds what the parts of a pattern match below a folder, each once."""
    if (folder.path, parts) in done:
        return
    done.add((folder.path, parts))
    part, rest = parts[0], parts[1:]
    if part == _RECURSIVE:
        if not rest:
            _walk(folder, found)
            return
        _match(folder, rest, found, done)
    for entry in _entries(folder):
        if part == _RECURSIVE:
            matches = _is_folder(entry) and not is_hidden(entry.name)
        else:
            matches = _fits(entry.name, part)
        if not matches or (is_hidden(entry.name) and glob.has_magic(part)):
            continue
        if part != _RECURSIVE and not rest:
            if (entry.path, ()) not in done:
                done.add((entry.path, ()))
                _visit(folder, entry, found)
        elif _is_folder(entry) and (inner := _enter(folder, entry, found)) is not None:
            _match(inner, parts if part == _RECURSIVE else rest, found, done)


def _fits(name: str, part: str) -> bool:
    return fnmatch.fnmatchcase(name, part) if glob.has_magic(part) else name == part


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link in a circle of links: `_add` says so.


def _entries(folder: _Folder) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder.path) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(
            f"dataset.path: {folder.path} cannot be listed ({error.strerror}); allow that, or name other folders"
        ) from error
