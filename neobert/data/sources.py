"""From `dataset.*` to the splits of a source, and from a split to its documents.

| the source is | split names | its documents |
|---|---|---|
| `python_stdlib` | train | `StdlibSource` |
| a folder of `save_to_disk` | train, or its own | `TokenStore` where there are input_ids, else `ArrowTexts` |
| files, folders of them, patterns, local or remote | by their names | one of `FORMATS` |
| a hub name | the hub's | `HubSource` |
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from neobert.config.nesting import parse_json
from neobert.data.arrow import ArrowTexts, TokenStore, column_names
from neobert.data.delimited import open_delimited
from neobert.data.errors import DataError
from neobert.data.files import DataFile, FoundFile, is_remote, list_files
from neobert.data.hub import HubPin, HubSource, list_hub_splits, open_hub, pin_hub
from neobert.data.jsonl import open_jsonl
from neobert.data.lines import FileSource
from neobert.data.network import with_retries
from neobert.data.parquet import ParquetSource, open_parquet
from neobert.data.plain import open_text
from neobert.data.spec import PYTHON_STDLIB, SourceSpec
from neobert.data.splits import split_of_name
from neobert.data.stdlib import StdlibSource
from neobert.data.tokenizer import Tokenizer

StreamedText = FileSource | ParquetSource | HubSource | ArrowTexts
"""Text that lanes can read in place."""

Documents = TokenStore | StdlibSource | StreamedText

OpenSplit = Callable[[Tokenizer | None], Documents]
"""Opens one split; only data that is tokenised already needs the tokenizer."""

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "manifest.json"}
_DATASET_DICT = "dataset_dict.json"


def list_splits(spec: SourceSpec) -> Mapping[str, OpenSplit]:
    """The splits of a source.

    Raises:
        DataError: there is no such source, or it is of a kind that is not read.
    """
    if spec.path:
        return _splits_of_paths(spec)
    if spec.name == PYTHON_STDLIB:
        return {"train": lambda _: StdlibSource()}
    pin = pin_hub(spec)
    return {split: partial(_open_hub, pin, split) for split in list_hub_splits(pin)}


def _open_hub(pin: HubPin, split: str, _: Tokenizer | None) -> Documents:
    return open_hub(pin, split)


def _splits_of_paths(spec: SourceSpec) -> Mapping[str, OpenSplit]:
    folders = [folder for path in spec.path if not is_remote(path) and _is_saved(folder := Path(path).expanduser())]
    if folders and len(spec.path) > 1:
        raise DataError(
            f"dataset.path: {folders[0]} is a folder of save_to_disk and cannot be read together with other paths; "
            "name each in an entry of dataset.mixture"
        )
    if folders:
        return _splits_of_saved(spec, folders[0])
    found = [file for path in spec.path for file in _list_path(spec, path)]
    _check_folders(spec, found)
    files = [item for item in found if item.file.name not in _NOT_DATA and _format_of(item.file) is not None]
    if not files:
        endings = ", ".join(ending for _, endings, _ in FORMATS.values() for ending in endings)
        raise DataError(
            f"dataset.path: {spec.label} {'has no file that can be read' if found else 'does not exist'}; give a "
            f"folder of save_to_disk, or files ending in {endings} (text also compressed: .gz, .zst)"
        )
    urls = [item.file.url for item in files]
    if twice := next((url for url in urls if urls.count(url) > 1), None) if len(set(urls)) < len(urls) else None:
        raise DataError(f"dataset.path: {twice} is named twice; name every file once")
    return {name: partial(_open_files, spec, files) for name, files in _group_files(files).items()}


def _is_saved(folder: Path) -> bool:
    return (folder / _DATASET_DICT).is_file() or (folder / "state.json").is_file()


def _splits_of_saved(spec: SourceSpec, folder: Path) -> Mapping[str, OpenSplit]:
    if not (folder / _DATASET_DICT).is_file():
        return {"train": partial(_open_saved, spec, folder)}
    names: list[str] = parse_json((folder / _DATASET_DICT).read_text())["splits"]
    return {name: partial(_open_saved, spec, folder / name) for name in names}


def _list_path(spec: SourceSpec, path: str) -> list[FoundFile]:
    found = with_retries(lambda: list_files(path), retries=spec.network_retries, where=f"dataset.path: {path}")
    if not found and len(spec.path) > 1:
        raise DataError(f"dataset.path: {path} does not exist, or has no files; take it out of the list")
    return found


def _check_folders(spec: SourceSpec, found: Sequence[FoundFile]) -> None:
    """Raises for layouts that are known and not read."""
    names = {item.file.name for item in found}
    mds = next((item.file for item in found if item.file.name.endswith((".mds", ".mds.zstd", ".mds.gz"))), None)
    if mds is not None and "index.json" in names:
        raise DataError(
            f"dataset.path: {spec.label} is a folder of mosaicml-streaming (MDS), which is not read; convert it: "
            'pip install mosaicml-streaming, then python -c "import json; from streaming import StreamingDataset; '
            f"[print(json.dumps({{'text': row['text']}})) for row in StreamingDataset(local='{spec.path[0]}')]\" "
            "> train.jsonl, and name train.jsonl in dataset.path"
        )
    saved = next((item for item in found if item.file.name == "state.json"), None)
    arrow = next((item for item in found if item.file.name.endswith(".arrow")), None)
    if saved is not None and arrow is not None:
        raise DataError(
            f"dataset.path: {spec.label} contains a folder of save_to_disk ({saved.file.url}); name that folder "
            "itself, on a local disk (it is memory-mapped), or several of them as entries of dataset.mixture"
        )
    if arrow is not None:
        raise DataError(
            f"dataset.path: {arrow.file.url} is a bare Arrow file without the state.json of save_to_disk; convert it "
            "with `datasets.Dataset.from_file(...).save_to_disk(...)`, and name the new folder"
        )


def _format_of(file: DataFile) -> str | None:
    name = file.name.lower()
    for word, (_, endings, compressible) in FORMATS.items():
        plain = name.removesuffix(".gz").removesuffix(".zst") if compressible else name
        if plain.endswith(endings):
            return word
    return None


def _group_files(files: Sequence[FoundFile]) -> dict[str, list[DataFile]]:
    """Files by the split that their name, or a folder above it, begins with; files that name none are train, and so is
    a single file whatever its name."""
    if len(files) == 1:
        return {"train": [files[0].file]}
    groups: dict[str, list[DataFile]] = {}
    for item in files:
        named = (split for part in item.below if (split := split_of_name(part)))
        groups.setdefault(next(named, "train"), []).append(item.file)
    return groups


def _open_saved(spec: SourceSpec, folder: Path, tokenizer: Tokenizer | None) -> Documents:
    if "input_ids" not in column_names(folder):
        return ArrowTexts(folder, spec.text_column)
    if tokenizer is None:
        raise DataError(f"{folder} is tokenised already; a tokenizer is trained on text")
    return TokenStore(folder, tokenizer)


def _open_files(spec: SourceSpec, files: Sequence[DataFile], _: Tokenizer | None) -> Documents:
    kinds = dict.fromkeys(word for file in files if (word := _format_of(file)))
    if len(kinds) > 1:
        raise DataError(
            f"dataset.path: {spec.label} mixes {' and '.join(kinds)} files in one split; keep one kind with a pattern "
            "(folder/*.parquet), or name each kind in an entry of dataset.mixture"
        )
    opener = FORMATS[next(iter(kinds))][0]
    return with_retries(lambda: opener(files, spec), retries=spec.network_retries, where=f"dataset.path: {spec.label}")


OpenFiles = Callable[[Sequence[DataFile], SourceSpec], FileSource | ParquetSource]

FORMATS: dict[str, tuple[OpenFiles, tuple[str, ...], bool]] = {
    "JSON": (open_jsonl, (".jsonl", ".ndjson", ".json"), True),
    "text": (open_text, (".txt", ".text"), True),
    "CSV": (open_delimited, (".csv", ".tsv"), True),
    "Parquet": (open_parquet, (".parquet",), False),
}
"""What opens files, their endings, and whether they may be compressed as a whole."""
