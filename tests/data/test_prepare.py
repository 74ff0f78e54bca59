"""Tokenised folders: the same bytes after any interruption, rows as asked for, parts, locks, no absolute path."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from neobert import disk
from neobert.commands.tokenize_dataset import check_parts, join_parts, part_folder
from neobert.data.source.documents import EncodedDocument, TextDocuments
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_source
from neobert.data.source.text import Record
from neobert.data.store import prepare, token_folder
from neobert.data.store.arrow import read_manifest
from neobert.data.store.prepare import cut_tokens, prepare_tokens, work_folder
from neobert.data.store.token_folder import Origin, PrepareSettings
from neobert.data.store.tokens import TokenStore
from neobert.errors import DataError
from neobert.train.hardware.memory import current_bytes, forget_peak, peak_bytes

SMALL = PrepareSettings(max_document_chars=150, max_bad_records=3, file_tokens=700)


def open_text(path):
    return list_splits(describe_source(str(path)))["train"](None)


@pytest.fixture
def source(tmp_path, texts):
    """Lines of JSON with a broken one and one without text."""
    lines = [json.dumps({"text": text}) for text in texts]
    lines[40:40] = ["{broken", '{"text": null}']
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return open_text(path)


@pytest.fixture
def encoded(texts, tokenizer):
    """Documents as lists, tokenised in the parts that a limit of 150 characters makes."""
    return [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder, tokenizer):
    store = TokenStore(folder, tokenizer)
    return [store.content(n).tolist() for n in range(len(store))]


def test_a_folder_is_read_by_us_and_by_datasets(tmp_path, source, tokenizer, encoded):
    manifest = prepare_tokens(source, tokenizer, tmp_path / "d", SMALL, origin=Origin(source="corpus.jsonl"))
    assert contents(tmp_path / "d", tokenizer) == encoded
    assert load_from_disk(str(tmp_path / "d"))["input_ids"][:] == encoded
    assert manifest == read_manifest(tmp_path / "d")
    counts = ("num_documents", "num_pieces", "num_tokens", "bad", "skipped", "short", "source_label")
    assert [manifest[name] for name in counts] == [150, 150, sum(map(len, encoded)), 1, 1, 0, "corpus.jsonl"]
    assert (manifest["special_tokens"], manifest["tokenizer_digest"]) == (False, tokenizer.digest)
    files = {p.name: p for p in (tmp_path / "d").glob("*.arrow")}
    assert len(files) > 5
    assert manifest["files"] == {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }


def test_special_tokens_and_their_mask(tmp_path, source, tokenizer, encoded):
    settings = replace(SMALL, special_tokens=True, special_tokens_mask=True)
    manifest = prepare_tokens(source, tokenizer, tmp_path / "d", settings)
    rows = load_from_disk(str(tmp_path / "d"))
    assert rows["input_ids"][:] == [[tokenizer.cls_id, *tokens, tokenizer.sep_id] for tokens in encoded]
    assert rows["special_tokens_mask"][:] == [[1, *[0] * len(tokens), 1] for tokens in encoded]
    assert rows.features["special_tokens_mask"].feature.dtype == "int8"
    assert manifest["special_tokens"] is True
    assert manifest["num_tokens"] == sum(map(len, encoded)), "special tokens do not count"
    assert contents(tmp_path / "d", tokenizer) == encoded, "the reader takes them off again"


@pytest.mark.parametrize(("special", "row"), [(False, 12), (True, 10)])
def test_longer_documents_become_consecutive_pieces(tmp_path, source, tokenizer, encoded, special, row):
    settings = replace(SMALL, max_length=12, special_tokens=special)
    manifest = prepare_tokens(source, tokenizer, tmp_path / "d", settings)
    expected = [(n, tokens[i : i + row]) for n, tokens in enumerate(encoded) for i in range(0, len(tokens), row)]
    rows = load_from_disk(str(tmp_path / "d"))
    assert max(map(len, rows["input_ids"][:])) == 12
    assert rows["document"][:] == [n for n, _ in expected]
    assert contents(tmp_path / "d", tokenizer) == [piece for _, piece in expected]
    assert (manifest["num_documents"], manifest["num_pieces"]) == (150, len(expected))
    assert [p.tolist() for p in cut_tokens(np.arange(4), 2)] == [[0, 1], [2, 3]]


def test_the_first_documents_and_the_long_ones(tmp_path, source, tokenizer, encoded):
    prepare_tokens(source, tokenizer, tmp_path / "first", replace(SMALL, max_documents=60))
    assert contents(tmp_path / "first", tokenizer) == encoded[:60]
    manifest = prepare_tokens(source, tokenizer, tmp_path / "long", replace(SMALL, min_tokens=50))
    long = [tokens for tokens in encoded if len(tokens) >= 50]
    assert contents(tmp_path / "long", tokenizer) == long
    assert (manifest["num_documents"], manifest["short"]) == (len(long), 150 - len(long))
    with pytest.raises(DataError, match=r"no usable documents \(1 cannot be read, 1 without text, 150 with fewer than"):
        prepare_tokens(source, tokenizer, tmp_path / "none", replace(SMALL, min_tokens=1000))
    assert not (tmp_path / "none").exists()
    assert not work_folder(tmp_path / "none").exists()


class GivenTokens:
    """Documents that are tokens already."""

    fingerprint = "given"

    def __init__(self, documents):
        self._documents = documents

    def open(self, span, encode, counts, max_document_chars, num_ahead=0):
        for number in range(*span.numbers("n", len(self._documents))):
            tokens = np.array(self._documents[number], dtype=np.int32)
            yield EncodedDocument(number, tokens, {"n": number + 1}, counts.bad, counts.skipped)

    def count(self, span):
        return len(self._documents)


def test_documents_without_a_token_are_skipped(tmp_path, tokenizer):
    manifest = prepare_tokens(GivenTokens([[5], [], [6, 7], []]), tokenizer, tmp_path / "d", SMALL)
    assert (manifest["num_documents"], manifest["skipped"]) == (2, 2)
    assert contents(tmp_path / "d", tokenizer) == [[5], [6, 7]]


class Slow(TextDocuments):
    """A source that takes its time, so that a kill meets it at work; everything else is the source's own."""

    def __init__(self, source):
        self._source, self.fingerprint, self.notes = source, source.fingerprint, source.notes

    def records(self, *span):
        for record in self._source.records(*span):
            time.sleep(0.001)
            yield record

    def count(self, span):
        return None


