"""Data files, local and remote, and what keeps a run from reading a file that was replaced.

Local files are opened directly. A path with a protocol (`s3://`, `gs://`, `hf://` ...) goes through fsspec.
A file's stamp, its size with the time of change or the ETag, is read when it is listed and compared whenever it is
opened: a cursor means nothing in another file of the same name.
"""

import glob
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec

from neobert.data.source.codecs import CODECS, DAMAGED, TEXT_RATIO, VALUES, codec_of_name, open_layers, strip_codec
from neobert.data.source.known_fingerprints import recall
from neobert.data.source.walk import LeftOut, is_hidden, walk
from neobert.errors import OR_SKIP_SHARD, DataError

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
_STAMPS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
_FINGERPRINT_BLOCK = 4096
_REMOTE_BUFFER_BYTES = 1 << 20


def kind_of_name(name: str) -> str | None:
    """The format that a name says, a key of `FORMATS`.

    >>> kind_of_name("Train.JSONL.gz"), kind_of_name("a.parquet.gz")
    ('JSON', None)
    """
    plain = strip_codec(name.lower())
    for kind, found in FORMATS.items():
        if plain.endswith(found.endings):
            return kind if found.compressible or plain == name.lower() else None
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file as it was when it was listed."""

    url: str
    """A local path, or an address with a protocol."""

    size: int
    stamp: str
    content: tuple[str, ...] | None = None
    """How its bytes become lines of UTF-8, outermost first, as its content says; None: nobody has looked, its name
    decides."""

    @property
    def layers(self) -> tuple[str, ...]:
        """What its bytes go through when it is opened."""
        if self.content is not None:
            return self.content
        codec = codec_of_name(self.url)
        return () if codec is None else (codec,)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def is_remote(self) -> bool:
        return is_remote(self.url)

    @property
    def is_compressed(self) -> bool:
        return any(layer in CODECS for layer in self.layers)

    @property
    def is_streamed(self) -> bool:
        """Whether it can be read from its start only."""
        return bool(self.layers)

    def name_line(self, number: int) -> str:
        """A line of it, for people."""
        return f"{self.url}, JSON value {number}" if VALUES in self.layers else f"{self.url}:{number}"

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text it holds."""
        return self.size * TEXT_RATIO if self.is_compressed else self.size

    def check_unchanged(self) -> None:
        """Raises when there is another file now.

        Raises:
            OSError: it is gone.
            DataError: it was replaced.
        """
        if self.is_remote:
            fs, path = open_filesystem(self.url)
            fs.invalidate_cache(fs._parent(path))
            now = _remote_file(self.url, fs.info(path))
        else:
            now = local_file(Path(self.url))
        if now.stamp != self.stamp:
            raise DataError(
                f"{self.url} was replaced while it was being read ({self.size} bytes before, {now.size} now); put the "
                "file of before back and resume, or start a new run with the new data"
            )

    def open_raw(self) -> BinaryIO:
        """The bytes of the file.

        Raises:
            OSError: it is gone, or cannot be opened.
            DataError: it was replaced.
        """
        self.check_unchanged()
        if not self.is_remote:
            return open(self.url, "rb")
        fs, path = open_filesystem(self.url)
        # Files of fsspec look for line ends in Python, which is slow.
        return io.BufferedReader(fs.open(path, "rb"), _REMOTE_BUFFER_BYTES)

    def open(self) -> BinaryIO:
        """The lines in the file, decompressed and recoded."""
        return open_layers(self.open_raw(), self.layers)


class FoundFile(NamedTuple):
    """A file of a listing."""

    file: DataFile
    below: tuple[str, ...]
    """Names of the folders and of the file below the path that was listed."""

    real: str
    """Its path without links."""

    linked: bool = False
    """Whether a link below the path that was listed led to it."""


class Listing(NamedTuple):
    """What a path names, in the order of the names."""

    files: list[FoundFile]
    left_out: list[LeftOut]


def is_remote(url: str) -> bool:
    """Whether a path has a protocol."""
    return "://" in url


def local_file(path: Path) -> DataFile:
    """A local file as it is now."""
    return _describe(str(path), path.stat())


