"""From `dataset.*` to the splits of a source, and from a split to its documents.

| the source is | split names | its documents |
|---|---|---|
| `python_stdlib` | train | `StdlibSource` |
| a folder of `save_to_disk` | train, or its own | `TokenStore` where there are input_ids, else `ArrowTexts` |
| files, folders of them, patterns, local or remote | by their names | one of `FORMATS` in `files.py` |
| a hub name | the hub's | `HubSource` |

`python_stdlib`: the source code of the running interpreter's standard library, a corpus that is always there.

About ten megabytes of real code and English prose. Test suites and installed packages are left out, so that the
documents are the same with and without a virtual environment.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

from neobert.config.nesting import parse_json
from neobert.config.schema_data import DatasetSection
from neobert.data.source.documents import Documents
from neobert.data.source.files import (
    FORMATS,
    DataFile,
    FoundFile,
    Listing,
    fingerprint_files,
    is_remote,
    kind_of_name,
    list_files,
    local_file,
)
from neobert.data.source.hub import HubPin, list_hub_splits, open_hub, pin_hub
from neobert.data.source.intake import check_problems
from neobert.data.source.inventory import FileReport, Inventory, name_some
from neobert.data.source.lines import FileSource
from neobert.data.source.network import with_retries
from neobert.data.source.one_reader import Share, see
from neobert.data.source.parquet import ParquetSource
from neobert.data.source.spec import PYTHON_STDLIB, SourceSpec, describe_sources
from neobert.data.source.splits import find_split
from neobert.data.source.walk import covers
from neobert.data.store.arrow import ArrowTexts, IndexedTexts, column_names
from neobert.data.store.tokens import TokenStore
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibSource(IndexedTexts):
    """Every .py file of the standard library, in an order keyed by a hash of its path."""

    in_place = False

    def __init__(self, root: Path | None = None) -> None:
        """`root` is by default the standard library of the running interpreter."""
        self._root = root or Path(sysconfig.get_path("stdlib"))
        relative = [path.relative_to(self._root) for path in self._root.rglob("*.py")]
        # By a hash of the path: neighbours in a folder are alike, and the first documents should be a fair sample.
        chosen = sorted((p for p in relative if not _LEFT_OUT.intersection(p.parts)), key=_hash_path)
        self.paths = [self._root / path for path in chosen]
        if not self.paths:
            raise DataError(
                f"dataset.name: {PYTHON_STDLIB}, but this interpreter keeps no sources in {self._root}; "
                "use another interpreter, or name text with dataset.path"
            )
        self.notes = [f"{len(self.paths)} source files of {self._root}"]
        files = [local_file(path) for path in self.paths]
        self.num_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint_files(files)

    def __len__(self) -> int:
        return len(self.paths)

    def text(self, document: int) -> str | None:
        try:
            return self.paths[document].read_text(encoding="utf-8")
        except UnicodeDecodeError:  # A few files show other encodings; they are no prose and no bad data.
            return None


def _hash_path(path: Path) -> bytes:
    return hashlib.sha256(f"{PYTHON_STDLIB}/{path.as_posix()}".encode()).digest()


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


def list_shared_splits(spec: SourceSpec, share: Share) -> Mapping[str, OpenSplit]:
    """The splits of a source, listed and opened by rank 0 where they are files.

    Raises:
        DataError: there is no such source, or it is of a kind that is not read.
    """
    if not spec.path:
        return list_splits(spec)
    own: dict[str, OpenSplit] = {}

    def find() -> list[str]:
        own.update(list_splits(spec))
        return list(own)

    names = share(find, path=spec.path, seen=lambda: see(_name_files(own)))

    def open_split(name: str, tokenizer: Tokenizer | None) -> Documents:
        # A rank that was sent the names looks for itself where another source has ended the sharing since.
        return share(lambda: (own or list_splits(spec))[name](tokenizer))

    return {name: partial(open_split, name) for name in names}


def _name_files(splits: Mapping[str, OpenSplit]) -> list[str]:
    """Local files of splits that `list_splits` found, or of folders of `save_to_disk` their description."""
    names = []
    for opener in splits.values():
        assert isinstance(opener, partial)
        found = opener.args[1]
        names += [str(found / "state.json")] if isinstance(found, Path) else [x.url for x in found if not x.is_remote]
    return names


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
    found = list_data_files(spec)
    return {
        name: partial(_open_files, spec, found.files_of(name), found.inventory)
        for name in dict.fromkeys(found.splits.values())
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """The files of a source by their names; nothing of them is read yet."""

    files: list[DataFile]
    splits: dict[str, str]
    """By URL."""

    inventory: Inventory

    def files_of(self, split: str) -> list[DataFile]:
        """The files of a split."""
        return [file for file in self.files if self.splits[file.url] == split]


def list_data_files(spec: SourceSpec) -> DataFiles:
    """The files that the paths of a source name, each in its split.

    Raises:
        DataError: there are none, a link leads nowhere, or a file is named twice or for two splits.
    """
    listings = [_list_path(spec, path) for path in spec.path]
    found = [item for listing in listings for item in listing.files]
    _check_folders(spec, [item.file for item in found])
    left_out = [item for listing in listings for item in listing.left_out]
    data = [item for item in found if item.file.name not in _NOT_DATA and kind_of_name(item.file.name) is not None]
    faults = {item.url: item.reason for item in left_out if item.is_fault}
    check_problems(faults, spec, left=len(data))
    if not data:
        endings = ", ".join(ending for kind in FORMATS.values() for ending in kind.endings)
        there = name_some(f"{item.file.url} ({_describe_ending(item.file)})" for item in found)
        cause, there = ("has no file that can be read", f"; it has {there}") if found else ("does not exist", "")
        raise DataError(
            f"dataset.path: {spec.label} {cause}; give a "
            f"folder of save_to_disk, or files ending in {endings} (text also compressed: .gz, .zst, .xz, .bz2){there}"
        )
    reports = [FileReport(url=item.url, problem=item.reason, is_fault=item.is_fault) for item in left_out]
    reports += [
        FileReport(url=item.file.url, problem=_describe_ending(item.file))
        for item in found
        if kind_of_name(item.file.name) is None and not _is_description(item.file)
    ]
    kept, twice = _drop_twins(data, listings)
    # A single file is what was asked for, whatever its name.
    splits = {item.file.url: find_split(item.below) if len(data) > 1 else ("train", None) for item in kept}
    reports += [FileReport(url=url, split=split, word=word) for url, (split, word) in splits.items()]
    return DataFiles(
        files=[item.file for item in kept],
        splits={url: split for url, (split, _) in splits.items()},
        inventory=Inventory(files=(*reports, *twice)),
    )


def _drop_twins(found: Sequence[FoundFile], listings: Sequence[Listing]) -> tuple[list[FoundFile], list[FileReport]]:
    """Every file once, and reports of the other ways that lead to it: a way through a word of a split is used first,
    then one without links.

    Raises:
        DataError: two ways say two splits, or two entries of dataset.path name one file.
    """
    ways: dict[str, list[FoundFile]] = {}
    for item in found:
        ways.setdefault(item.real, []).append(item)
    if len(ways) == len(found):
        return list(found), []
    entry = {id(item): number for number, listing in enumerate(listings) for item in listing.files}
    chosen, reports = set(), []
    for items in ways.values():
        if len({entry[id(item)] for item in items}) > 1:
            raise DataError(f"dataset.path: {items[-1].file.url} is named twice; name every file once")
        named = {split: item for item in items if (split := find_split(item.below)[1]) is not None}
        splits = {find_split(item.below)[0]: item.file.url for item in named.values()}
        if len(splits) > 1:
            both = " and ".join(f"{url} ({split})" for split, url in splits.items())
            raise DataError(f"dataset.path: one file is in two splits by its links: {both}; remove one of them")
        best = min(items, key=lambda item: (find_split(item.below)[1] is None, item.linked, item.below))
        chosen.add(id(best))
        reports += [
            FileReport(url=item.file.url, problem=f"the same file as {best.file.url}")
            for item in items
            if item is not best
        ]
    return [item for item in found if id(item) in chosen], reports


def _describe_ending(file: DataFile) -> str:
    dot = file.name.rfind(".")
    return file.name[dot:] if dot > 0 else "no ending"


def _is_description(file: DataFile) -> bool:
    """Whether a file is about the data, so that nobody expects it to be read."""
    return file.name in _NOT_DATA or file.name.split(".")[0].upper() in ("README", "LICENSE")


def find_covering(section: DatasetSection, file: str) -> str | None:
    """The path of a source below which `file`, a file that may not be there yet, would be found and read as data."""
    for spec in describe_sources(section):
        for url in spec.path:
            if not is_remote(url) and not _is_saved(Path(url).expanduser()) and covers(url, file):
                return url
    return None


def _is_saved(folder: Path) -> bool:
    return (folder / _DATASET_DICT).is_file() or (folder / "state.json").is_file()


def _splits_of_saved(spec: SourceSpec, folder: Path) -> Mapping[str, OpenSplit]:
    if not (folder / _DATASET_DICT).is_file():
        return {"train": partial(_open_saved, spec, folder)}
    names: list[str] = parse_json((folder / _DATASET_DICT).read_text())["splits"]
    return {name: partial(_open_saved, spec, folder / name) for name in names}


def _list_path(spec: SourceSpec, path: str) -> Listing:
    found = with_retries(lambda: list_files(path), retries=spec.section.network_retries, where=f"dataset.path: {path}")
    if not any(found) and len(spec.path) > 1:
        raise DataError(f"dataset.path: {path} does not exist, or has no files; take it out of the list")
    return found


def _check_folders(spec: SourceSpec, found: Sequence[DataFile]) -> None:
    """Raises for layouts that are known and not read."""
    names = {file.name for file in found}
    mds = next((file for file in found if file.name.endswith((".mds", ".mds.zstd", ".mds.gz"))), None)
    if mds is not None and "index.json" in names:
        raise DataError(
            f"dataset.path: {spec.label} is a folder of mosaicml-streaming (MDS), which is not read; convert it: "
            'pip install mosaicml-streaming, then python -c "import json; from streaming import StreamingDataset; '
            f"[print(json.dumps({{'text': row['text']}})) for row in StreamingDataset(local='{spec.path[0]}')]\" "
            "> train.jsonl, and name train.jsonl in dataset.path"
        )
    saved = next((file for file in found if file.name == "state.json"), None)
    arrow = next((file for file in found if file.name.endswith(".arrow")), None)
    if saved is not None and arrow is not None:
        raise DataError(
            f"dataset.path: {spec.label} contains a folder of save_to_disk ({saved.url}); name that folder "
            "itself, on a local disk (it is memory-mapped), or several of them as entries of dataset.mixture"
        )
    if arrow is not None:
        raise DataError(
            f"dataset.path: {arrow.url} is a bare Arrow file without the state.json of save_to_disk; convert it "
            "with `datasets.Dataset.from_file(...).save_to_disk(...)`, and name the new folder"
        )


def _open_saved(spec: SourceSpec, folder: Path, tokenizer: Tokenizer | None) -> Documents:
    if "input_ids" not in column_names(folder):
        return ArrowTexts(folder, spec.text_column, spec.section.max_record_bytes)
    if tokenizer is None:
        raise DataError(f"{folder} is tokenised already; a tokenizer is trained on text")
    return TokenStore(folder, tokenizer)


OpenFiles = Callable[[Sequence[DataFile], SourceSpec], FileSource | ParquetSource]


def _open_files(spec: SourceSpec, files: Sequence[DataFile], inventory: Inventory, _: Tokenizer | None) -> Documents:
    kinds = list(dict.fromkeys(kind for file in files if (kind := kind_of_name(file.name))))
    if len(kinds) > 1:
        raise DataError(
            f"dataset.path: {spec.label} mixes {' and '.join(kinds)} files in one split; keep one kind with a pattern "
            "(folder/*.parquet), or name each kind in an entry of dataset.mixture"
        )
    opener: OpenFiles = resolve_name(FORMATS[kinds[0]].opener)
    where = f"dataset.path: {spec.label}"
    source = with_retries(lambda: opener(files, spec), retries=spec.section.network_retries, where=where)
    source.inventory = inventory.with_content(source.reports)
    return source
