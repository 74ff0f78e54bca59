"""Files, local and remote: listing, stamps, decompression, and waiting for a network."""

import gzip
import json
from itertools import islice

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from remote_files import FaultyFileSystem

from neobert.config.schema_data import DatasetSection
from neobert.data.source import files as files_module
from neobert.data.source.files import fingerprint_files, list_files, local_file
from neobert.data.source.formats import list_splits
from neobert.data.source.network import is_transient, with_retries
from neobert.data.source.spec import SourceSpec, describe_sources
from neobert.data.source.text import BadShard, Sharding, Span
from neobert.errors import DataError


@pytest.fixture
def remote():
    FaultyFileSystem.clear()
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    yield FaultyFileSystem
    FaultyFileSystem.clear()


def jsonl(count, start=0):
    return "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(start, start + count)).encode()


def parquet(count):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(count)]}), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def names(found):
    return ["/".join(item.below) for item in found.files]


def test_listing(tmp_path):
    for name in ("b/two.jsonl", "a.jsonl", "b/one.jsonl", ".hidden/x.jsonl", "b/_meta.jsonl", "b-c/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = ["a.jsonl", "b/one.jsonl", "b/two.jsonl", "b-c/x.jsonl"]
    assert names(list_files(str(tmp_path))) == everything
    assert names(list_files(str(tmp_path / "a.jsonl"))) == ["a.jsonl"]
    assert names(list_files(str(tmp_path / "b" / "*.jsonl"))) == ["one.jsonl", "two.jsonl"]
    assert names(list_files(str(tmp_path / "**" / "*.jsonl"))) == everything
    assert names(list_files(str(tmp_path / "b*"))) == ["b/one.jsonl", "b/two.jsonl", "b-c/x.jsonl"]
    assert names(list_files(str(tmp_path / "nothing"))) == names(list_files(str(tmp_path / "no*"))) == []
    assert names(list_files(str(tmp_path / "b" / "_meta.jsonl"))) == ["_meta.jsonl"]


def test_remote_listing(remote):
    remote.store = {
        "bucket/data/b/two.jsonl": b"x",
        "bucket/data/a.jsonl": b"xy",
        "bucket/data/b/.hidden": b"",
        "bucket/a": b"",
    }
    found = list_files("faulty://bucket/data")
    assert names(found) == ["a.jsonl", "b/two.jsonl"]
    assert [(item.file.url, item.file.size) for item in found.files] == [
        ("faulty://bucket/data/a.jsonl", 2),
        ("faulty://bucket/data/b/two.jsonl", 1),
    ]
    assert names(list_files("faulty://bucket/data/*/*.jsonl")) == ["b/two.jsonl"]
    assert names(list_files("faulty://bucket/data/a.jsonl")) == ["a.jsonl"]
    assert list_files("faulty://bucket/none").files == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_remote_file_reads_like_a_local_one(name, remote, tmp_path):
    content = parquet(100) if name.endswith("parquet") else jsonl(100)
    content = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rsplit(".", 1)[1], bytes)(content)
    remote.store = {f"bucket/{name}": content}
    (tmp_path / name).write_bytes(content)
    sources = [
        list_splits(SourceSpec(path=(path,)))["train"](None) for path in (f"faulty://bucket/{name}", str(tmp_path))
    ]
    far, near = (list(source.records()) for source in sources)
    assert [record.text for record in far] == [f"text {n}" for n in range(100)]
    assert far == near
    assert list(sources[0].records(Span(after=far[19].cursor))) == near[20:]


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(files_module.fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"dataset.path: s3://bucket/x: .*s3:// is missing; pip install s3fs"):
        list_files("s3://bucket/x")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"dataset.path: nowhere://x: .*nowhere"):
        list_files("nowhere://x")


@pytest.mark.parametrize("pieces", [1, 3])
def test_zst_frames_and_where_they_end(tmp_path, pieces):
    content = jsonl(3000)
    parts = [content[len(content) * n // pieces : len(content) * (n + 1) // pieces] for n in range(pieces)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(part) for part in parts))
    with local_file(path).open() as file:
        assert file.read() == content
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EOFError, match="middle of a frame"), local_file(path).open() as file:
        file.read()


def test_a_file_that_was_replaced_is_an_error(tmp_path, remote):
    remote.store["bucket/a.jsonl"] = jsonl(50)
    (tmp_path / "a.jsonl").write_bytes(jsonl(50))
    (tmp_path / "a.parquet").write_bytes(parquet(50))

    def rewrite(url, content):
        if url.startswith("faulty"):
            remote.store["bucket/a.jsonl"] = content
        else:
            (tmp_path / url.rsplit("/", 1)[1]).write_bytes(content)

    for url in ("faulty://bucket/a.jsonl", str(tmp_path / "a.jsonl"), str(tmp_path / "a.parquet")):
        make = parquet if url.endswith("parquet") else jsonl
        (spec,) = describe_sources(DatasetSection(path=url, on_bad_shard="skip"))
        (reader,) = list_splits(spec)["train"](None).readers(Sharding(seed=1, num_lanes=1))
        records = reader.read(0, reader.start())
        cursor = [record.cursor for record in islice(records, 10)][-1]
        records.close()
        rewrite(url, make(60))
        going_on = [reader] if not url.startswith("faulty") else []
        (again,) = list_splits(spec)["train"](None).readers(Sharding(seed=1, num_lanes=1))
        rewrite(url, make(50))
        for stale in [*going_on, again]:
            with pytest.raises(DataError, match=r"a\.\w+ was replaced while it was being read") as failure:
                next(stale.read(0, cursor))
            assert not isinstance(failure.value, BadShard)


class HttpError(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})


