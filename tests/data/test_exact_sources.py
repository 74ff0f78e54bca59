"""Every kind of source keeps the same promises: spans, parts, lanes and cursors give each record exactly once."""

import csv
import gzip
import io
import json
import random
from itertools import chain, islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from neobert.config.schema_data import DatasetSection
from neobert.data.source import hub, lines, parquet
from neobert.data.source.documents import TextDocuments
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import WHOLE, Sharding, Span
from neobert.errors import DataError

NUM_FILES = 5
KINDS = (
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "line.txt",
    "paragraph.txt",
    "paragraph.txt.zst",
    "document.txt",
    "csv",
    "tsv.gz",
    "parquet",
    "arrow",
    "hub",
)
SHARDS = {"jsonl.gz": 5, "jsonl.zst": 5, "paragraph.txt.zst": 5, "document.txt": 5, "csv": 5, "tsv.gz": 5, "hub": 5}
SHARDS |= {"parquet": 14}
"""Stretches that cannot be cut further."""


def write_bytes(path, content):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        # Two frames, as appending makes them.
        half = len(content) // 2
        content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    path.write_bytes(content)


def make_texts(number):
    """A file's documents, of many lengths."""
    draw = random.Random(number)
    return [f"file {number} text {n} e" + "é" * draw.choice([0, 0, 3, 40, 200]) for n in range(9 + 4 * number)]


def encode(kind, texts, number):
    """A file's bytes; kinds of text also have blank lines, a mark at the start and Windows line ends."""
    form = kind.split(".")[0]
    if form == "jsonl":
        lines = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
        lines.insert(3, "")
        return "\n".join(lines).encode()
    if form == "line":
        return b"\xef\xbb\xbf" + "\r\n".join([*texts[:3], "", " ", *texts[3:]]).encode()
    if form == "paragraph":
        paragraphs = [text + f"\n  second line of {text[:9]}" * (n % 3) for n, text in enumerate(texts)]
        gaps = ["\n\n", "\n \n", "\n\n\n\n", "\r\n\r\n"]
        return ("\n\n" * (number % 3) + "".join(p + gaps[n % 4] for n, p in enumerate(paragraphs))).encode()
    if form == "document":
        return "\n".join(texts).encode() + b"\n"
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if form == "tsv" else ",", lineterminator="\r\n")
    writer.writerow(["id", "text"])
    for n, text in enumerate(texts):
        writer.writerow([n, f'{text}\nsays "x", and, \t continues' if n % 3 == 0 else text])
    return b"\xef\xbb\xbf" + out.getvalue().encode()


