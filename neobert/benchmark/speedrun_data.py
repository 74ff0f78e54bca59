"""The data of the tracks: folders with files called `train*` and `validation*`, known by a manifest of their digests.

The manifests are in the repository (`speedrun/data/NAME.json`), the data are not. A builder writes a folder again: from
a data set of the hub at one commit, or from the sources of one CPython. Both write plain JSON lines, whose bytes depend
on nothing but the texts. Data whose manifest is not in the repository yet get it from the first build.
"""

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.benchmark.speedrun_records import digest_text
from neobert.benchmark.speedrun_tracks import SpeedrunError, Track
from neobert.data.source.formats import StdlibSource, list_splits
from neobert.data.source.spec import SourceSpec
from neobert.data.source.text import Span
from neobert.disk import replacing, write_json
from neobert.weights.folder import record_file


@dataclass(frozen=True, kw_only=True, slots=True)
class HubExtract:
    """The first documents of a data set of the hub, in its own order."""

    name: str
    config: str | None
    revision: str | None
    num_documents: int
    every: int
    """One document of so many is held out."""

    @property
    def source(self) -> str:
        return f"the first {self.num_documents:,} documents of {self.name} ({self.config}) at {self.revision}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StdlibExtract:
    """The sources of one CPython's standard library, without tests and without files that an installation makes."""

    version: str
    num_held_out: int = 150

    @property
    def source(self) -> str:
        address = f"https://www.python.org/ftp/python/{self.version}/Python-{self.version}.tgz"
        return f"the folder Lib of CPython {self.version}, {address}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedFiles:
    """Files that nothing builds."""

    source: str


_REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
_WIKIPEDIA = {"name": "wikimedia/wikipedia", "config": "20231101.en", "revision": _REVISION}

DATA: dict[str, HubExtract | StdlibExtract | FixedFiles] = {
    "wikipedia-2014": FixedFiles(source="part of an English Wikipedia dump of 2014, 17 gzipped files"),
    "wikimedia-20231101.en": HubExtract(**_WIKIPEDIA, num_documents=40_000, every=40),
    "wikimedia-20231101.en-2m": HubExtract(**_WIKIPEDIA, num_documents=2_000_000, every=1000),
    "cpython-3.11.7": StdlibExtract(version="3.11.7"),
}
"""By the name of the manifest; the tracks name them."""


# ---- manifests ----


def build_manifest(name: str, folder: Path) -> dict[str, Any]:
    """Names, lengths and digests of the files of a folder."""
    files = {path.name: record_file(path) for path in _list_files(folder)}
    listed = [{"name": file, "bytes": x.bytes, "sha256": x.sha256} for file, x in files.items()]
    return {"name": name, "source": DATA[name].source, "files": listed}


def digest_manifest(manifest: dict[str, Any]) -> str:
    """One SHA-256 of the files of a manifest."""
    return digest_text(json.dumps(manifest["files"], sort_keys=True))


def load_manifests(track: Track, home: Path) -> list[dict[str, Any]]:
    """The manifests of a track that the repository has, in the order of the track."""
    files = [home / "data" / f"{name}.json" for name in track.data]
    return [_load_manifest(file) for file in files if file.is_file()]


def _load_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise SpeedrunError(f"{file}: is no manifest ({error}); restore the file") from error
    return manifest


