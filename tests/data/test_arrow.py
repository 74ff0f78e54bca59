import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from neobert.data.fingerprint import combine, fits
from neobert.data.store import arrow, token_folder
from neobert.data.store.arrow import ArrowTexts, choose_indexed_lanes, load_table, read_manifest
from neobert.data.store.token_folder import TokenWriter, write_description
from neobert.data.store.tokens import TokenStore
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

DOCUMENTS = [[7, 8, 9], [], [10], list(range(20, 60)), [5, 6]]


def save(folder, documents, feature=None, **columns):
    features = Features({"input_ids": feature or List(Value("int32"))})
    dataset = Dataset.from_dict({"input_ids": documents}, features=features)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    dataset.save_to_disk(folder)
    return folder


def contents(store):
    return [store.content(d).tolist() for d in range(len(store))]


def counted(store):
    """The lengths of all documents, from the shortest."""
    counts = store.count_lengths(0, len(store))
    return np.repeat(np.arange(len(counts)), counts).tolist()


@pytest.mark.parametrize(
    "feature", [List(Value("int32")), List(Value("int64")), List(Value("uint16")), LargeList(Value("int32"))]
)
def test_documents_of_save_to_disk(tmp_path, tokenizer, feature):
    store = TokenStore(save(tmp_path / "d", DOCUMENTS, feature, label=[1] * 5), tokenizer)
    assert contents(store) == DOCUMENTS
    assert store.lengths(np.array([3, 1, 0])).tolist() == [40, 0, 3]
    assert counted(store) == [0, 1, 2, 3, 40]
    assert store.notes == []


def test_lists_of_fixed_size(tmp_path, tokenizer):
    documents = [[5, 6, 7], [8, 9, 10]]
    assert contents(TokenStore(save(tmp_path / "d", documents, List(Value("int32"), length=3)), tokenizer)) == documents


def test_many_files_and_batches(tmp_path, tokenizer):
    documents = [[5 + n % 300] * (n % 4) for n in range(2500)]
    part = Dataset.from_dict({"input_ids": documents})
    concatenate_datasets([part, part]).save_to_disk(tmp_path / "d", num_shards=3)
    store = TokenStore(tmp_path / "d", tokenizer)
    assert contents(store) == documents + documents
    assert sum(counted(store)) == 2 * sum(map(len, documents))


def test_documents_are_views_of_the_file(tmp_path, tokenizer):
    store = TokenStore(save(tmp_path / "d", DOCUMENTS), tokenizer)
    assert not store.content(3).flags.owndata
    assert not store.content(3).flags.writeable


def test_special_tokens_on_disk_are_skipped(tmp_path, tokenizer):
    wrapped = [[tokenizer.cls_id, *tokens, tokenizer.sep_id] for tokens in DOCUMENTS]
    store = TokenStore(save(tmp_path / "d", wrapped), tokenizer)
    assert contents(store) == DOCUMENTS
    assert store.lengths(np.arange(5)).tolist() == [3, 0, 1, 40, 2]
    assert counted(store) == [0, 1, 2, 3, 40]
    assert store.notes == ["special tokens on disk are skipped"]


def test_data_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"d holds token 9999 at document 1, but the tokenizer has only 405"):
        TokenStore(save(tmp_path / "d", [[5], [9999]]), tokenizer)


