"""Documents of a tokenised folder, read again from one end to the other; pieces of a document are put together."""

from collections.abc import Generator

import numpy as np

from neobert.data.arrow import TokenStore
from neobert.data.encode import EncodedDocument
from neobert.data.lanes import State
from neobert.data.text import RecordCounts

_BLOCK = 1 << 16


class StoredTokens:
    """A `TokenStore` as a source of whole documents; a cursor is `{"row": the next row}`."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        self.fingerprint: str = store.fingerprint

    def documents(self, after: State | None, counts: RecordCounts) -> Generator[EncodedDocument, None, None]:
        row = 0 if after is None else after["row"]
        for end in self._ends(row):
            pieces = [self._store.content(number) for number in range(row, end)]
            tokens = np.concatenate(pieces).astype(np.int32, copy=False)
            yield EncodedDocument(row, tokens, {"row": end}, counts.bad, counts.skipped)
            row = end

    def count(self) -> int | None:
        return len(self._store) if self._store.document_numbers is None else None

    def _ends(self, row: int) -> Generator[int, None, None]:
        """For each document from `row` on: the row behind its last one."""
        numbers = self._store.document_numbers
        if numbers is None:
            yield from range(row + 1, len(self._store) + 1)
            return
        for begin in range(row, len(self._store), _BLOCK):
            block = numbers[begin : begin + _BLOCK + 1]
            yield from (np.flatnonzero(block[1:] != block[:-1]) + begin + 1).tolist()
        if row < len(self._store):
            yield len(self._store)