def work(source, tokenizer, folder, settings):
    prepare_tokens(Slow(source), tokenizer, folder, settings)


@pytest.mark.parametrize("special", [False, True])
def test_killed_at_random_moments_and_started_again_gives_the_same_bytes(
    tmp_path, source, tokenizer, special, monkeypatch
):
    monkeypatch.setattr("neobert.data.source.documents.ENCODE_DOCUMENTS", 8)
    monkeypatch.setattr(token_folder, "BATCH_TOKENS", 200)
    settings = replace(SMALL, special_tokens=special, max_length=20 if special else None)
    prepare_tokens(source, tokenizer, tmp_path / "whole", settings)
    folder, rng = tmp_path / "killed", random.Random(4 + special)
    context, found = multiprocessing.get_context("fork"), set()
    for attempt in range(60):
        process = context.Process(target=work, args=(source, tokenizer, folder, settings))
        process.start()
        process.join(rng.uniform(0.005, 0.04) * (1 + attempt / 8))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not folder.exists() or digests(folder) == digests(tmp_path / "whole"), "complete or not there"
        found.add(len(list((work_folder(folder) / "output").glob("*"))) if work_folder(folder).exists() else 0)
    assert process.exitcode == 0, "every start continues where the one before was killed"
    assert found, "it was killed at least once"
    assert digests(folder) == digests(tmp_path / "whole")
    assert not work_folder(folder).exists()


def work_until(source, tokenizer, folder, settings, number):
    """Dies without a word at the n-th time that something has to be on the disk."""
    calls, sync = iter(range(1, 10**6)), disk.sync

    def dying(path):
        if next(calls) == number:
            os._exit(9)
        sync(path)

    disk.sync = token_folder.sync = prepare.sync = dying
    prepare_tokens(source, tokenizer, folder, settings)
    os._exit(0)


def test_killed_at_every_step_of_saving_gives_the_same_bytes(tmp_path, source, tokenizer):
    settings = replace(SMALL, file_tokens=3000)
    prepare_tokens(source, tokenizer, tmp_path / "whole", settings)
    expected, context = digests(tmp_path / "whole"), multiprocessing.get_context("fork")
    for number in range(1, 100):
        folder = tmp_path / f"at-{number}"
        process = context.Process(target=work_until, args=(source, tokenizer, folder, settings, number))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        assert not folder.exists() or digests(folder) == expected
        prepare_tokens(source, tokenizer, folder, settings)
        assert digests(folder) == expected
        assert not work_folder(folder).exists()
    assert 15 < number < 99, "all steps of saving were met"