@pytest.mark.parametrize("kind", ["int32", "int64", "int16", "int8"])
def test_negative_tokens_are_refused_by_name(tmp_path, tokenizer, kind):
    with pytest.raises(DataError, match=r"d holds token -100 at document 1, but tokens start at 0: .*without them"):
        TokenStore(save(tmp_path / "d", [[5], [6, 7, -100, 8], [-1]], List(Value(kind))), tokenizer)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("int32", -100), ("int32", 405), ("int64", 2**32 + 5), ("int64", -(2**40)), ("uint16", 65535), ("uint64", 2**62)],
)
@pytest.mark.parametrize("row", [1, 1500, 2498])
def test_every_token_is_checked_when_it_is_read(tmp_path, tokenizer, monkeypatch, kind, bad, row):
    """Not the sample of the start alone: the blocks of the entropy, and each document that a window takes."""
    monkeypatch.setattr("neobert.data.store.tokens._SAMPLE", 1)
    documents = [[5 + n % 300] * (1 + n % 4) for n in range(2500)]
    documents[row] = [*documents[row], bad]
    store = TokenStore(save(tmp_path / "d", documents, List(Value(kind))), tokenizer)
    sentence = rf"d holds token {bad} at document {row}, but "
    with pytest.raises(DataError, match=sentence):
        sum(len(block) for block in store.token_blocks(10**6))
    with pytest.raises(DataError, match=sentence):
        store.content(row)
    assert store.content(row, 0, 1).tolist() == documents[row][:1]
    assert store.content(row - 1).tolist() == documents[row - 1]


def test_a_token_outside_is_named_with_its_document_where_long_ones_are_stored_in_pieces(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("neobert.data.store.tokens._SAMPLE", 1)
    pieces = Dataset.from_dict({"input_ids": [[5], [6], [7], [8, 405]], "document": [0, 0, 1, 1]})
    pieces.save_to_disk(tmp_path / "d", num_shards=2)
    with pytest.raises(DataError, match=r"d holds token 405 at document 1, but"):
        list(TokenStore(tmp_path / "d", tokenizer).token_blocks(100))


def test_an_unknown_word_at_the_end_is_no_padding(tmp_path):
    backend = Backend(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "a": 4}, unk_token="[UNK]"))
    roles = {"pad_token": "[UNK]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **roles))
    assert contents(TokenStore(save(tmp_path / "d", [[4, 0]]), tokenizer)) == [[4, 0]]


def write_folder(folder, documents, manifest, **settings):
    folder.mkdir()
    writer = TokenWriter(folder, **settings)
    for number, row in enumerate(documents):
        writer.add([np.array(row, dtype=np.int32)], number)
    writer.finish_file()
    write_description(folder, files=list(writer.files), features=writer.features, manifest=manifest)


def test_a_manifest_names_the_tokenizer(tmp_path, tokenizer):
    for name, digest in (("same", tokenizer.digest), ("other", "sha256:0")):
        write_folder(tmp_path / name, [[5, 6]], {"tokenizer_digest": digest})
    assert contents(TokenStore(tmp_path / "same", tokenizer)) == [[5, 6]]
    with pytest.raises(DataError, match=r"other was made with a tokenizer of digest sha256:0"):
        TokenStore(tmp_path / "other", tokenizer)


def test_padded_data_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="padded documents; tokenise again without padding"):
        TokenStore(save(tmp_path / "d", [[5, 6], [7, tokenizer.pad_id]]), tokenizer)


def test_damaged_folders_are_named(tmp_path, tokenizer):
    folder = save(tmp_path / "d", DOCUMENTS)
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"d cannot be read as a folder of save_to_disk"):
        TokenStore(folder, tokenizer)
    file.unlink()
    with pytest.raises(DataError, match=r"d cannot be read as a folder of save_to_disk"):
        load_table(folder)


def test_input_ids_must_be_lists_of_integers(tmp_path, tokenizer):
    with pytest.raises(DataError, match="lists of integers are needed"):
        TokenStore(save(tmp_path / "d", [1, 2], Value("int32")), tokenizer)
    with pytest.raises(DataError, match="must hold lists of integers"):
        TokenStore(save(tmp_path / "e", [[1.5], [2.0]], List(Value("float32"))), tokenizer)


def test_fingerprint_sees_one_changed_token(tmp_path, tokenizer):
    one = TokenStore(save(tmp_path / "a", DOCUMENTS), tokenizer).fingerprint
    assert TokenStore(save(tmp_path / "b", DOCUMENTS), tokenizer).fingerprint == one
    changed = [*DOCUMENTS[:-1], [5, 7]]
    assert TokenStore(save(tmp_path / "c", changed), tokenizer).fingerprint != one


