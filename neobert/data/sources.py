"""From `dataset.*` to the splits of a source, and from a split to its documents.

| the source is | split names | its documents |
|---|---|---|
| `python_stdlib` | train | `StdlibSource` |
| a folder of `save_to_disk` | train, or its own | `TokenStore` where there are input_ids, else `ArrowTexts` |
| files in a folder, one file, a glob | by their names | `JsonlSource`, or `HubSource` for Parquet |
| a hub name | the hub's | `HubSource` |
"""

import glob
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from neobert.data.arrow import ArrowTexts, TokenStore, column_names
from neobert.data.errors import DataError
from neobert.data.hub import HubSource, list_hub_splits, open_hub, open_parquet
from neobert.data.jsonl import JsonlSource
from neobert.data.spec import PYTHON_STDLIB, SourceSpec
from neobert.data.splits import split_of_name
from neobert.data.stdlib import StdlibSource
from neobert.data.tokenizer import Tokenizer

StreamedText = JsonlSource | HubSource | ArrowTexts
"""Text that lanes can read in place."""

Documents = TokenStore | StdlibSource | StreamedText

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "manifest.json"}

OpenSplit = Callable[[Tokenizer | None], Documents]
"""Opens one split; only data that is tokenised already needs the tokenizer."""


def list_splits(spec: SourceSpec) -> Mapping[str, OpenSplit]:
    """The splits of a source.

    Raises:
        DataError: there is no such source, or it is of a kind that is not read.
    """
    if spec.path:
        return _local_splits(spec, Path(spec.path[0]).expanduser())
    if spec.name == PYTHON_STDLIB:
        return {"train": lambda _: StdlibSource()}
    return {split: partial(_open_hub, spec, split) for split in list_hub_splits(spec)}


def _open_hub(spec: SourceSpec, split: str, _: Tokenizer | None) -> Documents:
    return open_hub(spec, split)


def _local_splits(spec: SourceSpec, path: Path) -> Mapping[str, OpenSplit]:
    if (path / "dataset_dict.json").is_file():
        names: list[str] = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return {name: partial(_open_saved, spec, path / name) for name in names}
    if (path / "state.json").is_file():
        return {"train": partial(_open_saved, spec, path)}
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.is_file() and p.name not in _NOT_DATA]
    else:
        root, found = path.parent, [Path(p) for p in glob.glob(str(path), recursive=True)]
    found = [p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)]
    files = [p for p in found if p.name.endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)]
    if not files:
        raise DataError(
            f"dataset.path: {spec.label} "
            + ("does not exist" if not found and not path.exists() else "has no file that can be read")
            + f"; give a folder of save_to_disk, or files ending in {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}"
        )
    return {name: partial(_open_files, spec, paths) for name, paths in _group_files(files, root).items()}


def _group_files(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their name, or a folder above it, begins with; files that name none are train, and so is
    a single file whatever its name."""
    if len(files) == 1:
        return {"train": files}
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        named = (split for part in path.relative_to(root).parts if (split := split_of_name(part)))
        groups.setdefault(next(named, "train"), []).append(path)
    return groups


def _open_saved(spec: SourceSpec, folder: Path, tokenizer: Tokenizer | None) -> Documents:
    if "input_ids" not in column_names(folder):
        return ArrowTexts(folder, spec.text_column)
    if tokenizer is None:
        raise DataError(f"{folder} is tokenised already; a tokenizer is trained on text")
    return TokenStore(folder, tokenizer)


def _open_files(spec: SourceSpec, paths: list[Path], _: Tokenizer | None) -> Documents:
    parquet = [path for path in paths if path.name.endswith(PARQUET_SUFFIXES)]
    if parquet and len(parquet) < len(paths):
        raise DataError(
            f"dataset.path: {spec.label} mixes Parquet and JSON files in one split; keep one kind, for example with "
            "dataset.path: folder/*.parquet"
        )
    return open_parquet(paths, spec) if parquet else JsonlSource(paths, spec.text_column)
