"""Parts of several machines become the folder of one job, and tokens are as small as the vocabulary allows."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from datasets import load_from_disk
from reading import rows_of

from neobert.commands.merge_parts import merge_parts
from neobert.commands.tokenize_dataset import join_parts, part_folder
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_source
from neobert.data.store import prepare
from neobert.data.store.arrow import read_manifest
from neobert.data.store.prepare import prepare_tokens, work_folder
from neobert.data.store.token_folder import PrepareSettings, TokenWriter, choose_token_type, write_description
from neobert.data.store.tokens import TokenStore
from neobert.errors import DataError

SETTINGS = {
    "bare": PrepareSettings(max_document_chars=150, max_bad_records=3, file_tokens=700),
    "pieces": PrepareSettings(
        max_document_chars=150,
        max_bad_records=3,
        file_tokens=700,
        special_tokens=True,
        special_tokens_mask=True,
        max_length=10,
    ),
}


def open_text(path):
    return list_splits(describe_source(str(path)))["train"](None)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(x.relative_to(folder)): hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


def write_parts(folder, path, tokenizer, settings, count):
    for number in range(count):
        source, part = open_text(path), (number, count)
        prepare_tokens(source, tokenizer, part_folder(folder, *part), settings, span=source.part(*part), part=part)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_merged_parts_are_byte_equal_to_one_job(tmp_path, kind, settings, corpora, tokenizer):
    prepare_tokens(open_text(corpora[kind]), tokenizer, tmp_path / "whole", settings)
    write_parts(tmp_path / "parts", corpora[kind], tokenizer, settings, 3)
    join_parts(tmp_path / "parts", 3)
    merge_parts(tmp_path / "parts", tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) > 4, "several files of tokens"
    assert not work_folder(tmp_path / "merged").exists()
    joined, whole = TokenStore(tmp_path / "parts", tokenizer), TokenStore(tmp_path / "whole", tokenizer)
    assert joined.fingerprint == whole.fingerprint, "a run reads either"


def test_parts_that_are_missing_or_damaged_are_named(tmp_path, corpora, tokenizer):
    with pytest.raises(DataError, match="holds no parts"):
        merge_parts(tmp_path / "parts", tmp_path / "merged")
    write_parts(tmp_path / "parts", corpora["jsonl"], tokenizer, SETTINGS["bare"], 3)
    lost = part_folder(tmp_path / "parts", 1, 3)
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="part 2/3 is not complete"):
        merge_parts(tmp_path / "parts", tmp_path / "merged")
    (tmp_path / "elsewhere").rename(lost)
    file = lost / "data-00000.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00002-of-00003/data-00000.arrow is damaged"):
        merge_parts(tmp_path / "parts", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def write_as(folder, documents, token_type):
    folder.mkdir()
    writer = TokenWriter(folder, token_type=token_type)
    for number, document in enumerate(documents):
        writer.add([document], number)
    writer.finish_file()
    write_description(folder, files=list(writer.files), features=writer.features, manifest={"format": 2})
    return folder


def test_small_vocabularies_are_stored_in_half_the_bytes(tmp_path, tokenizer, texts, make_config, make_data):
    assert [choose_token_type(size) for size in (405, 65536, 65537, 250_000)] == ["uint16", "uint16", "int32", "int32"]
    documents = tokenizer.encode_batch(texts)
    stores = {}
    for token_type in ("uint16", "int32"):
        folder = write_as(tmp_path / token_type, documents, token_type)
        stores[token_type] = TokenStore(folder, tokenizer)
        assert load_from_disk(str(folder))["input_ids"][:] == [d.tolist() for d in documents]
    small, large = stores["uint16"], stores["int32"]
    assert small.content(3).dtype == np.uint16
    assert not small.content(3).flags.owndata, "a view of the mapped file"
    assert all(np.array_equal(small.content(n), large.content(n)) for n in range(len(documents)))
    assert (small.fingerprint, small.fingerprint.before) == (large.fingerprint, large.fingerprint.before)
    values = make_config(path=str(tmp_path / "uint16"), eval_samples=5)
    here = make_data(values)
    there = make_data(replace(values, dataset=replace(values.dataset, path=str(tmp_path / "int32"))))
    assert here.fingerprint == there.fingerprint
    assert here.unigram_entropy() == there.unigram_entropy()
    one, other = (next(data.loader()) for data in (here, there))
    assert (one.digest, one.state) == (other.digest, other.state)
    assert rows_of(one) == rows_of(other)
    assert [b.digest for b in here.eval_batches()] == [b.digest for b in there.eval_batches()]


def test_work_that_an_earlier_version_began_continues_as_int32(tmp_path, corpora, tokenizer, monkeypatch):
    settings, folder = SETTINGS["bare"], tmp_path / "tokens"
    monkeypatch.setattr(prepare, "choose_token_type", lambda size: "int32")
    save, saved = prepare._save_progress, []

    def stop(job, progress):
        save(job, progress)
        saved.append(len(progress.files))
        if saved[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_save_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(open_text(corpora["jsonl"]), tokenizer, folder, settings)
    monkeypatch.undo()
    progress = work_folder(folder) / "progress.json"
    progress.write_text(progress.read_text().replace('"token_type": "int32", ', ""))
    prepare_tokens(open_text(corpora["jsonl"]), tokenizer, folder, settings)
    assert read_manifest(folder)["token_type"] == "int32"
    assert TokenStore(folder, tokenizer).content(140).dtype == np.int32
