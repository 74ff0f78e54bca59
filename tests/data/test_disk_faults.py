"""Data that is damaged on disk: named, counted or skipped shard by shard, never read forever."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from neobert.config.schema_data import DatasetSection
from neobert.data.source.files import DataFile
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import BadShard, Sharding
from neobert.errors import DataError

NUM_FILES = 3
PER_FILE = 400


def write_corpus(folder, ending):
    folder.mkdir(exist_ok=True)
    for number in range(NUM_FILES):
        texts = [f"file {number} text {n} {n * 7919 % 1000}" for n in range(PER_FILE)]
        path = folder / f"{number}.{ending}"
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if ending == "parquet":
            # Pages of plain text, so that damage is damage to what is read.
            pq.write_table(
                pa.table({"text": texts}), path, row_group_size=100, use_dictionary=False, write_page_checksum=True
            )
        elif ending.endswith("gz"):
            path.write_bytes(gzip.compress(content))
        elif ending.endswith("zst"):
            path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(content))
        else:
            path.write_bytes(content)
    return folder


def open_source(folder, **values):
    return list_splits(*describe_sources(DatasetSection(path=str(folder), **values)))["train"](None)


def read_on(reader, skip=frozenset(), epoch=0):
    """What a lane with `on_bad_shard: skip` does: (texts, numbers of bad shards, messages)."""
    texts, bad, messages, cursor = [], [], [], reader.start()
    while True:
        try:
            for record in reader.read(epoch, cursor, skip):
                texts.append(record.text)
            return texts, bad, messages
        except BadShard as error:
            bad.append(error.shard)
            messages.append(str(error))
            cursor = json.loads(json.dumps(error.next_cursor))
            assert len(bad) < 50


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-500])


def flip_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(255 - byte for byte in content[middle : middle + 20])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("ending", "damage", "words"),
    [
        ("jsonl.gz", cut_off, r"1.jsonl.gz cannot be decompressed \(Compressed file ended"),
        ("jsonl.gz", flip_bytes, r"1.jsonl.gz cannot be decompressed \("),
        ("jsonl.zst", cut_off, r"1.jsonl.zst cannot be decompressed \(the file ends in the middle of a frame"),
        ("jsonl.zst", flip_bytes, r"1.jsonl.zst cannot be decompressed \("),
        ("jsonl", Path.unlink, r"1.jsonl cannot be read \(.*No such file"),
    ],
)
def test_a_damaged_file(ending, damage, words, tmp_path):
    """What can be read before the damage is read; the other files are whole."""
    folder = write_corpus(tmp_path / "d", ending)
    if ending != "jsonl":
        damage(folder / f"1.{ending}")
    source = open_source(folder)
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    if ending == "jsonl":
        damage(folder / f"1.{ending}")
    with pytest.raises(BadShard, match=words) as failure:
        list(reader.read(0, reader.start()))
    assert "dataset.on_bad_shard: skip" in str(failure.value)
    assert failure.value.shard == 1
    texts, bad, _ = read_on(reader)
    assert bad == [1]
    for number in (0, 2):
        assert sum(text.startswith(f"file {number} ") for text in texts) == PER_FILE
    assert 0 <= sum(text.startswith("file 1 ") for text in texts) < PER_FILE
    for epoch in (0, 1):
        again, bad, _ = read_on(reader, skip=frozenset([1]), epoch=epoch)
        assert (len(again), bad) == (2 * PER_FILE, [])
        assert not any(text.startswith("file 1 ") for text in again)


def test_the_position_after_a_bad_shard_is_the_same_after_a_restart(tmp_path):
    folder = write_corpus(tmp_path / "d", "jsonl.gz")
    cut_off(folder / "1.jsonl.gz")
    for sharding in (Sharding(seed=1, num_lanes=1), Sharding(seed=1, num_lanes=8, exact=True)):
        runs = [[read_on(reader) for reader in open_source(folder).readers(sharding)] for _ in range(2)]
        assert runs[0] == runs[1]
        skipping = [read_on(r, skip=frozenset([1])) for r in open_source(folder).readers(sharding)]
        assert sum(len(texts) for texts, _, _ in skipping) == 2 * PER_FILE


def test_source_order_has_the_same_fault(tmp_path):
    folder = write_corpus(tmp_path / "d", "jsonl.gz")
    cut_off(folder / "1.jsonl.gz")
    with pytest.raises(BadShard, match=r"1.jsonl.gz") as failure:
        list(open_source(folder).records())
    assert (failure.value.shard, failure.value.next_cursor) == (1, {"shard": 2, "position": None})


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_a_file_that_may_not_be_read(ending, error, tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "d", ending)
    whole = open_source(folder)
    real = DataFile.open_raw

    def refuse(self):
        if self.name.startswith("1."):
            raise error
        return real(self)

    monkeypatch.setattr(DataFile, "open_raw", refuse)
    (reader,) = whole.readers(Sharding(seed=1, num_lanes=1))
    texts, bad, messages = read_on(reader)
    assert len(texts) == 2 * PER_FILE
    assert sorted(bad) == ([4, 5, 6, 7] if ending == "parquet" else [1])
    assert all(f"1.{ending} cannot be read" in message and error.strerror in message for message in messages)
    with pytest.raises(DataError, match=rf"1.{ending} cannot be read .*dataset.on_bad_shard: skip"):
        open_source(folder)
    (reader,) = open_source(folder, on_bad_shard="skip").readers(Sharding(seed=1, num_lanes=1))
    texts, bad, _ = read_on(reader)
    assert (len(texts), len(bad)) == (2 * PER_FILE, 1)


def test_a_parquet_footer(tmp_path):
    folder = write_corpus(tmp_path / "d", "parquet")
    path = folder / "1.parquet"
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(DataError, match=r"1.parquet cannot be read .*dataset.on_bad_shard: skip"):
        open_source(folder)
    source = open_source(folder, on_bad_shard="skip")
    assert source.count() == 2 * PER_FILE
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    texts, bad, messages = read_on(reader)
    assert (len(texts), bad) == (2 * PER_FILE, [4])
    assert "1.parquet cannot be read" in messages[0]
    assert len(read_on(reader, skip=frozenset([4]))[0]) == 2 * PER_FILE
    for number in (0, 2):
        (folder / f"{number}.parquet").unlink()
    with pytest.raises(DataError, match=r"no footer of .* can be read"):
        open_source(folder, on_bad_shard="skip")


def test_a_parquet_row_group(tmp_path):
    folder = write_corpus(tmp_path / "d", "parquet")
    path = folder / "1.parquet"
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(content)
    (reader,) = open_source(folder).readers(Sharding(seed=1, num_lanes=1))
    texts, bad, messages = read_on(reader)
    assert (len(texts), bad) == (3 * PER_FILE - 100, [6])
    assert "row group 2 of" in messages[0]
    assert "1.parquet cannot be read" in messages[0]


def test_empty_files_are_skipped(tmp_path):
    for ending in ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "csv"):
        folder = tmp_path / ending
        folder.mkdir()
        empty = {"gz": gzip.compress(b""), "zst": zstandard.compress(b"")}.get(ending[6:], b"")
        (folder / f"a.{ending}").write_bytes(empty)
        with pytest.raises(DataError, match=r"has no text: all of its 1 files are empty"):
            open_source(folder)
    (tmp_path / "jsonl.gz" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    source = open_source(tmp_path / "jsonl.gz")
    assert source.notes == ["text from column 'text'", "1 empty files are skipped"]
    assert len(source.readers(Sharding(seed=1, num_lanes=None))) == 1
    assert [record.text for record in source.records()] == ["one", "two"]


def test_empty_parquet_files_and_groups(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no text: all of its 1 files are empty"):
        open_source(tmp_path)
    pq.write_table(pa.table({"text": ["one", None, " ", "two"]}), tmp_path / "b.parquet")
    source = open_source(tmp_path)
    assert [record.text for record in source.records()] == ["one", None, None, "two"]
    assert len(source.readers(Sharding(seed=1, num_lanes=None))) == 1


def test_every_record_bad(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "not json\n" * 50)
    (tmp_path / "b.jsonl").write_text("not json\n" * 50)
    with pytest.raises(DataError, match=r"b.jsonl has no text: .*line 1: Expecting value.*on_bad_shard: skip"):
        open_source(tmp_path)
    assert [r.text for r in open_source(tmp_path, on_bad_shard="skip").records() if r.text] == ["good"]
    (tmp_path / "b.jsonl").write_text("not json\n" * 50 + '{"text": "good"}\n')
    (reader,) = open_source(tmp_path).readers(Sharding(seed=1, num_lanes=1))
    records = list(reader.read(0, reader.start()))
    assert sum(record.problem is not None for record in records) == 100
    assert sorted({record.problem.split(":")[0] for record in records if record.problem}) == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]


def test_invalid_utf8_in_parquet_is_a_bad_record(tmp_path):
    values = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    records = list(open_source(tmp_path).records())
    assert [record.text for record in records] == ["good", None, "fine"]
    assert records[1].problem.startswith(f"{tmp_path}/a.parquet: row group 0, row 2: 'utf-8' codec")
