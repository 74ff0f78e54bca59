"""Tokenised documents written in the layout of `datasets.save_to_disk`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neobert.data.arrow import MANIFEST
from neobert.data.lanes import IntArray


class TokenWriter:
    """Writes tokenised documents as a folder that `datasets.load_from_disk` and `TokenStore` read.

    Memory is bounded by `_BATCH_TOKENS`; a file is closed after `_FILE_TOKENS`. Equal documents give equal bytes.
    """

    _BATCH_TOKENS = 1 << 20
    _FILE_TOKENS = 1 << 27

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        features = {"input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}}
        self._features = features
        self._schema = pa.schema(
            [pa.field("input_ids", pa.list_(pa.int32()))],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        self._names: list[str] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._waiting: list[IntArray] = []
        self._waiting_tokens = self._file_tokens = 0
        self.num_documents = self.num_tokens = 0

    def add(self, tokens: IntArray) -> None:
        """Appends one document."""
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self.num_documents += 1
        self.num_tokens += len(tokens)
        if self._waiting_tokens >= self._BATCH_TOKENS:
            self._flush()

    def close(self, manifest: dict[str, Any]) -> None:
        """Writes what is left, and the files that describe the folder."""
        self._flush()
        self._close_file()
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._names],
            "_fingerprint": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {"features": self._features}
        for name, value in (("dataset_info.json", info), (MANIFEST, manifest), ("state.json", state)):
            (self._folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        if self._writer is None:
            self._names.append(f"data-{len(self._names):05d}.arrow")
            self._writer = pa.ipc.new_stream(str(self._folder / self._names[-1]), self._schema)
        if self._waiting:
            offsets = np.cumsum([0, *map(len, self._waiting)], dtype=np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._waiting)))
            self._writer.write_batch(pa.record_batch([lists], schema=self._schema))
        self._file_tokens += self._waiting_tokens
        self._waiting, self._waiting_tokens = [], 0
        if self._file_tokens >= self._FILE_TOKENS:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._file_tokens = None, 0