def _describe(path: str, stat: os.stat_result) -> DataFile:
    return DataFile(url=path, size=stat.st_size, stamp=f"{stat.st_size}:{stat.st_mtime_ns}")


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path in it.

    Raises:
        DataError: the protocol is unknown, or its package is not installed.
    """
    protocol = url.split("://", 1)[0]
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else str(error)
        raise DataError(f"dataset.path: {url}: the package that reads {protocol}:// is missing; {remedy}") from error
    except ValueError as error:
        raise DataError(f"dataset.path: {url}: {error}; use s3://, gs://, hf:// or a local path") from error


def list_files(url: str) -> Listing:
    """The files that a path names: one file, a folder with all below it, or a pattern; in the order of their names.

    Files and folders whose name starts with a dot or an underscore are left out, unless the path names them.

    Raises:
        DataError: a folder cannot be listed.
    """
    if is_remote(url):
        return Listing(_list_remote(url), [])
    found = walk(url)
    files = [FoundFile(_describe(item.path, item.stat), item.below, item.real, item.linked) for item in found.files]
    return Listing(files, found.left_out)


def fingerprint_files(files: Sequence[DataFile], *, skip_unreadable: bool = False) -> str:
    """sha256 of the names and sizes of files and of 16 blocks of each, spread evenly; of remote files of the stamps.
    Of many local files that did not change since an earlier start, the one that was kept then.

    Raises:
        DataError: a file cannot be read, unless those are skipped.
    """
    if skip_unreadable or any(data_file.is_remote for data_file in files):
        return _read_fingerprint(files, skip_unreadable=skip_unreadable)
    return recall([data_file.url for data_file in files], lambda: _read_fingerprint(files, skip_unreadable=False))


def _read_fingerprint(files: Sequence[DataFile], *, skip_unreadable: bool) -> str:
    digest = hashlib.sha256()
    for data_file in files:
        size = data_file.size
        digest.update(f"{data_file.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        if data_file.is_remote:
            digest.update(data_file.stamp.encode())
            continue
        try:
            with data_file.open_raw() as file:
                whole = file.read(size) if size <= 16 * _FINGERPRINT_BLOCK else None  # In one reading.
                for block in range(16):
                    begin = max(0, size - _FINGERPRINT_BLOCK) * block // 15
                    if whole is None:
                        file.seek(begin)
                        digest.update(file.read(_FINGERPRINT_BLOCK))
                    else:
                        digest.update(whole[begin : begin + _FINGERPRINT_BLOCK])
        except OSError as error:
            if not skip_unreadable:
                raise DataError(cannot_read(data_file, error)) from error
    return f"sha256:{digest.hexdigest()}"


def cannot_read(file: DataFile, error: BaseException) -> str:
    """The sentence about a file that cannot be read."""
    verb = "decompressed" if isinstance(error, DAMAGED) else "read"
    reason = str(error).strip() or type(error).__name__
    return f"{file.url} cannot be {verb} ({reason}); restore the file, take it out of dataset.path{OR_SKIP_SHARD}"


def _list_remote(url: str) -> list[FoundFile]:
    fs, path = open_filesystem(url)
    path = path.rstrip("/")
    if glob.has_magic(path):
        found, root = fs.glob(path, detail=True), "/".join(_parts_before_pattern(tuple(path.split("/"))))
        for folder in [name for name, info in found.items() if info["type"] == "directory"]:
            found |= fs.find(folder, detail=True)
    elif not fs.exists(path):
        return []
    elif fs.isfile(path):
        file = _remote_file(fs.unstrip_protocol(path), fs.info(path))
        return [FoundFile(file, (path.rsplit("/", 1)[-1],), file.url)]
    else:
        found, root = fs.find(path, detail=True), path
    files = []
    for name, info in found.items():
        below = tuple(part for part in name[len(root) :].split("/") if part)
        if info["type"] == "file" and not any(map(is_hidden, below)):
            file = _remote_file(fs.unstrip_protocol(name), info)
            files.append(FoundFile(file, below, file.url))
    return sorted(files, key=lambda item: item.below)


def _remote_file(url: str, info: dict[str, Any]) -> DataFile:
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    return DataFile(url=url, size=int(info["size"] or 0), stamp=f"{info['size']}:{stamp}")


def _parts_before_pattern(parts: tuple[str, ...]) -> tuple[str, ...]:
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:first]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFormat:
    """One format of files of text."""

    endings: tuple[str, ...]
    """Of names, in lower case."""

    opener: str
    """`fn(files, spec) -> source`, by `module:attribute`: the modules of formats need this one."""

    compressible: bool = True
    """Whether a file may be compressed as a whole (`.gz` after the ending)."""


FORMATS: dict[str, FileFormat] = {
    "JSON": FileFormat(endings=(".jsonl", ".ndjson", ".json"), opener="neobert.data.source.jsonl:open_jsonl"),
    "text": FileFormat(endings=(".txt", ".text"), opener="neobert.data.source.plain:open_text"),
    "CSV": FileFormat(endings=(".csv", ".tsv"), opener="neobert.data.source.delimited_columns:open_delimited"),
    "Parquet": FileFormat(endings=(".parquet",), opener="neobert.data.source.parquet:open_parquet", compressible=False),
}
"""All formats of files."""