def test_written_folders_are_read_by_us_and_by_datasets(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_folder, "BATCH_TOKENS", 10)
    for name in ("one", "two"):
        write_folder(tmp_path / name, DOCUMENTS, {"num_documents": 5}, file_tokens=30)
    assert contents(TokenStore(tmp_path / "one", tokenizer)) == DOCUMENTS
    assert load_from_disk(tmp_path / "one")["input_ids"][:] == DOCUMENTS
    assert read_manifest(tmp_path / "one") == {"num_documents": 5}
    assert read_manifest(tmp_path) is None
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "data-00001.arrow" in files
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_texts_by_number(tmp_path):
    Dataset.from_dict({"id": [1, 2, 3], "text": ["a b", None, " "]}).save_to_disk(tmp_path / "d")
    source = ArrowTexts(tmp_path / "d", None)
    assert [record.text for record in source.records()] == ["a b", None, None]
    with pytest.raises(DataError, match=r"dataset.text_column: 'id' holds no text"):
        ArrowTexts(tmp_path / "d", "id")


def test_large_strings(tmp_path):
    Dataset(pa.table({"text": pa.array(["x", "y"], type=pa.large_string())})).save_to_disk(tmp_path / "d")
    assert [record.text for record in ArrowTexts(tmp_path / "d", None).records()] == ["x", "y"]


def test_lanes_are_at_least_a_window(tmp_path):
    assert [choose_indexed_lanes(n, 1024) for n in (0, 1000, 2048, 10**9)] == [1, 1, 2, arrow.INDEXED_LANES]


@pytest.mark.parametrize("num_files", [1, 3])
def test_pieces_know_their_document(tmp_path, tokenizer, num_files):
    assert TokenStore(save(tmp_path / "whole", DOCUMENTS), tokenizer).document_numbers is None
    documents = Dataset.from_dict({"input_ids": DOCUMENTS, "document": [0, 0, 1, 2, 2]})
    documents.save_to_disk(tmp_path / "pieces", num_shards=num_files)
    store = TokenStore(tmp_path / "pieces", tokenizer)
    assert (len(store), store.count()) == (5, 3)
    assert store.document_numbers.tolist() == [0, 0, 1, 2, 2]
    assert [store.row_of(document) for document in (0, 1, 2, 3)] == [0, 2, 3, 5]
    assert [store.document_at(row) for row in (0, 1, 2, 4, 5)] == [0, 0, 1, 2, 3]


def test_documents_of_parts_are_numbered_without_gaps(tmp_path, tokenizer):
    """Machines that split the work start their numbers far apart."""
    numbers = [0, 0, 1, 1 << 40, (1 << 40) + 1]
    Dataset.from_dict({"input_ids": DOCUMENTS, "document": numbers}).save_to_disk(tmp_path / "d")
    assert TokenStore(tmp_path / "d", tokenizer).document_numbers.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("special_tokens", [True, False])
def test_the_manifest_says_whether_special_tokens_are_on_disk(tmp_path, tokenizer, special_tokens):
    """Bare documents that begin like wrapped ones: only the manifest shows it."""
    folder = save(tmp_path / "d", [[tokenizer.cls_id, 7, tokenizer.sep_id]])
    (folder / "manifest.json").write_text(json.dumps({"special_tokens": special_tokens}))
    store = TokenStore(tmp_path / "d", tokenizer)
    assert contents(store) == ([[7]] if special_tokens else [[tokenizer.cls_id, 7, tokenizer.sep_id]])
    assert counted(store) == ([1] if special_tokens else [3])


def test_a_folder_without_documents(tmp_path):
    Dataset.from_dict({"text": []}, features=Features({"text": Value("string")})).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"d has no documents"):
        ArrowTexts(tmp_path / "d", None)


def fingerprint_of(folder, documents, tokenizer):
    kind = Features({"input_ids": List(Value("int32"))})
    Dataset.from_dict({"input_ids": documents}, features=kind).save_to_disk(folder)
    return TokenStore(folder, tokenizer).fingerprint


