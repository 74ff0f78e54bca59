"""Prepared sets on disk: `<dataset.path>/all/<KEY>/` with the examples and what they are.

Examples are stored in Arrow record batches of constant size, so that one is found by its number without an index and
without reading the others. `set.json` is written last: a folder without it is not a set. `manifest.json` beside the
folders lists them all and is made from their `set.json`.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from neobert.config.nesting import parse_json
from neobert.contrastive.examples import Example, Form
from neobert.disk import write_text
from neobert.errors import DataError

BATCH_ROWS = 4096
VERSION = 1

_FILES = {"examples.arrow", "set.json"}
"""What a set consists of; a kill may leave one of the two."""

_SCHEMA = pa.schema(
    [
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("score", pa.float64()),
        ("label", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetInfo:
    """What `set.json` says."""

    version: int
    key: str
    form: Form
    num_rows: int
    max_negatives: int
    """Most negatives that one anchor has."""

    labels: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""

    fingerprint: str
    """sha256 of the examples."""

    source: dict[str, Any]
    """What it was made from, as it was asked for."""


def sets_folder(path: str) -> Path:
    """Where the sets of `dataset.path` are."""
    return Path(path) / "all"


def write_set(folder: Path, key: str, form: Form, examples: Iterable[Example], source: dict[str, Any]) -> SetInfo:
    """Writes a set to `folder`, replacing what is there only when the new one is complete.

    Raises:
        DataError: there are no examples, or what is there is no set.
    """
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= _FILES):
        raise DataError(f"{folder} holds what is no set: the set {key} is to be written there; move it or remove it")
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    digest, labels = hashlib.sha256(form.encode()), dict[str, int]()
    num_rows = max_negatives = 0
    iterator = iter(examples)
    with pa.OSFile(str(temporary / "examples.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while block := list(itertools.islice(iterator, BATCH_ROWS)):
            rows = [_as_row(example, labels) for example in block]
            for row in rows:
                digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            num_rows += len(rows)
            max_negatives = max(max_negatives, *(len(example.negatives) for example in block))
    if not num_rows:
        shutil.rmtree(temporary)
        raise DataError(f"{key} has no usable row: texts are missing or empty; check the columns in contrastive.sets")
    info = SetInfo(
        version=VERSION,
        key=key,
        form=form,
        num_rows=num_rows,
        max_negatives=max_negatives,
        labels=tuple(labels),
        fingerprint=f"sha256:{digest.hexdigest()}",
        source=source,
    )
    (temporary / "set.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return info


def _as_row(example: Example, labels: dict[str, int]) -> dict[str, Any]:
    label = None if example.label is None else labels.setdefault(example.label, len(labels))
    return {
        "anchor": example.anchor,
        "positive": example.positive,
        "negatives": list(example.negatives),
        "score": example.score,
        "label": label,
    }


def read_info(folder: Path) -> SetInfo | None:
    """The set in a folder; None when there is none.

    Raises:
        DataError: it was written by another version.
    """
    file = folder / "set.json"
    if not file.is_file():
        return None
    values = parse_json(file.read_text())
    if values["version"] != VERSION:
        raise DataError(
            f"{file} has version {values['version']}, this code reads {VERSION}: prepare it again with"
            " dataset.force_redownload: true"
        )
    return SetInfo(**{**values, "labels": tuple(values["labels"])})


def list_sets(path: str) -> dict[str, SetInfo]:
    """The prepared sets of `dataset.path` by key."""
    folders = sorted(sets_folder(path).iterdir()) if sets_folder(path).is_dir() else []
    infos = [read_info(folder) for folder in folders if not folder.name.startswith(".")]
    return {info.key: info for info in infos if info is not None}


def write_manifest(path: str) -> None:
    """`manifest.json`: all sets of `dataset.path`."""
    sets = {key: asdict(info) for key, info in list_sets(path).items()}
    file = sets_folder(path) / "manifest.json"
    write_text(file, json.dumps({"version": VERSION, "sets": sets}, indent=2) + "\n")


class PairStore:
    """The examples of a set by number."""

    def __init__(self, folder: Path) -> None:
        info = read_info(folder)
        assert info is not None, "the caller has looked"
        self.info = info
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def __len__(self) -> int:
        return self.info.num_rows

    def get(self, number: int) -> dict[str, Any]:
        """Columns of example `number`: texts, negatives, and `score` or `label` where it has one."""
        batch, row = self._batches[number // BATCH_ROWS], number % BATCH_ROWS
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns)}

    def examples(self) -> Iterator[Example]:
        """All of them in order, as they were written."""
        for row in itertools.chain.from_iterable(batch.to_pylist() for batch in self._batches):
            label = None if row["label"] is None else self.info.labels[row["label"]]
            yield Example(**{**row, "negatives": tuple(row["negatives"]), "label": label})

    def column(self, name: str, numbers: Sequence[int]) -> list[Any]:
        """One column of several examples."""
        return [self._batches[n // BATCH_ROWS].column(name)[n % BATCH_ROWS].as_py() for n in numbers]
