"""The configs that come with the package, found by name wherever it is installed."""

import difflib
from pathlib import Path

from neobert.errors import CallError

_FOLDER = Path(__file__).parents[1] / "configs"

SHIPPED: dict[str, Path] = {path.stem: path for path in sorted(_FOLDER.rglob("*.yaml"))}
"""Name -> file: training configs, plans of experiments and pipelines."""


def is_bare(file: Path) -> bool:
    """Whether `file` is a name without folder and ending, as those of shipped configs are."""
    return file.suffix == "" and len(file.parts) == 1


def find_file(file: Path) -> Path:
    """`file`, or the shipped one that a bare name means where there is no such file."""
    return SHIPPED.get(str(file), file) if is_bare(file) and not file.is_file() else file


def find_close(name: str) -> list[str]:
    """Names of shipped configs that are spelled like one that is not."""
    return difflib.get_close_matches(name, SHIPPED, 3)


def suggest(close: list[str]) -> str:
    """The end of a sentence about a name that no shipped config has."""
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f", nor a shipped config; {meant}`neobert config list` has their names"


def copy_shipped(name: str, destination: Path | None = None) -> Path:
    """Writes a copy of a shipped config to a file, or into a folder as `NAME.yaml`; by default into the current one.

    Raises:
        CallError: there is no such config, or a file at its destination.
    """
    if name not in SHIPPED:
        raise CallError(f"{name} is not a file{suggest(find_close(name))}")
    target = Path() if destination is None else destination
    target = target / f"{name}.yaml" if target.is_dir() else target
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(SHIPPED[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise CallError(f"{target} exists already; name another file, or remove it") from None
    except OSError as error:
        raise CallError(f"{target} cannot be written ({error.strerror}); name another file") from error
    return target
