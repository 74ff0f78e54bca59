"""A folder of tokenised documents in the layout of `datasets.save_to_disk`: what shapes it, and how it is written.

Batches and files end at positions that depend on the documents written since the start alone, and always after a
whole document. So a writer that continues after its last finished file writes the same bytes as one never interrupted.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neobert.config.schema_data import DatasetSection
from neobert.data.fingerprint import fits
from neobert.data.rows.lanes import IntArray
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.source.spec import SourceSpec
from neobert.data.source.splits import SplitSlice
from neobert.data.store.arrow import MANIFEST
from neobert.data.tokenizer import Tokenizer
from neobert.disk import sync, write_json

FILE_TOKENS = 1 << 24
"""A file is closed after this many tokens, 32 or 64 MB, so that an interruption loses seconds."""


_FORMAT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What shapes the folder, besides documents and tokenizer."""

    max_document_chars: int
    max_bad_records: int
    text_column: str | None = None
    split: str | None = None
    special_tokens: bool = False
    """True: every row is `[CLS] tokens [SEP]`; False: bare tokens."""

    special_tokens_mask: bool = False
    """Adds the column `special_tokens_mask`."""

    max_length: int | None = None
    """Longer documents become consecutive rows of at most this many tokens, special ones included, and a column
    `document` numbers the documents. None: a document is a row."""

    max_documents: int | None = None
    """Only the first documents, this many."""

    min_tokens: int = 0
    """Documents with fewer tokens are left out and counted as `short`."""

    file_tokens: int = FILE_TOKENS

    @property
    def row_tokens(self) -> int | None:
        """Tokens of the longest row without its special tokens; None: no limit."""
        if self.max_length is None:
            return None
        return self.max_length - (SPECIALS_PER_SEGMENT if self.special_tokens else 0)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two folders to be equal; how many bad records are accepted does not matter."""
        return {name: value for name, value in asdict(self).items() if name != "max_bad_records"}


def choose_settings(
    section: DatasetSection, spec: SourceSpec, split: SplitSlice, max_documents: int | None
) -> PrepareSettings:
    """How a run has its text tokenised to disk: bare tokens of whole documents."""
    return PrepareSettings(
        max_document_chars=section.max_document_chars,
        max_bad_records=section.max_bad_records,
        text_column=spec.text_column,
        split=str(split),
        max_documents=max_documents,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where documents and tokenizer come from, as text for the manifest."""

    source: str | None = None
    revision: str | None = None
    tokenizer: str | None = None


UNNAMED = Origin()
"""Nothing is known of where they come from."""


def make_identity(
    fingerprint: str, tokenizer: Tokenizer, settings: PrepareSettings, part: tuple[int, int] | None
) -> dict[str, Any]:
    """What is equal in folders with equal content; a part of every manifest."""
    return {
        "format": _FORMAT,
        "source": fingerprint,
        "tokenizer_digest": tokenizer.digest,
        "special_tokens": settings.special_tokens,
        "settings": settings.identity(),
        "part": None if part is None else list(part),
    }


def describe_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where two identities differ, as text; empty when they do not."""
    pairs = {**here, **here["settings"]}
    others = {**there, **there.get("settings", {})}
    names = [name for name in pairs if name != "settings" and not fits(others.get(name), pairs[name])]
    return ", ".join(f"{name} is {others.get(name)!r} there and {pairs[name]!r} here" for name in names)


BATCH_TOKENS = 1 << 20
"""A record batch ends after this many tokens, which bounds the memory."""

Files = dict[str, dict[str, Any]]
"""name -> `{"bytes": size, "sha256": of the content}`"""


def choose_token_type(vocab_size: int) -> str:
    """The smallest integers that hold every token.

    >>> choose_token_type(65536), choose_token_type(65537)
    ('uint16', 'int32')
    """
    return "uint16" if vocab_size <= 1 << 16 else "int32"


_FEATURES: dict[str, dict[str, Any]] = {
    "special_tokens_mask": {"feature": {"dtype": "int8", "_type": "Value"}, "_type": "List"},
    "document": {"dtype": "int64", "_type": "Value"},
}
_TYPES = {"special_tokens_mask": pa.list_(pa.int8()), "document": pa.int64()}


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
        token_type: str = "int32",
        files: Mapping[str, Any] | None = None,
    ) -> None:
        """Continues after `files`, the finished ones of the folder.

        Args:
            around: the ids of [CLS] and [SEP], put around every row; None writes bare tokens.
            special_tokens_mask: adds a column that is 1 at these two and 0 elsewhere.
            document_numbers: adds a column with the number of the document that a row is a piece of.
            file_tokens: tokens after which a file ends.
            token_type: of the tokens on disk, see `choose_token_type`.
        """
        self._folder, self._around, self._file_tokens = folder, around, file_tokens
        self._token_type = np.dtype(token_type)
        columns = {"input_ids": True, "special_tokens_mask": special_tokens_mask, "document": document_numbers}
        self._columns = [name for name, is_written in columns.items() if is_written]
        types = _TYPES | {"input_ids": pa.list_(pa.from_numpy_dtype(self._token_type))}
        self._schema = pa.schema(
            [pa.field(name, types[name]) for name in self._columns],
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
        tokens = {"feature": {"dtype": self._token_type.name, "_type": "Value"}, "_type": "List"}
        return {name: _FEATURES.get(name, tokens) for name in self._columns}

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
            tokens = np.concatenate(self._rows).astype(self._token_type, copy=False)
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
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