def client_error(module, name):
    return type(name, (Exception,), {"__module__": module})("broken")


def test_which_errors_pass():
    for error in (
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        HttpError(429),
        HttpError(503),
        client_error("requests.exceptions", "ConnectionError"),
        client_error("httpx", "ReadTimeout"),
        client_error("urllib3.exceptions", "ProtocolError"),
        client_error("aiohttp.client_exceptions", "ServerDisconnectedError"),
        client_error("botocore.exceptions", "EndpointConnectionError"),
    ):
        assert is_transient(error), error
    caused = OSError(16, "busy")
    caused.__cause__ = HttpError(503)
    assert is_transient(caused)
    for error in (
        OSError(5, "input/output error"),
        PermissionError("no"),
        FileNotFoundError("gone"),
        HttpError(404),
        HttpError(403),
        ValueError("x"),
        client_error("mine", "ReadTimeout"),
        type("OfflineModeIsEnabled", (ConnectionError,), {})("offline"),
    ):
        assert not is_transient(error), error


def test_retries_wait_longer_each_time_and_end(caplog):
    pauses, calls = [], []

    def failing():
        calls.append(1)
        raise ConnectionError("reset by peer")

    with pytest.raises(
        DataError, match=r"s3://b/x cannot be read: ConnectionError: reset by peer. .*8 times \(dataset"
    ):
        with_retries(failing, retries=8, where="s3://b/x", sleep=pauses.append)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(calls) == 9
    assert "attempt 8 of 8 in 60 s" in caplog.messages[-1]
    with pytest.raises(OSError, match="disk"):
        with_retries(lambda: (_ for _ in ()).throw(OSError("disk")), retries=8, where="x", sleep=pauses.append)
    assert len(pauses) == 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_connection_that_breaks_in_the_middle_of_a_window(name, remote):
    """The window is read again from its cursor; the records are those of a reading without faults."""
    content = parquet(400) if name.endswith("parquet") else jsonl(400)
    remote.store = {f"bucket/{name}": gzip.compress(content) if name.endswith("gz") else content}
    source = list_splits(SourceSpec(path=(f"faulty://bucket/{name}",)))["train"](None)
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    expected = list(reader.read(0, reader.start()))
    assert len(expected) == 400
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    pauses, found, cursor = [], [], reader.start()

    def window():
        records = reader.read(0, cursor)
        try:
            return list(islice(records, 60))
        finally:
            records.close()

    opened = remote.num_opened
    while len(found) < 400:
        remote.faults[f"bucket/{name}"] = [ConnectionResetError("reset"), TimeoutError("slow")]
        found += with_retries(window, retries=3, where=name, sleep=pauses.append)
        cursor = found[-1].cursor
    assert found == expected
    assert pauses[:2] == [1, 2]
    assert remote.num_opened > opened


def test_a_connection_that_never_returns(remote):
    remote.store["bucket/a.jsonl"] = jsonl(10)
    source = list_splits(SourceSpec(path=("faulty://bucket/a.jsonl",)))["train"](None)

    def fail(path):
        raise HttpError(503)

    remote.on_read = fail
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    with pytest.raises(DataError, match=r"faulty://bucket/a.jsonl cannot be read: HttpError: status 503"):
        with_retries(
            lambda: list(reader.read(0, reader.start())),
            retries=2,
            where="faulty://bucket/a.jsonl",
            sleep=lambda seconds: None,
        )


def test_opening_waits_for_the_network_too(remote, monkeypatch):
    remote.store["bucket/a.jsonl"] = jsonl(10)
    remote.faults["bucket/a.jsonl"] = [ConnectionResetError("reset")]
    (spec,) = describe_sources(DatasetSection(path="faulty://bucket/a.jsonl", network_retries=1))
    monkeypatch.setattr(with_retries, "__kwdefaults__", {"sleep": lambda seconds: None})
    assert len(list(list_splits(spec)["train"](None).records())) == 10


def test_the_fingerprint_of_remote_files_is_their_etag(remote):
    remote.store["bucket/a.jsonl"] = jsonl(10)
    before = fingerprint_files([item.file for item in list_files("faulty://bucket/a.jsonl").files])
    assert fingerprint_files([item.file for item in list_files("faulty://bucket/a.jsonl").files]) == before
    remote.store["bucket/a.jsonl"] = jsonl(10, start=1)
    assert fingerprint_files([item.file for item in list_files("faulty://bucket/a.jsonl").files]) != before


def test_the_fingerprint_of_a_file_covers_its_size_its_ends_and_what_is_between(tmp_path):
    path, size = tmp_path / "a.jsonl", 1_000_000
    content = bytes(range(250)) * (size // 250)
    last = size - 4096

    def fingerprint(edited):
        path.write_bytes(edited)
        return fingerprint_files([local_file(path)])

    found = {fingerprint(content), fingerprint(content + b"x"), fingerprint(content[:-1])}
    for offset in [0, 4095, size - 1, *(last * block // 15 + 2000 for block in range(1, 15))]:
        edited = bytearray(content)
        edited[offset] ^= 1
        found.add(fingerprint(bytes(edited)))
    assert len(found) == 3 + 17


def test_every_byte_of_a_small_file_is_in_its_fingerprint(tmp_path):
    path, content = tmp_path / "a.jsonl", b"abcdefghij" * 900
    path.write_bytes(content)
    original = fingerprint_files([local_file(path)])
    for offset in range(0, len(content), 97):
        path.write_bytes(content[:offset] + b"X" + content[offset + 1 :])
        assert fingerprint_files([local_file(path)]) != original