def check_data(track: Track, folder: Path, home: Path) -> dict[str, Any]:
    """The manifest that a folder has, file for file.

    Args:
        home: the folder `speedrun` of the repository.

    Raises:
        SpeedrunError: there is no such folder, or a file differs from every manifest; it names the first file of each.
    """
    build = f"neobert speedrun data {track.name} --output FOLDER builds it"
    if not folder.is_dir():
        raise SpeedrunError(f"--data: {folder} is no folder; {build}")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # Folders too: they are read.
    problems = []
    for manifest in load_manifests(track, home):
        problem = _find_difference(manifest, folder, names)
        if problem is None:
            return manifest
        problems.append(f"{manifest['name']} ({manifest['source']}): {problem}")
    if not problems:
        raise SpeedrunError(f"{home}/data has no manifest of {' or '.join(track.data)} yet; {build}, with its manifest")
    raise SpeedrunError(
        "\n  - ".join(
            [f"--data: {folder} is not what the track {track.name} reads; {build}. It differs from", *problems]
        )
    )


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _find_difference(manifest: dict[str, Any], folder: Path, names: set[str]) -> str | None:
    for file in manifest["files"]:
        if file["name"] not in names:
            return f"{file['name']} is missing"
        if (folder / file["name"]).stat().st_size != file["bytes"]:
            return f"{file['name']} has {(folder / file['name']).stat().st_size:,} bytes, not {file['bytes']:,}"
    others = sorted(names - {file["name"] for file in manifest["files"]})
    if others:
        return f"{others[0]} is not part of it; remove it"
    for file in manifest["files"]:
        if record_file(folder / file["name"]).sha256 != file["sha256"]:
            return f"{file['name']} has another sha256"
    return None


# ---- building ----


def build_data(track: Track, output: Path, home: Path, *, source: Path | None = None) -> list[str]:
    """Builds the data of a track in a new folder; what was done, in sentences.

    Args:
        source: the folder Lib of an unpacked CPython, instead of the running one's.

    Raises:
        SpeedrunError: the folder holds files, the track has nothing to build, or what was built has other digests.
    """
    name = next((name for name in track.data if not isinstance(DATA[name], FixedFiles)), None)
    if name is None:
        raise SpeedrunError(f"the data of {track.name} cannot be built: {DATA[track.data[0]].source}")
    entry = DATA[name]
    if source is not None and not isinstance(entry, StdlibExtract):
        raise SpeedrunError(f"--source: {source} is for a standard library; {track.name} reads {entry.source}")
    if output.is_dir() and any(output.iterdir()):
        raise SpeedrunError(f"--output: {output} holds files already; choose an empty or new folder")
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(entry, StdlibExtract):
        texts, held_out = _read_stdlib(source), range(entry.num_held_out)
    else:
        assert isinstance(entry, HubExtract)
        texts, held_out = _read_hub(entry), range(0, entry.num_documents, entry.every)
    _write_splits(texts, held_out, output)
    return _compare_built(name, output, home)


def _read_stdlib(root: Path | None) -> Iterator[str]:
    source = StdlibSource(root)
    for number, path in enumerate(source.paths):
        is_made = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
        text = None if is_made else source.text(number)
        if text is not None:
            yield text


def _read_hub(entry: HubExtract) -> Iterator[str]:
    spec = SourceSpec(name=entry.name, config=entry.config, revision=entry.revision)
    documents = list_splits(spec)["train"](None).as_text(entry.name)
    count = 0
    for record in documents.records(Span()):
        if record.text is not None:
            yield record.text
            count += 1
            if count == entry.num_documents:
                return
    raise SpeedrunError(f"{entry.name}: has {count:,} documents with text, and {entry.num_documents:,} are needed")


def _write_splits(texts: Iterable[str], held_out: range, output: Path) -> None:
    with replacing(output / "train.jsonl") as train, replacing(output / "validation.jsonl") as validation:
        with train.open("w", encoding="utf-8") as main, validation.open("w", encoding="utf-8") as other:
            for number, text in enumerate(texts):
                line = json.dumps({"text": text}, ensure_ascii=False)
                (other if number in held_out else main).write(line + "\n")


def _compare_built(name: str, output: Path, home: Path) -> list[str]:
    manifest, file = build_manifest(name, output), home / "data" / f"{name}.json"
    if not file.is_file():
        write_json(file, manifest)
        return [f"{output}: {name}, built for the first time; {file} is its manifest: commit it with the first record"]
    problem = _find_difference(_load_manifest(file), output, {x["name"] for x in manifest["files"]})
    if problem is None:
        return [f"{output}: {name}, as in {file}"]
    entry, remedy = DATA[name], "the data set has changed"
    if isinstance(entry, StdlibExtract):
        remedy = f"this is Python {platform.python_version()}; use {entry.source}, and name it with --source"
    for path in _list_files(output):
        path.unlink()
    raise SpeedrunError(f"{output}: is not {name}: {problem}; {remedy}")