def test_the_fingerprint_covers_every_length_and_more_than_heads(tmp_path, tokenizer):
    """Of 3,000 documents every one may grow at its neighbour's cost; of a long one the tail and the middle count."""
    draw = np.random.default_rng(15)
    documents = [draw.integers(10, 300, size).tolist() for size in [*draw.integers(2, 12, 2998), 30_000, 30_000]]
    original = fingerprint_of(tmp_path / "d", documents, tokenizer)
    assert fingerprint_of(tmp_path / "again", documents, tokenizer) == original
    seen = {original}
    for number in [0, 7, *draw.integers(8, 2990, 4).tolist(), 2996]:
        moved = [*documents]
        moved[number], moved[number + 1] = documents[number][:-1], [documents[number][-1], *documents[number + 1]]
        seen.add(fingerprint_of(tmp_path / f"moved-{number}", moved, tokenizer))
    for index in (0, 29_999, 29_950, 12_780):
        edited = [*documents[:-1], [*documents[-1]]]
        edited[-1][index] += 1
        seen.add(fingerprint_of(tmp_path / f"edited-{index}", edited, tokenizer))
    assert len(seen) == 1 + 7 + 4


def test_the_fingerprint_does_not_depend_on_the_files_or_the_integer_type(tmp_path, tokenizer):
    documents = [[5 + n % 300] * (n % 4) for n in range(2500)]
    found = {fingerprint_of(tmp_path / "one", documents, tokenizer)}
    Dataset.from_dict({"input_ids": documents}).save_to_disk(tmp_path / "three", num_shards=3)
    found.add(TokenStore(tmp_path / "three", tokenizer).fingerprint)
    assert len(found) == 1


def test_numbers_of_documents_are_part_of_the_fingerprint(tmp_path, tokenizer):
    one = TokenStore(save(tmp_path / "one", DOCUMENTS, document=[0, 0, 1, 2, 3]), tokenizer).fingerprint
    assert TokenStore(save(tmp_path / "two", DOCUMENTS, document=[0, 1, 1, 2, 3]), tokenizer).fingerprint != one


def test_the_fingerprint_of_texts_covers_lengths_and_tails(tmp_path):
    texts = ["one two", "three", None, "\u00fc" * 50_000, "", "last"]
    changes = {0: "one tw\u00f4", 2: "", 3: "\u00fc" * 49_999 + "\u00f6", 5: "lost"}
    found = set()
    for change in (None, *changes):
        now = [changes[n] if n == change else text for n, text in enumerate(texts)]
        Dataset.from_dict({"text": now}).save_to_disk(tmp_path / str(change))
        found.add(ArrowTexts(tmp_path / str(change), None).fingerprint)
    moved = ["one twothr", "ee", *texts[2:]]
    Dataset.from_dict({"text": moved}).save_to_disk(tmp_path / "moved")
    found.add(ArrowTexts(tmp_path / "moved", None).fingerprint)
    assert len(found) == 2 + len(changes)


def test_fingerprints_know_what_the_version_before_wrote(tmp_path, tokenizer):
    store = TokenStore(save(tmp_path / "d", DOCUMENTS), tokenizer)
    Dataset.from_dict({"text": ["one", "two \u00fc", "x" * 100]}).save_to_disk(tmp_path / "texts")
    before = {
        store.fingerprint: "sha256:3bebc4de90fca8445ed76fffc67881cd896d608e64d6c2d63571cd5aabed1d50",
        ArrowTexts(tmp_path / "texts", None).fingerprint: "sha256:"
        "63633eab1619a21e356148e4f001b38ed1bef2253b99fe86fe8621841cd9185b",
    }
    for now, old in before.items():
        assert now.before == old
        assert fits(old, now)
        assert fits(str(now), now)
        assert not fits(str(now), old), "a saved new form is compared with the new form"
        assert not fits("sha256:0", now)
        sent = pickle.loads(pickle.dumps(now))
        assert (sent, sent.before) == (now, old)
    both = combine(before, " ".join)
    assert (both, both.before) == (" ".join(before), " ".join(before.values()))
