"""From a config to batches: sources, splits, held-out documents, tokenising once, evaluation."""

import gzip
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from neobert.config.schema import Config, DatasetSection, TokenizerSection
from neobert.data.pipeline import Reader, build_data, build_tokenizer
from neobert.data.source.formats import StdlibSource, list_splits
from neobert.data.source.spec import SourceSpec, describe_source
from neobert.data.store import prepare
from neobert.data.store.token_folder import PrepareSettings
from neobert.errors import DataError
from neobert.types import IGNORE_INDEX

KINDS = ("indexed", "text_indexed", "jsonl", "jsonl.gz", "parquet")


def tokens_of(batch):
    """The tokens of a batch before they were corrupted, without padding."""
    ids = batch.input_ids.flatten().clone()
    kept = batch.targets != IGNORE_INDEX
    ids[batch.masked_index[kept]] = batch.targets[kept].int()
    return ids[batch.segments.ids.flatten() > 0].tolist()


def trained_on(data, num_steps):
    loader = data.loader()
    found = Counter(t for _ in range(num_steps) for b in next(loader).micro_batches for t in tokens_of(b))
    loader.close()
    return found


def eval_targets(data_of_ranks):
    """(tokens, targets by document) of an evaluation over all ranks; a document's only word is its number."""
    tokens, targets = Counter(), {}
    for data in data_of_ranks:
        for batch in data.eval_batches():
            tokens.update(tokens_of(batch))
            kept = batch.targets != IGNORE_INDEX
            positions = batch.positions.flatten()[batch.masked_index[kept]].tolist()
            for position, target in zip(positions, batch.targets[kept].tolist()):
                targets.setdefault(target, Counter())[position] += 1
    return tokens, targets


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_documents_are_never_trained_on(kind, corpora, texts, tokenizer, make_config, make_data):
    encoded = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
    for num_lanes, num_workers in ((1, 0), (2, 1)):
        config = make_config(path=str(corpora[kind]), eval_samples=25, num_lanes=num_lanes, num_workers=num_workers)
        data = make_data(config)
        held_out, _ = eval_targets([data])
        specials = {tokenizer.cls_id, tokenizer.sep_id}
        assert {t: n for t, n in held_out.items() if t not in specials} == Counter(
            t for tokens in encoded[:25] for t in tokens
        )
        found = trained_on(data, num_steps=20)
        assert set(found) - specials == {t for tokens in encoded[25:] for t in tokens}
        assert "held out of training" in " ".join(data.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_source_ranks_or_packing(kind, corpora, make_config, make_data):
    """Streamed or indexed, packed or not, 1 rank or 3: the same documents with the same masks."""
    base = make_config(path=str(corpora["indexed"]), eval_samples=25)
    expected = eval_targets([make_data(base)])
    for world, values in (
        (1, {}),
        (3, {}),
        (2, {"pack_sequences": False}),
        (1, {"enforce_full_packed_batches": False}),
    ):
        config = make_config(path=str(corpora[kind]), eval_samples=25, per_device_eval_batch_size=3, **values)
        ranks = [make_data(config, rank=rank, world=world) for rank in range(world)]
        assert eval_targets(ranks) == expected
        assert len({sum(1 for _ in data.eval_batches()) for data in ranks}) == 1
        assert {batch.input_ids.shape[0] for data in ranks for batch in data.eval_batches()} == {3}
    other = make_config(path=str(corpora[kind]), eval_samples=25, eval_seed=7)
    assert eval_targets([make_data(other)])[1] != expected[1]


def test_evaluations_repeat(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["jsonl"]), eval_samples=25))
    first = [batch.digest for batch in data.eval_batches()]
    loader = data.loader()
    next(loader)
    assert [batch.digest for batch in data.eval_batches()] == first


def test_more_ranks_than_rows_pad_with_empty_batches(corpora, make_config, make_data):
    config = make_config(path=str(corpora["indexed"]), eval_samples=1)
    batches = [list(make_data(config, rank=rank, world=4).eval_batches()) for rank in range(4)]
    assert [len(b) for b in batches] == [1, 1, 1, 1]
    assert [b[0].num_tokens == 0 for b in batches] == [False, False, False, True]
    assert (batches[3][0].num_targets, batches[3][0].input_ids.shape) == (0, (4, 32))