def expected_texts(kind, texts):
    form = kind.split(".")[0]
    if form == "paragraph":
        return [text + f"\n  second line of {text[:9]}" * (n % 3) for n, text in enumerate(texts)]
    if form == "document":
        return ["\n".join(texts)]
    if form in ("csv", "tsv"):
        return [f'{text}\nsays "x", and, \t continues' if n % 3 == 0 else text for n, text in enumerate(texts)]
    return texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (source, its texts in order)."""
    root = tmp_path_factory.mktemp("exact")
    files = [make_texts(number) for number in range(NUM_FILES)]
    found = {}
    for kind in KINDS:
        folder = root / kind.replace(".", "_")
        folder.mkdir()
        (spec,) = describe_sources(
            DatasetSection(path=str(folder), sample_by=kind.split(".")[0] if "txt" in kind else "line")
        )
        for number, texts in enumerate(files):
            if kind == "parquet":
                pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=8)
            elif kind == "hub":
                write_bytes(folder / f"{number}.jsonl.gz", encode("jsonl", texts, number))
            elif kind != "arrow":
                write_bytes(
                    folder / f"{number}.{kind.split('.', 1)[1] if 'txt' in kind else kind}",
                    encode(kind, texts, number),
                )
        if kind == "arrow":
            Dataset.from_dict({"text": list(chain(*files))}).save_to_disk(folder)
        elif kind not in ("parquet", "hub"):
            write_bytes(folder / f"empty.{'txt' if 'txt' in kind else kind}", b"")
        if kind == "hub":
            (spec,) = describe_sources(DatasetSection(name=str(folder), cache_dir=str(root / "cache")))
        found[kind] = (list_splits(spec)["train"](None), list(chain(*(expected_texts(kind, texts) for texts in files))))
    return found


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def source(kind, made) -> TextDocuments:
    return made[kind][0]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """So that the corpus is many batches and many lanes long."""
    monkeypatch.setattr(hub, "_STATE_EVERY", 4)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 3)
    for module in (lines, parquet):
        monkeypatch.setattr(module, "MIN_LANE_BYTES", 1000)


def content(records):
    return [(record.document, record.text, record.problem) for record in records]


def test_source_order(kind, made):
    source, texts = made[kind]
    records = list(source.records())
    assert [record.text for record in records if record.text is not None] == texts
    assert [record.problem for record in records if record.problem] == []
    numbers = [record.document for record in records]
    assert numbers == sorted(set(numbers))
    assert source.count() in (None, len(records))
    assert (source.count() is None) == (kind not in ("parquet", "arrow"))


def test_a_span_starts_and_ends_at_any_cursor(source):
    records = list(source.records())
    draw = random.Random(1)
    indices = {0, len(records) - 1, *(draw.randrange(len(records)) for _ in range(12))}
    for first in sorted(indices):
        after = json.loads(json.dumps(records[first].cursor))
        assert list(source.records(Span(after=after))) == records[first + 1 :]
        assert list(source.records(Span(until=after))) == records[: first + 1]
        last = draw.randrange(first, len(records))
        assert list(source.records(Span(after=after, until=records[last].cursor))) == records[first + 1 : last + 1]


def test_a_cursor_by_number(source):
    records = list(source.records())
    for number in {1, 2, 8, 9, 10, 30, len(records)} & set(range(len(records) + 1)):
        found = source.cursor_after(number)
        rest = content(source.records(Span(after=found)))
        assert rest == content(records[number:])
        assert found["position"] == records[number - 1].cursor["position"]
    with pytest.raises(DataError, match=f"has {len(records)} records, and number {len(records) + 1}"):
        source.cursor_after(len(records) + 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_follow_one_another(source, count):
    parts = [content(source.records(source.part(number, count))) for number in range(count)]
    assert list(chain(*parts)) == content(source.records())
    assert all(parts)


def test_parts_are_about_equal(kind, source):
    if kind in ("jsonl", "line.txt", "paragraph.txt"):
        sizes = [sum(len(r.text or "") for r in source.records(source.part(number, 4))) for number in range(4)]
        assert max(sizes) < 1.4 * min(sizes)


def test_too_many_parts(kind, source):
    most = SHARDS.get(kind)
    if most is None:
        return
    parts = [content(source.records(source.part(n, most))) for n in range(most)]
    assert list(chain(*parts)) == content(source.records())
    with pytest.raises(DataError, match=f"cannot be cut into {most + 1} parts; the largest possible number is {most}"):
        source.part(0, most + 1)


def shardings(kind):
    for num_lanes in (None, 1, 2, 3, 5):
        yield Sharding(seed=3, num_lanes=num_lanes)
    yield Sharding(seed=3, num_lanes=3, shuffle=False)
    for num_lanes in (1, 4, 12, 32):
        yield Sharding(seed=3, num_lanes=num_lanes, exact=True)


def test_readers_cover_every_record_once_in_an_epoch(kind, source):
    records = content(source.records())
    cuts = [WHOLE, Span(after=source.cursor_after(2)), Span(source.cursor_after(2), source.cursor_after(4))]
    if kind != "document.txt":
        cuts.append(Span(source.cursor_after(20), source.cursor_after(57)))
    for sharding in shardings(kind):
        for cut in cuts:
            if not sharding.exact and cut is not WHOLE:
                sharding = Sharding(seed=3, num_lanes=1)
            readers = source.readers(sharding, cut)
            assert sharding.num_lanes in (None, len(readers))
            for epoch in (0, 1):
                found = [item for reader in readers for item in content(reader.read(epoch, reader.start()))]
                assert sorted(found) == sorted(content(source.records(cut)))
    assert len(records) == len(set(records))


def test_any_cursor_of_a_reader_continues_with_the_same_sequence(kind, source):
    draw = random.Random(2)
    for sharding in shardings(kind):
        readers, fresh = source.readers(sharding), source.readers(sharding)
        for lane in draw.sample(range(len(readers)), min(2, len(readers))):
            for epoch in (0, 1):
                records = list(readers[lane].read(epoch, readers[lane].start()))
                for index in draw.sample(range(len(records)), min(3, len(records))):
                    cursor = json.loads(json.dumps(records[index].cursor))
                    assert list(fresh[lane].read(epoch, cursor)) == records[index + 1 :]


def test_windows_one_after_the_other(source):
    """What a lane does: short readings, each closed and gone on from."""
    (reader,) = source.readers(Sharding(seed=3, num_lanes=1))
    expected = list(reader.read(0, reader.start()))
    cursor, found = reader.start(), []
    while len(found) < len(expected):
        records = reader.read(0, cursor)
        found += islice(records, 7)
        records.close()
        cursor = found[-1].cursor
    assert found == expected


def test_shuffling_can_be_left_out(kind, source):
    (reader,) = source.readers(Sharding(seed=3, num_lanes=1, shuffle=False))
    assert content(reader.read(5, reader.start())) == content(source.records())
    (shuffled,) = source.readers(Sharding(seed=3, num_lanes=1))
    orders = [content(shuffled.read(epoch, shuffled.start())) for epoch in range(4)]
    if kind != "document.txt":
        assert any(order != orders[0] for order in orders)


def test_lanes_beyond_the_shards_are_an_error_unless_they_may_split_shards(kind, source):
    most = SHARDS.get(kind)
    if most is None:
        return
    with pytest.raises(DataError, match=rf"dataset.num_lanes: {most + 1}, but .* has {most} shards"):
        source.readers(Sharding(seed=3, num_lanes=most + 1))
    readers = source.readers(Sharding(seed=3, num_lanes=most + 1, exact=True))
    assert len(readers) == most + 1
    if kind != "hub":
        assert all(reader.size > 0 for reader in readers)


def test_sizes_are_bytes_of_text(kind, made):
    source, texts = made[kind]
    total = sum(reader.size for reader in source.readers(Sharding(seed=3, num_lanes=2)))
    true = sum(len(text.encode()) for text in texts)
    if kind == "hub":
        assert total == 0
    elif "." not in kind or kind.endswith("txt"):
        assert 0.5 * true < total < 2 * true
    else:
        assert total > 0
