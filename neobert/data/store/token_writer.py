"""Tokenised documents written in the layout of `datasets.save_to_disk`.

Batches and files end at positions that depend on the documents written since the start alone, and always after a
whole document. So a writer that continues after its last finished file writes the same bytes as one never interrupted.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neobert.data.rows.lanes import IntArray
from neobert.data.store.arrow import MANIFEST
from neobert.disk import sync, write_json

FILE_TOKENS = 1 << 24
"""A file is closed after this many tokens: about 64 MB, so that an interruption loses seconds."""

BATCH_TOKENS = 1 << 20
"""A record batch ends after this many tokens, which bounds the memory."""

Files = dict[str, dict[str, Any]]
"""name -> `{"bytes": size, "sha256": of the content}`"""

_FEATURES: dict[str, dict[str, Any]] = {
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "special_tokens_mask": {"feature": {"dtype": "int8", "_type": "Value"}, "_type": "List"},
    "document": {"dtype": "int64", "_type": "Value"},
}
_TYPES = {"input_ids": pa.list_(pa.int32()), "special_tokens_mask": pa.list_(pa.int8()), "document": pa.int64()}


class TokenWriter:
    """Writes rows of tokens to the numbered Arrow files of a folder. Equal rows give equal bytes."""

    def __init__(
        self,
        folder: Path,
        *,
        around: tuple[int, int] | None = None,
        special_tokens_mask: bool = False,
        document_numbers: bool = False,
        file_tokens: int = FILE_TOKENS,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        """Continues after `files`, the finished ones of the folder.

        Args:
            around: the ids of [CLS] and [SEP], put around every row; None writes bare tokens.
            special_tokens_mask: adds a column that is 1 at these two and 0 elsewhere.
            document_numbers: adds a column with the number of the document that a row is a piece of.
            file_tokens: tokens after which a file ends.
        """
        self._folder, self._around, self._file_tokens = folder, around, file_tokens
        columns = {"input_ids": True, "special_tokens_mask": special_tokens_mask, "document": document_numbers}
        self._columns = [name for name, is_written in columns.items() if is_written]
        self._schema = pa.schema(
            [pa.field(name, _TYPES[name]) for name in self._columns],
            metadata={"huggingface": json.dumps({"info": {"features": self.features}})},
        )
        self.files: Files = dict(files or {})
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._rows: list[IntArray] = []
        self._documents: list[int] = []
        self._waiting_tokens = self._written_tokens = 0

    def add(self, rows: Sequence[IntArray], document: int) -> bool:
        """Appends the rows of one document; whether a file is finished after it, listed in `files` and on the disk."""
        for row in rows:
            self._rows.append(row if self._around is None else _wrap(row, *self._around))
            self._documents.append(document)
            self._waiting_tokens += len(self._rows[-1])
        if self._written_tokens + self._waiting_tokens >= self._file_tokens:
            self.finish_file()
            return True
        if self._waiting_tokens >= BATCH_TOKENS:
            self._flush()
        return False

    def finish_file(self) -> None:
        """Writes what is left to the current file and closes it; the first file is written even when it is empty."""
        if self._rows or not self.files:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            path = self._folder / self._name
            sync(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        self._writer, self._written_tokens = None, 0

    @property
    def features(self) -> dict[str, Any]:
        """The columns as `datasets` describes them."""
        return {name: _FEATURES[name] for name in self._columns}

    @property
    def _name(self) -> str:
        return f"data-{len(self.files):05d}.arrow"

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self._folder / self._name), self._schema)
        if self._rows:
            arrays = [self._array(name) for name in self._columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._written_tokens += self._waiting_tokens
        self._rows, self._documents, self._waiting_tokens = [], [], 0

    def _array(self, column: str) -> pa.Array:
        if column == "document":
            return pa.array(np.array(self._documents, dtype=np.int64))
        offsets = np.cumsum([0, *map(len, self._rows)], dtype=np.int32)
        if column == "input_ids":
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._rows)))
        mask = np.zeros(int(offsets[-1]), dtype=np.int8)
        if self._around is not None:
            mask[offsets[:-1]] = mask[offsets[1:] - 1] = 1
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(mask))


def _wrap(row: IntArray, cls_id: int, sep_id: int) -> IntArray:
    wrapped = np.empty(len(row) + 2, dtype=np.int32)
    wrapped[0], wrapped[1:-1], wrapped[-1] = cls_id, row, sep_id
    return wrapped


def write_description(
    folder: Path, *, files: Sequence[str], features: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """The files that make `folder` readable; state.json comes last and each of them is whole or not there."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "dataset_info.json", {"features": features})
    write_json(folder / MANIFEST, manifest)
    write_json(folder / "state.json", state)