def split_folder(tmp_path, corpora):
    """A folder of files with a split for evaluation."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number, path in enumerate(sorted(corpora["jsonl"].iterdir())):
        (folder / ("train-0.jsonl", "validation-0.jsonl")[number]).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("text")
    return folder


def test_files_are_splits_by_their_names(tmp_path, corpora, tokenizer, texts, make_config, make_data):
    folder = split_folder(tmp_path, corpora)
    data = make_data(make_config(path=str(folder), eval_samples=10))
    assert "training on split 'train'" in data.notes[0]
    assert "evaluating on 10 documents of split 'validation'" in data.notes
    held_out, _ = eval_targets([data])
    wanted = Counter(t for tokens in tokenizer.encode_batch(texts[75:85]) for t in tokens.tolist())
    assert held_out - Counter(dict.fromkeys(tokenizer.special_ids, 10**6)) == wanted
    assert set(trained_on(data, 20)) - set(tokenizer.special_ids) == set(range(5, 80))


def test_a_folder_above_files_names_their_split(tmp_path, corpora):
    for name, part in (("data/train", "part-0.jsonl"), ("data/test", "part-1.jsonl"), (".cache/train", "part-0.jsonl")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_bytes((corpora["jsonl"] / part).read_bytes())
    assert sorted(list_splits(SourceSpec(path=(str(tmp_path),)))) == ["test", "train"]


def test_one_file_and_a_glob_are_train(corpora):
    folder = corpora["jsonl"]
    for path in (folder / "part-1.jsonl", folder / "part-*.jsonl", folder):
        assert list(list_splits(SourceSpec(path=(str(path),)))) == ["train"]


def test_describe_source(corpora):
    assert describe_source(str(corpora["jsonl"])).path == (str(corpora["jsonl"]),)
    assert describe_source("nowhere.jsonl.gz", text_column="body") == SourceSpec(
        path=("nowhere.jsonl.gz",), text_column="body"
    )
    assert describe_source("python_stdlib").name == "python_stdlib"
    assert describe_source("allenai/c4.en").name == "allenai/c4.en"


def test_a_dataset_dict_has_its_splits(tmp_path, texts, make_config, make_data):
    DatasetDict(
        {"train": Dataset.from_dict({"text": texts[:100]}), "test": Dataset.from_dict({"text": texts[100:]})}
    ).save_to_disk(tmp_path / "d")
    data = make_data(make_config(path=str(tmp_path / "d"), eval_samples=20))
    assert data.num_documents == 100
    assert "evaluating on 20 documents of split 'test'" in data.notes
    named = make_data(make_config(path=str(tmp_path / "d"), train_split="test", eval_split="train", eval_samples=20))
    assert named.num_documents == 50


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "text_indexed"])
def test_text_is_tokenised_once_where_asked(kind, corpora, texts, tokenizer, make_config, make_data, monkeypatch):
    config = make_config(path=str(corpora[kind]), streaming=False, eval_samples=25)
    data = make_data(config)
    indexed = make_data(make_config(path=str(corpora["indexed"]), eval_samples=25))
    assert (
        (data.num_documents, data.num_tokens) == (indexed.num_documents, indexed.num_tokens) == (125, data.num_tokens)
    )
    assert trained_on(data, 3) == trained_on(indexed, 3)
    assert eval_targets([data]) == eval_targets([indexed])
    monkeypatch.setattr(prepare, "_write", lambda *a: pytest.fail("tokenised a second time"))
    assert make_data(config).fingerprint == data.fingerprint
    assert any("150 documents" in note for note in data.notes)


def test_tokenised_data_is_made_again_when_text_or_settings_change(tmp_path, make_config, make_data):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2 w3"}\n' * 4)
    config = make_config(path=str(path), streaming=False)
    assert make_data(config).num_documents == 4
    path.write_text('{"text": "w1 w2 w3"}\n' * 5)
    assert make_data(config).num_documents == 5
    manifest = json.loads((tmp_path / "prepared" / "train" / "manifest.json").read_text())
    assert (manifest["num_documents"], manifest["num_tokens"], manifest["special_tokens"]) == (5, 15, False)
    assert [p.name for p in (tmp_path / "prepared").iterdir()] == ["train"]
    other = replace(config, dataset=replace(config.dataset, max_document_chars=4))
    assert make_data(other).num_tokens == manifest["num_tokens"] + 2 * 5
    (tmp_path / "prepared" / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match="is in the way"):
        make_data(config)


def test_an_interrupted_tokenising_leaves_nothing_that_looks_complete(tmp_path, make_config, make_data, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n' * 4)
    config = make_config(path=str(path), streaming=False)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.TokenWriter, "finish_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_data(config)
    assert list((tmp_path / "prepared").iterdir()) == []
    assert make_data(config).num_documents == 4


def test_rank_0_tokenises_and_the_others_wait(tmp_path, corpora, tokenizer, policy, make_config, monkeypatch):
    """Two ranks as threads, with a `main_first` as launchers have it."""
    done, written, found = threading.Event(), [], {}
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda *a: written.append(threading.current_thread().name) or write(*a))

    def rank(number):
        @contextmanager
        def main_first(facts=None):
            if number:
                done.wait()
            yield
            done.set()

        found[number] = build_data(
            make_config(path=str(corpora["jsonl"]), streaming=False),
            tokenizer,
            Reader(rows_per_step=24, prepared_dir=tmp_path / "shared", rank=number, world=2, main_first=main_first),
            train_masks=policy,
            eval_masks=policy,
        )

    threads = [threading.Thread(target=rank, args=(n,), name=f"rank{n}") for n in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == ["rank0"]
    assert found[0].fingerprint == found[1].fingerprint


def test_special_tokens_on_disk_give_one_pair_per_segment(tmp_path, texts, tokenizer, make_config, make_data):
    wrapped = [[tokenizer.cls_id, *tokens, tokenizer.sep_id] for tokens in tokenizer.encode_batch(texts)]
    Dataset.from_dict({"input_ids": wrapped}).save_to_disk(tmp_path / "d")
    for packing in ({}, {"pack_sequences": False}):
        step = next(make_data(make_config(path=str(tmp_path / "d"), **packing)).loader())
        for batch in step.micro_batches:
            tokens = tokens_of(batch)
            segments = int(batch.segments.ids.max(1).values.sum())
            assert tokens.count(tokenizer.cls_id) == tokens.count(tokenizer.sep_id) == segments


def test_counts_of_an_indexed_source(corpora, texts, tokenizer, make_config, make_data):
    lengths = np.array([len(t) for t in tokenizer.encode_batch(texts)])
    pieces = int((-(-lengths // 30)).sum())
    data = make_data(make_config(path=str(corpora["indexed"])))
    assert (data.num_documents, data.num_tokens, data.num_rows) == (150, int(lengths.sum()) + 2 * pieces, None)
    assert make_data(make_config(path=str(corpora["indexed"]), pack_sequences=False)).num_rows == pieces
    stream = make_data(make_config(path=str(corpora["jsonl"])))
    assert (stream.num_documents, stream.num_tokens, stream.num_rows) == (None, None, None)


@pytest.mark.parametrize("kind", ["indexed", "jsonl"])
def test_unigram_entropy(kind, corpora, texts, tokenizer, make_config, make_data):
    counts = np.array([len(t) for t in tokenizer.encode_batch(texts)], dtype=float)
    fractions = counts / counts.sum()
    data = make_data(make_config(path=str(corpora[kind]), window_documents=1000))
    assert data.unigram_entropy() == pytest.approx(-(fractions * np.log(fractions)).sum())


def test_fingerprint_depends_on_documents_and_on_what_is_held_out(corpora, make_config, make_data):
    def fingerprint(**values):
        return make_data(make_config(**values)).fingerprint

    one = fingerprint(path=str(corpora["jsonl"]))
    assert fingerprint(path=str(corpora["jsonl"]), num_workers=2) == one
    assert fingerprint(path=str(corpora["jsonl"]), eval_samples=3) != one
    assert fingerprint(path=str(corpora["jsonl"] / "part-0.jsonl")) != one


def test_evaluation_is_skipped_and_says_so(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["jsonl"])))
    assert data.eval_set is None
    assert list(data.eval_batches()) == []
    assert "no evaluation" in " ".join(data.notes)


def test_evaluation_budget(tmp_path, corpora, make_config, make_data):
    """A streamed split needs one; eval_max_batches counts over all ranks."""
    folder = split_folder(tmp_path, corpora)
    with pytest.raises(DataError) as failure:
        make_data(make_config(path=str(folder)))
    assert "dataset.eval_samples" in str(failure.value)
    assert "trainer.eval_max_batches" in str(failure.value)
    for path in (folder, corpora["indexed"]):
        extra = {} if path == folder else {"eval_samples": 60}
        config = make_config(path=str(path), eval_max_batches=2, **extra)
        one = list(make_data(config).eval_batches())
        two = [list(make_data(config, rank=rank, world=2).eval_batches()) for rank in range(2)]
        assert [len(one), len(two[0]), len(two[1])] == [2, 1, 1]
        assert sum(b.digest for b in one) % 2**64 == sum(b.digest for rank in two for b in rank) % 2**64
        assert sum(b.num_tokens for b in one) > 0.8 * sum(b.input_ids.numel() for b in one)
    indexed = make_data(make_config(path=str(folder), streaming=False))
    assert indexed.eval_set.num_documents == 75


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"path": "/nowhere/data"},
            r"dataset.path: /nowhere/data does not exist; give a folder of save_to_disk, or files",
        ),
        ({"path": None}, r"no data is named: set dataset.path .* or dataset.name"),
        ({"eval_samples": 150}, r"dataset.eval_samples: 150 holds out every usable document"),
        ({"eval_samples": 10**6}, r"dataset.eval_samples: 1000000 holds out every usable document of 'train' \(150\)"),
        ({"eval_split": "train"}, r"dataset.eval_split: 'train' is the training split.*dataset.eval_samples"),
        ({"eval_split": "dev"}, r"dataset.eval_split: 'dev' is not there; splits found: train"),
        ({"train_split": "all"}, r"dataset.train_split: 'all' is not there; splits found: train"),
    ],
)
def test_errors_name_key_value_and_remedy(values, message, corpora, make_config, make_data):
    with pytest.raises(DataError, match=message):
        make_data(make_config(**({"path": str(corpora["indexed"])} | values)))


def test_folders_without_data_or_with_two_kinds(tmp_path, make_config, make_data):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(DataError, match=r"has no file that can be read; give .* files ending in .jsonl"):
        make_data(make_config(path=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"mixes JSON and Parquet files in one split.*dataset.mixture"):
        make_data(make_config(path=str(tmp_path)))


def test_train_split_named_train_is_fine_without_splits(corpora, make_config, make_data):
    for kind in ("indexed", "jsonl"):
        assert make_data(make_config(path=str(corpora[kind]), train_split="train")).train.order.num_lanes == 3


def test_the_largest_lane_is_reported(tmp_path, make_config, make_data):
    for number, count in enumerate((10, 40)):
        with gzip.open(tmp_path / f"{number}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"w{n * 7 % 390} w{n}"}) + "\n" for n in range(count))
    data = make_data(make_config(path=str(tmp_path), num_lanes=2))
    assert any("times the data of the smallest" in note for note in data.notes)


def test_lanes_that_several_processes_read_are_reported(corpora, make_config, make_data):
    for world, readers in ((1, 0), (2, 2), (3, 0)):
        notes = make_data(make_config(path=str(corpora["jsonl"])), world=world).notes
        assert [f"by {readers} processes" in n for n in notes if "processes" in n] == ([True] if readers else [])
    indexed = make_data(make_config(path=str(corpora["indexed"])), world=2)
    assert not any("processes" in note for note in indexed.notes)


def test_python_stdlib_is_there(tmp_path):
    source = StdlibSource()
    texts = [record.text for record in source.records() if record.text]
    assert sum(map(len, texts)) > 5_000_000
    assert not any("/test/" in str(path) or "site-packages" in str(path) for path in source.paths)
    assert source.fingerprint == StdlibSource().fingerprint


def test_a_tokenizer_is_trained_once_into_the_run_folder(tmp_path, corpora, texts):
    def config(**tokenizer):
        return Config(
            dataset=DatasetSection(path=str(corpora["jsonl"]), eval_samples=20),
            tokenizer=TokenizerSection(**({"train": True, "vocab_size": 300} | tokenizer)),
        )

    first = build_tokenizer(config(), None, tmp_path)
    marker = tmp_path / "tokenizer" / "tokenizer_config.json"
    before = marker.stat().st_mtime_ns
    assert build_tokenizer(config(), None, tmp_path).digest == first.digest
    assert marker.stat().st_mtime_ns == before
    assert build_tokenizer(config(vocab_size=290), None, tmp_path).size == 290
    assert build_tokenizer(config(train_documents=5), None, tmp_path).digest != first.digest
    first.save(tmp_path / "checkpoint" / "tokenizer")
    again = build_tokenizer(config(vocab_size=290), tmp_path / "checkpoint", tmp_path)
    assert again.digest == first.digest


def test_tokenised_data_cannot_train_a_tokenizer(tmp_path, corpora):
    config = Config(dataset=DatasetSection(path=str(corpora["indexed"])), tokenizer=TokenizerSection(train=True))
    with pytest.raises(DataError, match="a tokenizer is trained on text"):
        build_tokenizer(config, None, tmp_path)


def test_documents_stored_in_pieces_are_held_out_whole(tmp_path, corpora, texts, tokenizer, make_config, make_data):
    """Cut before they were stored, the same documents are held out, and slices and caps count documents."""
    source = list_splits(SourceSpec(path=(str(corpora["jsonl"]),)))["train"](None)
    settings = PrepareSettings(max_document_chars=10**6, max_bad_records=0, special_tokens=True, max_length=12)
    prepare.prepare_tokens(source, tokenizer, tmp_path / "pieces", settings)
    encoded = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
    data = make_data(make_config(path=str(tmp_path / "pieces"), eval_samples=25, train_split="train[5:]"))
    assert (data.eval_set.num_documents, data.num_documents) == (25, 120)
    specials = set(tokenizer.special_ids)
    held_out, _ = eval_targets([data])
    assert {t: n for t, n in held_out.items() if t not in specials} == Counter(t for d in encoded[5:30] for t in d)
    assert set(trained_on(data, num_steps=40)) - specials == {t for d in encoded[30:] for t in d}


def test_evaluated_documents_are_counted_whole(tmp_path, corpora, texts, tokenizer, make_config, make_data):
    """Stored in pieces or not, and where `eval_max_batches` leaves out rows: a document counts once, and only when a
    piece of it is evaluated."""
    source = list_splits(SourceSpec(path=(str(corpora["jsonl"]),)))["train"](None)
    settings = PrepareSettings(max_document_chars=10**6, max_bad_records=0, special_tokens=True, max_length=12)
    prepare.prepare_tokens(source, tokenizer, tmp_path / "pieces", settings)
    for path in (tmp_path / "pieces", corpora["jsonl"]):
        for max_batches, rows in ((None, 4), (1, 1), (2, 2)):
            config = make_config(
                path=str(path), eval_samples=25, eval_max_batches=max_batches, per_device_eval_batch_size=rows
            )
            data = make_data(config)
            tokens, _ = eval_targets([data])
            assert data.eval_set.num_documents == len(set(tokens) - set(tokenizer.special_ids)) > 0
    assert data.eval_set.num_documents < 25


def test_a_cap_is_part_of_what_was_tokenised(make_config, make_data):
    for cap in (7, 10):
        assert make_data(make_config(path=None, name=f"python_stdlib:{cap}")).num_documents == cap


def test_slices_of_one_split_are_tokenised_side_by_side(corpora, make_config, make_data, monkeypatch):
    config = make_config(path=str(corpora["jsonl"]), streaming=False, train_split="train[20:]", eval_split="train[:20]")
    first = make_data(config)
    assert (first.num_documents, first.eval_set.num_documents) == (130, 20)
    monkeypatch.setattr(prepare, "_write", lambda *a: pytest.fail("tokenised a second time"))
    assert make_data(config).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [("train[:100]", "train[90:]"), ("train[:50%]", "train[40%:60%]"), ("train[10:]", "train[-5:]")],
)
def test_slices_that_overlap_are_refused(train, evaluation, corpora, make_config, make_data):
    with pytest.raises(DataError, match=r"dataset\.eval_split: .* overlaps dataset\.train_split"):
        make_data(make_config(path=str(corpora["indexed"]), train_split=train, eval_split=evaluation))


def test_the_bound_of_a_segment_is_that_of_the_longest_training_document(
    corpora, texts, tokenizer, make_config, make_data
):
    """Of documents whose lengths are known; attention launches blocks for so many tokens of each. Batches keep their
    digests, and evaluation the length of a row."""
    longest = max(map(len, tokenizer.encode_batch(texts))) + 2
    known = make_data(make_config(path=str(corpora["indexed"]), eval_samples=0, max_seq_length=256))
    unknown = make_data(make_config(path=str(corpora["jsonl"]), eval_samples=0, max_seq_length=256))
    assert longest <= known.collate.max_segment_length < min(2 * longest, 256)
    assert (unknown.collate.max_segment_length, known.eval_collate.max_segment_length) == (256, None)
    loaders = [replace(known, collate=replace(known.collate, max_segment_length=n)).loader() for n in (None, longest)]
    for _ in range(3):
        plain, bounded = (next(loader) for loader in loaders)
        assert plain.digest == bounded.digest
        for one, other in zip(plain.micro_batches, bounded.micro_batches):
            assert other.segments.max_seqlen == longest >= other.segments.cu_seqlens.diff().max()
            assert set(one.segments.cu_seqlens.tolist()) <= set(other.segments.cu_seqlens.tolist())
    for loader in loaders:
        loader.close()
