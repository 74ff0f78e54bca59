"""Folders in the layout of `datasets.save_to_disk`: read by memory map with random access, and written.

The Arrow files are mapped, not loaded: a document is a view between two of Arrow's own offsets, so opening a corpus
of any size takes the same memory, and reading a document costs about a microsecond.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neobert.config.nesting import parse_json
from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.fingerprint import Fingerprint, digest_documents, spread
from neobert.data.rows.lanes import State
from neobert.data.rows.order import Permutation, key
from neobert.data.source.documents import TextDocuments
from neobert.data.source.sharing import check_part, too_few
from neobert.data.source.spec import choose_candidates, choose_text_column, split_schema
from neobert.data.source.text import WHOLE, LaneReader, Record, Records, Sharding, Span, TooLong, add_limit
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

INDEXED_LANES = 64
"""Lanes of indexed data when `dataset.num_lanes` is null and there are enough documents."""

MANIFEST = "manifest.json"
"""Beside the data of a folder that this package tokenised: with what it was made."""

_SAMPLE = 4096
_LANE_DOCUMENTS = 256
_EXAMPLES = 100


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


class IndexedTexts(TextDocuments):
    """Texts with random access; a cursor is `{"position": number of texts before}`. Subclasses give size and texts."""

    num_bytes: int
    is_indexed = True

    def __len__(self) -> int:
        raise NotImplementedError

    def text(self, document: int) -> str | None:
        """The text of a document, None when it has none.

        Raises:
            UnicodeDecodeError, TooLong: it is a bad record.
        """
        raise NotImplementedError

    def record(self, document: int, cursor: State) -> Record:
        """The record of one document."""
        try:
            text = self.text(document)
        except (UnicodeDecodeError, TooLong) as error:
            return Record(document, None, f"{self._label()}, number {document + 1}: {error}", cursor)
        return Record(document, text if text is not None and text.strip() else None, None, cursor)

    def records(self, span: Span = WHOLE) -> Records:
        first, last = self._numbers(span)
        for document in range(first, last):
            yield self.record(document, {"position": document + 1})

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> list[LaneReader]:
        first, last = self._numbers(span)
        count = sharding.num_lanes or choose_indexed_lanes(last - first, _LANE_DOCUMENTS)
        return [PermutedReader(self, sharding, lane, count, first, last) for lane in range(count)]

    def count(self, span: Span = WHOLE) -> int:
        first, last = self._numbers(span)
        return last - first

    def cursor_after(self, number: int) -> State:
        if number > len(self):
            raise too_few(self._label(), number, len(self))
        return {"position": number}

    def part(self, number: int, count: int) -> Span:
        check_part(number, count, len(self), self._label())
        first, last = len(self) * number // count, len(self) * (number + 1) // count
        return Span(
            after={"position": first} if number else None, until={"position": last} if number + 1 < count else None
        )

    def _label(self) -> str:
        return f"the source of {len(self)} documents"

    def _numbers(self, span: Span) -> tuple[int, int]:
        return span.numbers("position", len(self))


class ArrowTexts(IndexedTexts):
    """A folder of `save_to_disk` with a text column: random access to texts, tokenised when a window opens."""

    def __init__(self, folder: Path, column: str | None, max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self._max_record_bytes = max_record_bytes
        table = load_table(folder)
        texts, others = split_schema(table.schema, column)
        candidates = choose_candidates({name: _examples(table.column(name)) for name in texts}, column)
        name, note = choose_text_column(candidates, [*others, *(set(texts) - set(candidates))], column, str(folder))
        self._texts = table.column(name)
        if not len(self._texts):
            raise DataError(f"dataset.path: {folder} has no documents; write it again, or name another folder")
        self.notes = [note]
        self.num_bytes = self._texts.nbytes
        self.fingerprint = add_limit(self._make_fingerprint(), max_record_bytes)

    def _make_fingerprint(self) -> Fingerprint:
        lengths = map(_byte_lengths, self._texts.chunks)
        return Fingerprint(digest_documents(lengths, len(self), self._raw), self._first_fingerprint())

    def _raw(self, document: int) -> bytes | memoryview:
        cell = _plain_cell(self._texts[document])
        return b"" if cell is None else memoryview(cell.as_buffer())

    def _first_fingerprint(self) -> str:
        """As versions before this form made it: heads of 64 documents."""
        digest = hashlib.sha256(f"{len(self._texts)}\0".encode())
        for document in spread(len(self), 64):
            digest.update(str(self._texts[document].as_py())[:65536].encode("utf-8", "surrogatepass"))
        return f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, document: int) -> str | None:
        return as_text(self._texts[document], self._max_record_bytes)


def _byte_lengths(chunk: pa.Array) -> NDArray[np.int64]:
    """Bytes of every text of a column, -1 for null; `chunk` has any type that `split_schema` takes."""
    if pa.types.is_null(chunk.type):
        return np.full(len(chunk), -1)
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if pa.types.is_string_view(chunk.type) or pa.types.is_binary_view(chunk.type):
        chunk = chunk.cast(pa.large_binary())
    lengths: NDArray[np.int64] = pc.fill_null(pc.binary_length(chunk), -1).to_numpy(zero_copy_only=False)
    return lengths


def _plain_cell(value: pa.Scalar) -> pa.Scalar | None:
    """A cell without its dictionary; None for null."""
    value = value.value if isinstance(value, pa.DictionaryScalar) else value
    return value if value is not None and value.is_valid else None


def _examples(column: pa.ChunkedArray) -> list[str]:
    """Some texts of a column."""
    found = []
    for cell in column[:_EXAMPLES]:
        with suppress(UnicodeDecodeError):
            found.append(cell.as_py())
    return [text for text in found if isinstance(text, str)]


class PermutedReader:
    """Documents [first, last) in one permutation per epoch; lane v of V owns places v, v + V, ..."""

    def __init__(
        self, texts: IndexedTexts, sharding: Sharding, lane: int, num_lanes: int, first: int, last: int
    ) -> None:
        self._texts, self._sharding, self._lane, self._num_lanes = texts, sharding, lane, num_lanes
        self._first, self._size = first, max(0, last - first)
        self._num_places = (self._size - lane + num_lanes - 1) // num_lanes
        self.size = texts.num_bytes * self._num_places // max(1, len(texts))

    def start(self) -> State:
        return {"position": 0}

    def read(self, epoch: int, cursor: State, skip: frozenset[int] = frozenset()) -> Records:
        permute = Permutation(self._size, key(self._sharding.seed, "documents", epoch))
        for begin in range(cursor["position"], self._num_places, _LANE_DOCUMENTS):
            positions = np.arange(begin, min(self._num_places, begin + _LANE_DOCUMENTS))
            places = positions * self._num_lanes + self._lane
            documents = (permute(places) if self._sharding.shuffle else places) + self._first
            for position, document in zip(positions.tolist(), documents.tolist()):
                yield self._texts.record(document, {"position": position + 1})


def as_text(value: pa.Scalar, max_record_bytes: int) -> str | None:
    """The text of a cell, None for null.

    Raises:
        TooLong: it has more than `max_record_bytes` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    cell = _plain_cell(value)
    if cell is None:
        return None
    if (size := cell.as_buffer().size) > max_record_bytes:
        raise TooLong(size, max_record_bytes)
    text: str | bytes = cell.as_py()
    return text.decode("utf-8") if isinstance(text, bytes) else text


def choose_indexed_lanes(num_documents: int, window_documents: int) -> int:
    """Lanes of data with random access: every lane should fill at least one window."""
    return max(1, min(INDEXED_LANES, num_documents // window_documents))


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
