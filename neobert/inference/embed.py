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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import write_array_header_1_0

from neobert.disk import check_no_writer, only_writer, replacing
from neobert.errors import DataError
from neobert.inference.jobs import JobError, TextJob, Throughput, check_absent, cut_in_groups
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

    throughput: Throughput


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
    known = {**asdict(settings), "model": model.digest(), "dtype": _dtype(model), "rows": "records"}
    job = TextJob(texts, parts / "progress.json", known, num_chunks=0, num_truncated=0)
    done = job.done
    if "chunks" in done:  # An earlier version listed them.
        done["num_chunks"] = len(done.pop("chunks"))
    num_resumed = done["num_records"]

    def embed_group(group: Sequence[InputRecord]) -> None:
        _embed_chunk(model, group, parts / f"{done['num_chunks']:06d}.npz", settings, job)

    throughput = job.run("texts", cut_in_groups(job.records(), settings.chunk_texts, CHUNK_CHARS), embed_group)
    if not done["num_texts"]:
        shutil.rmtree(parts)
        raise DataError(f"{texts.label} has no text to embed; check the file and --text-column")
    with replacing(output) as temporary, temporary.open("wb") as out:
        chunks = [parts / f"{number:06d}.npz" for number in range(done["num_chunks"])]
        WRITERS[output.suffix](out, chunks, done["num_records"], model.hidden_size)
    shutil.rmtree(parts)
    return EmbedReport(
        num_records=done["num_records"],
        num_texts=done["num_texts"],
        num_truncated=done["num_truncated"],
        num_resumed=num_resumed,
        throughput=throughput,
    )


def check_output(output: Path) -> None:
    """Raises JobError when the file exists or its ending is unknown, DataError when another process is writing it."""
    if output.suffix not in WRITERS:
        raise JobError(f"--output: {output} ends in none of {', '.join(WRITERS)}; the ending chooses the format")
    check_no_writer(output)
    check_absent(output)


def _dtype(model: Model) -> str:
    return str(model.module.encoder.block_weight.dtype)


def _embed_chunk(model: Model, chunk: Sequence[InputRecord], file: Path, settings: EmbedSettings, job: TextJob) -> None:
    """Writes the vectors of a chunk, and an empty hash for records without a text."""
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
    job.done["num_chunks"] += 1
    job.done["num_truncated"] += num_truncated
    job.done["num_texts"] += len(texts)
    job.done["num_tokens"] += sum(map(len, documents))


def _write_npy(out: BinaryIO, chunks: Sequence[Path], num_records: int, width: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_records, width)}
    write_array_header_1_0(out, header)
    for path in chunks:
        with np.load(path) as chunk:
            out.write(chunk["vectors"].astype("<f4").tobytes())


def _write_parquet(out: BinaryIO, chunks: Sequence[Path], num_records: int, width: int) -> None:
    fields = [("id", pa.int64()), ("text_sha256", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    with pq.ParquetWriter(out, pa.schema(fields)) as writer:
        for path in chunks:
            with np.load(path) as chunk:
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(chunk["vectors"].reshape(-1)), width)
                hashes = pa.array(chunk["hashes"].tolist(), pa.string(), mask=chunk["hashes"] == "")
                writer.write_table(pa.table([pa.array(chunk["ids"]), hashes, vectors], writer.schema))


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
