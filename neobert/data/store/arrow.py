"""Folders in the layout of `datasets.save_to_disk`: read by memory map with random access, and written.

The Arrow files are mapped, not loaded: a document is a view between two of Arrow's own offsets, so opening a corpus
of any size takes the same memory, and reading a document costs about a microsecond.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
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
from neobert.errors import DataError

INDEXED_LANES = 64
"""Lanes of indexed data when `dataset.num_lanes` is null and there are enough documents."""

MANIFEST = "manifest.json"
"""Beside the data of a folder that this package tokenised: with what it was made."""

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
                f"dataset.path: {folder} refers to its rows by an index; write it again with "
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

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> Sequence[LaneReader]:
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
        self._folder, self._column, self._texts = folder, name, table.column(name)
        if not len(self._texts):
            raise DataError(f"dataset.path: {folder} has no documents; write it again, or name another folder")
        self.notes = [note]
        self.num_bytes = self._texts.nbytes
        self.fingerprint = add_limit(self._make_fingerprint(), max_record_bytes)

    def __getstate__(self) -> dict[str, Any]:
        """What another process need not find again; it maps the same files."""
        return {name: value for name, value in self.__dict__.items() if name != "_texts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._texts = load_table(self._folder).column(self._column)

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
    """Documents [first, last) in one permutation per epoch; lane v of V owns indices v, v + V, ..."""

    def __init__(
        self, texts: IndexedTexts, sharding: Sharding, lane: int, num_lanes: int, first: int, last: int
    ) -> None:
        self._texts, self._sharding, self._lane, self._num_lanes = texts, sharding, lane, num_lanes
        self._first, self._size = first, max(0, last - first)
        self._num_documents = (self._size - lane + num_lanes - 1) // num_lanes
        self.size = texts.num_bytes * self._num_documents // max(1, len(texts))

    def start(self) -> State:
        return {"position": 0}

    def read(self, epoch: int, cursor: State, skip: frozenset[int] = frozenset()) -> Records:
        permute = Permutation(self._size, key(self._sharding.seed, "documents", epoch))
        for begin in range(cursor["position"], self._num_documents, _LANE_DOCUMENTS):
            positions = np.arange(begin, min(self._num_documents, begin + _LANE_DOCUMENTS))
            indices = positions * self._num_lanes + self._lane
            documents = (permute(indices) if self._sharding.shuffle else indices) + self._first
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