def test_cut_after_every_file_gives_the_same_bytes(tmp_path, source, tokenizer, monkeypatch):
    """A stop right after the n-th file is saved, and one between two saves, for every n."""
    whole = prepare_tokens(source, tokenizer, tmp_path / "whole", SMALL)
    add, expected = token_folder.TokenWriter.add, digests(tmp_path / "whole")
    for stop in (1, 14, 60, 61, 110, 149):
        calls = iter(range(1, 10**6))

        def stopping(self, rows, document, stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return add(self, rows, document)

        folder = tmp_path / f"at-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(token_folder.TokenWriter, "add", stopping)
            with pytest.raises(KeyboardInterrupt):
                prepare_tokens(source, tokenizer, folder, SMALL)
        saved = len(list(work_folder(folder).glob("output/*"))) if work_folder(folder).exists() else 0
        read = []
        monkeypatch.setattr(type(source), "records", spy(type(source).records, read))
        assert prepare_tokens(source, tokenizer, folder, SMALL) == whole
        monkeypatch.undo()
        assert digests(folder) == expected
        assert (read == [None]) == (saved == 0), "finished files are not read again"


def spy(records, read):
    def spied(self, span):
        read.append(span.after)
        return records(self, span)

    return spied


def interrupt(tmp_path, source, tokenizer, monkeypatch, folder):
    calls = iter(range(1, 10**6))
    add = token_folder.TokenWriter.add

    def stopping(self, rows, document):
        if next(calls) == 100:
            raise KeyboardInterrupt
        return add(self, rows, document)

    with monkeypatch.context() as patch:
        patch.setattr(token_folder.TokenWriter, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(source, tokenizer, folder, SMALL)


def test_unfinished_work_of_other_settings(tmp_path, source, tokenizer, encoded, monkeypatch):
    interrupt(tmp_path, source, tokenizer, monkeypatch, tmp_path / "d")
    other = replace(SMALL, max_documents=7)
    with pytest.raises(DataError, match=r"\.tmp-d holds an unfinished .*max_documents is None there and 7 here"):
        prepare_tokens(source, tokenizer, tmp_path / "d", other, replace_other=False)
    prepare_tokens(source, tokenizer, tmp_path / "d", other)
    assert contents(tmp_path / "d", tokenizer) == encoded[:7]


def test_a_finished_file_that_lost_bytes_is_written_again(tmp_path, source, tokenizer, encoded, monkeypatch):
    interrupt(tmp_path, source, tokenizer, monkeypatch, tmp_path / "d")
    with open(work_folder(tmp_path / "d") / "output" / "data-00001.arrow", "r+b") as file:
        file.truncate(100)
    prepare_tokens(source, tokenizer, tmp_path / "d", SMALL)
    assert contents(tmp_path / "d", tokenizer) == encoded


def test_a_complete_folder_is_found_kept_or_replaced(tmp_path, source, tokenizer, encoded):
    first = prepare_tokens(source, tokenizer, tmp_path / "d", SMALL)
    before = (tmp_path / "d" / "state.json").stat().st_mtime_ns
    assert prepare_tokens(source, tokenizer, tmp_path / "d", replace(SMALL, max_bad_records=9)) == first
    assert (tmp_path / "d" / "state.json").stat().st_mtime_ns == before
    other = replace(SMALL, special_tokens=True)
    with pytest.raises(DataError, match=r"d holds other data \(special_tokens is False there and True here\)"):
        prepare_tokens(source, tokenizer, tmp_path / "d", other, replace_other=False)
    assert prepare_tokens(source, tokenizer, tmp_path / "d", other)["special_tokens"] is True
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["d"]
    assert contents(tmp_path / "d", tokenizer) == encoded


def test_one_writer_at_a_time(tmp_path, source, tokenizer, encoded):
    work_folder(tmp_path / "d").mkdir()
    with open(work_folder(tmp_path / "d") / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is writing in .*\.tmp-d; wait until it ends"):
            prepare_tokens(source, tokenizer, tmp_path / "d", SMALL)
    prepare_tokens(source, tokenizer, tmp_path / "d", SMALL)
    assert contents(tmp_path / "d", tokenizer) == encoded


def test_too_many_bad_records_stop_it(tmp_path, source, tokenizer):
    with pytest.raises(DataError, match=r"max_bad_records: 0, but 1 records of the source cannot be read"):
        prepare_tokens(source, tokenizer, tmp_path / "d", replace(SMALL, max_bad_records=0))


@pytest.mark.parametrize("max_length", [None, 20])
def test_parts_read_like_one_folder(tmp_path, texts, tokenizer, encoded, max_length):
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "text")
    source = open_text(tmp_path / "text")
    settings = replace(SMALL, special_tokens=True, max_length=max_length)
    prepare_tokens(source, tokenizer, tmp_path / "whole", settings)

    def write(number, count=3):
        check_parts(tmp_path / "d", source.fingerprint, tokenizer, settings, count)
        folder, span = part_folder(tmp_path / "d", number, count), source.part(number, count)
        prepare_tokens(source, tokenizer, folder, settings, span=span, part=(number, count))
        return join_parts(tmp_path / "d", count)

    assert write(2) is None
    assert write(0) is None
    assert not (tmp_path / "d" / "state.json").exists()
    joined = write(1)
    before = digests(tmp_path / "d")
    assert write(0) == joined, "who joins, and how often, makes no difference"
    assert digests(tmp_path / "d") == before
    assert contents(tmp_path / "d", tokenizer) == contents(tmp_path / "whole", tokenizer)
    rows, whole = load_from_disk(str(tmp_path / "d")), load_from_disk(str(tmp_path / "whole"))
    assert rows["input_ids"][:] == whole["input_ids"][:]
    one = read_manifest(tmp_path / "whole")
    assert all(joined[name] == one[name] for name in ("num_documents", "num_pieces", "num_tokens", "source"))
    assert all((tmp_path / "d" / name).stat().st_size == entry["bytes"] for name, entry in joined["files"].items())
    if max_length is not None:
        numbers, of_whole = np.array(rows["document"][:]), np.array(whole["document"][:])
        assert (np.diff(numbers) >= 0).all()
        assert ((np.diff(numbers) > 0) == (np.diff(of_whole) > 0)).all(), "the same pieces make the same documents"
        assert numbers[0] == 0
    with pytest.raises(DataError, match=r"holds part-0000[123]-of-00003, but --shard .* 4 parts"):
        check_parts(tmp_path / "d", source.fingerprint, tokenizer, settings, 4)
    other = replace(settings, max_documents=5)
    with pytest.raises(DataError, match=r"part-00001-of-00003 is made with other .*max_documents is None there and 5"):
        check_parts(tmp_path / "d", source.fingerprint, tokenizer, other, 3)
    with pytest.raises(DataError, match=r"whole holds tokenised data without parts"):
        check_parts(tmp_path / "whole", source.fingerprint, tokenizer, settings, 3)


def test_no_file_names_a_path_of_this_machine(tmp_path, source, tokenizer, monkeypatch):
    interrupt(tmp_path, source, tokenizer, monkeypatch, tmp_path / "d")
    for folder in (work_folder(tmp_path / "d"), tmp_path / "d"):
        if folder.name == "d":
            prepare_tokens(source, tokenizer, tmp_path / "d", SMALL)
        assert len(digests(folder)) > 3
        for path in folder.rglob("*"):
            assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


class Endless(TextDocuments):
    """Documents that are made when they are read."""

    fingerprint, notes = "endless", []

    def __init__(self, number):
        self._number = number

    def records(self, span):
        for number in range(*span.numbers("n", self._number)):
            yield Record(number, f"w{number % 300} " * 200, None, {"n": number + 1})

    def count(self, span):
        return self._number


def peak_megabytes(queue, number, folder, tokenizer):
    """Above what the forked process has of its parent, which grows from test to test and with the build of torch."""
    forget_peak()
    before = current_bytes()
    prepare_tokens(Endless(number), tokenizer, folder, replace(SMALL, max_document_chars=10**6, file_tokens=1 << 18))
    queue.put((peak_bytes() - before) / 2**20)


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    context, peaks = multiprocessing.get_context("fork"), []
    for number in (2_000, 10_000):
        queue = context.Queue()
        process = context.Process(target=peak_megabytes, args=(queue, number, tmp_path / str(number), tokenizer))
        process.start()
        peaks.append(queue.get(timeout=60))
        process.join()
    assert sum(p.stat().st_size for p in (tmp_path / "10000").glob("*.arrow")) > 4e6
    assert 0 < peaks[1] < peaks[0] + 4, "five times the documents, the same memory"
