"""Embeddings of a whole input, written to one file: a job of bounded memory that continues where it was killed.

Records are read in their order, a chunk at a time. A chunk is embedded in batches by length, put back in order and
written to `<output>.parts/`; then `progress.json` there says that it is done and where reading continues. What a chunk
holds depends on the input alone, so the chunks of a job that was killed are those of one that was not. At the end the
chunks are put together in a temporary file, which takes the name of the output when it is complete.

| output | holds |
|---|---|
| `.npy` | fp32 `[records, H]`: row i is record i of the input, zeros where it has no text |
| `.parquet` | `id` (number of the record, from 0), `text_sha256`, `embedding` (H floats); null, zeros without text |
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import write_array_header_1_0

from neobert.disk import check_no_writer, only_writer, replacing
from neobert.errors import DataError
from neobert.inference.jobs import JobError, check_absent, load_done, progress_bar, save_done
from neobert.inference.model import Model
from neobert.inference.packed import BATCH_TOKENS
from neobert.inference.texts import InputRecord, Texts
from neobert.model.pooling import choose_pooling

CHUNK_CHARS = 1 << 24
"""A chunk ends after this many characters even when it has few texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSettings:
    """How texts become vectors. Raises ValueError for an unknown pooling and for a size that is not positive."""

    pooling: str = "mean"
    normalize: bool = False
    batch_tokens: int = BATCH_TOKENS
    """Tokens that go through the model at once."""

    chunk_texts: int = 2048
    """Records of the input between two notes of progress."""

    def __post_init__(self) -> None:
        choose_pooling(self.pooling)
        for name in ("batch_tokens", "chunk_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)}; write a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedReport:
    """What a job wrote."""

    num_records: int
    """Rows, each of one record of the input."""

    num_texts: int
    """Records with a text; the others have a row of zeros."""

    num_truncated: int
    """Texts longer than the model, of which the start was embedded."""

    num_resumed: int
    """Records that an earlier, interrupted start had done."""


def embed_to_file(model: Model, texts: Texts, output: Path, settings: EmbedSettings) -> EmbedReport:
    """Embeds an input; see the head of this module.

    Raises:
        JobError: the output exists, has an unknown ending, or belongs to an unfinished job with other settings.
        DataError: the input has no text, or another process is writing this output.
    """
    check_output(output)
    with only_writer(output):
        check_absent(output)  # Another process may have written it in the meantime.
        return _embed_to_file(model, texts, output, settings)


def _embed_to_file(model: Model, texts: Texts, output: Path, settings: EmbedSettings) -> EmbedReport:
    parts = output.with_name(f"{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "progress.json"
    known = {
        **asdict(settings),
        "model": model.digest(),
        "dtype": _dtype(model),
        "input": texts.fingerprint,
        "rows": "records",
    }
    done = load_done(file, known) or _nothing_done()
    num_resumed = sum(done["chunks"])
    texts.num_bad, texts.num_skipped, texts.named = done["num_bad"], done["num_skipped"], done["named"]
    with progress_bar("texts", texts.total, done["num_records"]) as show:
        for chunk in _chunks(texts.records(done["cursor"], done["num_records"]), settings.chunk_texts):
            num_truncated = _embed_chunk(model, chunk, parts / f"{len(done['chunks']):06d}.npz", settings)
            done["chunks"].append(len(chunk))
            done |= {"cursor": chunk[-1].cursor, "num_records": chunk[-1].number + 1}
            done |= {"num_bad": texts.num_bad, "num_skipped": texts.num_skipped, "named": texts.named}
            done["num_truncated"] += num_truncated
            done["num_texts"] += sum(record.text is not None for record in chunk)
            save_done(file, known, done)
            show(texts.num_records)
    if not done["num_texts"]:
        shutil.rmtree(parts)
        raise DataError(f"{texts.label} has no text to embed; check the file and --text-column")
    with replacing(output) as temporary, temporary.open("wb") as out:
        WRITERS[output.suffix](out, parts, done["chunks"], model.hidden_size)
    shutil.rmtree(parts)
    return EmbedReport(
        num_records=sum(done["chunks"]),
        num_texts=done["num_texts"],
        num_truncated=done["num_truncated"],
        num_resumed=num_resumed,
    )


def check_output(output: Path) -> None:
    """Raises JobError when the file exists or its ending is unknown, DataError when another process is writing it."""
    if output.suffix not in WRITERS:
        raise JobError(f"--output: {output} ends in none of {', '.join(WRITERS)}; the ending chooses the format")
    check_no_writer(output)
    check_absent(output)


def _nothing_done() -> dict[str, Any]:
    counts = {"num_records": 0, "num_texts": 0, "num_bad": 0, "num_skipped": 0, "num_truncated": 0}
    return {"chunks": [], "cursor": None, "named": [], **counts}


def _dtype(model: Model) -> str:
    return str(model.module.encoder.block_weight.dtype)


def _chunks(records: Iterator[InputRecord], size: int) -> Iterator[list[InputRecord]]:
    chunk: list[InputRecord] = []
    num_chars = 0
    for record in records:
        chunk.append(record)
        num_chars += len(record.text or "")
        if len(chunk) == size or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _embed_chunk(model: Model, chunk: Sequence[InputRecord], file: Path, settings: EmbedSettings) -> int:
    """Writes the vectors of a chunk, and an empty hash for records without a text; returns how many texts were cut."""
    texts = [record.text for record in chunk if record.text is not None]
    documents, num_truncated = model.encode(texts)
    vectors = np.zeros((len(chunk), model.hidden_size), dtype=np.float32)
    if texts:
        vectors[[record.text is not None for record in chunk]] = model.embed_tokens(
            documents, pooling=settings.pooling, normalize=settings.normalize, batch_tokens=settings.batch_tokens
        ).numpy()
    ids = np.array([record.number for record in chunk], dtype=np.int64)
    hashes = np.array(["" if r.text is None else hashlib.sha256(r.text.encode()).hexdigest() for r in chunk])
    with replacing(file) as temporary:
        np.savez(temporary, vectors=vectors, ids=ids, hashes=hashes)
    return num_truncated


def _write_npy(out: BinaryIO, parts: Path, chunks: Sequence[int], width: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (sum(chunks), width)}
    write_array_header_1_0(out, header)
    for number in range(len(chunks)):
        with np.load(parts / f"{number:06d}.npz") as chunk:
            out.write(chunk["vectors"].astype("<f4").tobytes())


def _write_parquet(out: BinaryIO, parts: Path, chunks: Sequence[int], width: int) -> None:
    fields = [("id", pa.int64()), ("text_sha256", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    with pq.ParquetWriter(out, pa.schema(fields)) as writer:
        for number in range(len(chunks)):
            with np.load(parts / f"{number:06d}.npz") as chunk:
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(chunk["vectors"].reshape(-1)), width)
                hashes = pa.array(chunk["hashes"].tolist(), pa.string(), mask=chunk["hashes"] == "")
                writer.write_table(pa.table([pa.array(chunk["ids"]), hashes, vectors], writer.schema))


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
