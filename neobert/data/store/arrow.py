"""Folders in the layout of `datasets.save_to_disk`: read by memory map with random access, and written.

The Arrow files are mapped, not loaded: a document is a view between two of Arrow's own offsets, so opening a corpus
of any size takes the same memory, and reading a document costs about a microsecond.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neobert.config.nesting import parse_json
from neobert.data.fingerprint import Fingerprint, digest_documents, spread
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

MANIFEST = "manifest.json"
"""Beside the data of a folder that this package tokenised: with what it was made."""

_SAMPLE = 4096


def load_table(folder: Path) -> pa.Table:
    """The memory-mapped table of a folder written by `save_to_disk`.

    Raises:
        DataError: the folder is not one, is damaged, or holds a selection that was not written out.
    """
    try:
        state = parse_json((folder / "state.json").read_text())
        if state.get("_indices_files"):
            raise DataError(
                f"dataset.path: {folder} refers to its rows by an index; write it anew with "
                "`dataset.flatten_indices().save_to_disk(...)`"
            )
        if not state["_data_files"]:
            raise DataError(f"dataset.path: {folder} has no documents; write it again, or name another folder")
        tables = [
            pa.ipc.open_stream(pa.memory_map(str(folder / file["filename"]))).read_all()
            for file in state["_data_files"]
        ]
        return pa.concat_tables(tables)
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"dataset.path: {folder} cannot be read as a folder of save_to_disk ({type(error).__name__}: {error}); "
            "write it again"
        ) from error


class TokenStore:
    """Tokenised documents on disk. [CLS] and [SEP] around a document on disk are not part of its content.

    Every token is compared with the vocabulary when it is read; what is read of a store may raise DataError.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        manifest = read_manifest(folder) or {}
        made_with = manifest.get("tokenizer_digest", tokenizer.digest)
        if made_with != tokenizer.digest:
            raise DataError(
                f"dataset.path: {folder} was made with a tokenizer of digest {made_with}, this one has "
                f"{tokenizer.digest}; name that one with tokenizer.name or tokenizer.path, or tokenise again"
            )
        table = load_table(folder)
        column = table.column("input_ids")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self._offsets, self._values = [], []
        for chunk in column.chunks:
            offsets, values = _list_arrays(chunk, folder)
            self._offsets.append(offsets)
            self._values.append(values)
        self._cls_id, self._sep_id, self._num_ids = tokenizer.cls_id, tokenizer.sep_id, tokenizer.size
        self._documents = table.column("document") if "document" in table.column_names else None
        self._stripped = False
        found = self._check_sample(tokenizer)
        self._stripped = bool(manifest.get("special_tokens", found))
        self.fingerprint = self._make_fingerprint()
        self.notes = ["special tokens on disk are passed over"] if self._stripped else []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def count(self) -> int:
        """Number of source documents: fewer than rows where long ones were cut before they were stored."""
        if self.document_numbers is None or not len(self):
            return len(self)
        return int(self.document_numbers[-1]) + 1

    def documents_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the source document of each row; the rows themselves unless documents were cut."""
        return rows if self.document_numbers is None else self.document_numbers[rows]

    def row_of(self, document: int) -> int:
        """First row of a source document."""
        return document if self.document_numbers is None else int(np.searchsorted(self.document_numbers, document))

    def document_at(self, row: int) -> int:
        """Number of the source document of a row; behind the last row, the number of documents."""
        if self.document_numbers is None:
            return row
        return int(self.document_numbers[row]) if row < len(self) else self.count()

    @cached_property
    def document_numbers(self) -> NDArray[np.int64] | None:
        """Number of the source document that each row is a piece of, 0 and up without gaps; None where documents are
        whole."""
        if self._documents is None:
            return None
        stored = np.concatenate([chunk.to_numpy(zero_copy_only=True) for chunk in self._documents.chunks])
        # Machines that share the work number their documents without knowing of each other: only changes count.
        return np.cumsum(np.diff(stored, prepend=stored[:1]) != 0)

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these documents without special tokens."""
        bounds = [self._bounds(document) for document in documents.tolist()]
        return np.array([end - start for _, start, end in bounds], dtype=np.int64)

    def content(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a document without special tokens: a view of the file, in the file's integer type.

        Raises:
            DataError: one of them is no token of the tokenizer.
        """
        values, first, end = self._bounds(int(document))
        tokens = values[first:end][start:stop]
        place = self._first_outside(tokens)
        if place is not None:
            raise self._refuse(int(tokens[place]), int(document))
        return tokens

    def all_lengths(self) -> NDArray[np.int64]:
        """`lengths` of every document, from the offsets alone: where special tokens were found on disk, each document
        is taken to have two of them."""
        raw = np.concatenate([np.diff(offsets) for offsets in self._offsets]) if self._offsets else np.empty(0, int)
        return np.maximum(0, raw.astype(np.int64) - (2 if self._stripped else 0))

    def _first_outside(self, tokens: NDArray[Any]) -> int | None:
        """Where the first number stands that is no token; two passes over the numbers, without a copy."""
        if not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._num_ids):
            return None
        return int(np.flatnonzero((tokens < 0) | (tokens >= self._num_ids))[0])

    def _refuse(self, token: int, row: int) -> DataError:
        found = f"dataset.path: {self._folder} holds token {token} at document {self.document_at(row)}, but "
        if token < 0:
            return DataError(
                f"{found}tokens begin at 0: labels or marks of padding are in input_ids; write it again without them"
            )
        return DataError(
            f"{found}the tokenizer has only {self._num_ids}: another one made it; name that one with tokenizer.name or "
            "tokenizer.path, or tokenise again"
        )

    def token_blocks(self, max_tokens: int) -> Iterator[NDArray[Any]]:
        """Runs of raw tokens, spread evenly over the store, together at most about `max_tokens`.

        Raises:
            DataError: one of them is no token of the tokenizer.
        """
        total = int(sum(int(offsets[-1]) - int(offsets[0]) for offsets in self._offsets))
        share = min(1.0, max_tokens / max(1, total))
        for first_row, offsets, values in zip(self._starts, self._offsets, self._values):
            begin, end = int(offsets[0]), int(offsets[-1])
            block = values[begin : min(end, begin + max(1, int((end - begin) * share)))]
            place = self._first_outside(block)
            if place is not None:
                row = int(np.searchsorted(offsets, begin + place, side="right")) - 1
                raise self._refuse(int(block[place]), int(first_row) + row)
            yield block

    def _bounds(self, document: int) -> tuple[NDArray[Any], int, int]:
        chunk = int(np.searchsorted(self._starts, document, side="right")) - 1
        offsets, values = self._offsets[chunk], self._values[chunk]
        place = document - int(self._starts[chunk])
        start, end = int(offsets[place]), int(offsets[place + 1])
        if self._stripped and start < end:
            start += int(values[start] == self._cls_id)
            end -= int(start < end and values[end - 1] == self._sep_id)
        return values, start, end

    def _check_sample(self, tokenizer: Tokenizer) -> bool:
        """Looks at documents spread over the store; whether special tokens stand around them."""
        sample = [content for d in spread(len(self), _SAMPLE) if len(content := self.content(d))]
        padding = {tokenizer.pad_id} - {tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id}
        if any(int(tokens[-1]) in padding for tokens in sample):
            raise DataError(
                f"dataset.path: {self._folder} holds padded documents; tokenise again without padding, "
                "which is added here where it is needed"
            )
        return any(tokens[0] == self._cls_id or tokens[-1] == self._sep_id for tokens in sample)

    def _make_fingerprint(self) -> Fingerprint:
        lengths: list[NDArray[np.int64]] = [np.diff(offsets) for offsets in self._offsets]
        if self.document_numbers is not None:
            lengths.append(self.document_numbers)
        return Fingerprint(digest_documents(lengths, len(self), self._raw), self._first_fingerprint())

    def _raw(self, document: int) -> bytes:
        """Tokens as they are on disk."""
        chunk = int(np.searchsorted(self._starts, document, side="right")) - 1
        offsets, place = self._offsets[chunk], document - int(self._starts[chunk])
        return self._values[chunk][int(offsets[place]) : int(offsets[place + 1])].astype(np.int32).tobytes()

    def _first_fingerprint(self) -> str:
        """As versions before this form made it: heads of 64 documents, and lengths of files."""
        digest = hashlib.sha256(f"{len(self)}\0".encode())
        digest.update(np.array([len(values) for values in self._values], dtype=np.int64).tobytes())
        for document in spread(len(self), 64):
            digest.update(self.content(document)[:4096].astype(np.int32).tobytes())
        return f"sha256:{digest.hexdigest()}"


def _list_arrays(chunk: pa.Array, folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Offsets and flat values of a chunk of lists, without a copy."""
    if pa.types.is_fixed_size_list(chunk.type):
        width = chunk.type.list_size
        offsets = (np.arange(len(chunk) + 1) + chunk.offset) * width
    elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        offsets = chunk.offsets.to_numpy(zero_copy_only=True)
    else:
        raise DataError(f"dataset.path: column input_ids of {folder} is {chunk.type}; lists of integers are needed")
    if chunk.null_count or chunk.values.null_count or not pa.types.is_integer(chunk.values.type):
        raise DataError(f"dataset.path: column input_ids of {folder} must hold lists of integers without nulls")
    return offsets, chunk.values.to_numpy(zero_copy_only=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that this package wrote, or None."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = parse_json(path.read_text())
    return manifest


def column_names(folder: Path) -> Sequence[str]:
    """Columns of a folder of `save_to_disk`."""
    names: Sequence[str] = load_table(folder).column_names
    return names
