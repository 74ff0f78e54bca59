"""Rank 0 lists, looks into and fingerprints files; the other ranks get what it found where they see the same files."""

import gzip
import json
import pickle
import shutil
from pathlib import Path

import pytest
from ranks import outcome_of, run_ranks
from reading import KINDS, dataset_values, rows_of

from neobert.config.schema import DatasetSection
from neobert.data.pipeline import Reader, build_data, choose_stream_lanes
from neobert.data.rows.loader import merge_states
from neobert.data.source import lines, parquet
from neobert.data.source.formats import list_shared_splits
from neobert.data.source.inventory import NO_FILES
from neobert.data.source.sharing import choose_num_lanes, fit_lanes
from neobert.data.source.spec import SourceSpec
from neobert.errors import DataError
from neobert.train.processes import agreement
from neobert.train.processes.agreement import RankError, SharedFiles, sharing_errors


@pytest.fixture
def fingerprinted(monkeypatch):
    """The number of files in each call that fingerprints some."""
    calls = []
    for module in (lines, parquet):
        real = module.fingerprint_files
        counted = lambda files, real=real, **values: calls.append(len(files)) or real(files, **values)  # noqa: E731
        monkeypatch.setattr(module, "fingerprint_files", counted)
    return calls


def open_at(path):
    """What a rank finds at `path`, which may be another one for each rank."""

    def work(runtime):
        where = path if isinstance(path, str | Path) else path[runtime.rank]
        spec = SourceSpec(path=(str(where),), section=DatasetSection(path=str(where)))
        return list_shared_splits(spec, SharedFiles(runtime))["train"](None)

    return work


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "text", "csv", "parquet"])
def test_files_are_looked_into_once(kind, corpora, fingerprinted):
    found = run_ranks(3, open_at(corpora[kind]))
    assert len(fingerprinted) == 1
    assert len({source.fingerprint for source in found}) == 1
    assert [source.inventory == NO_FILES for source in found] == [False, True, True], "only rank 0 describes the files"
    texts = [[record.text for record in source.records()] for source in found]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) >= 150


def test_copies_on_other_machines_are_looked_into_by_each(corpora, tmp_path, fingerprinted):
    copies = [tmp_path / f"machine-{rank}" for rank in range(3)]
    for copy in copies:
        shutil.copytree(corpora["jsonl"], copy)
    found = run_ranks(3, open_at(copies))
    assert len(fingerprinted) == 3
    assert len({source.fingerprint for source in found}) == 1
    urls = [next(iter(source.inventory.files)).url for source in found]
    assert urls == [str(copy / "part-0.jsonl") for copy in copies]


def test_a_file_that_one_rank_does_not_see_as_rank_0_does(corpora, tmp_path, monkeypatch, fingerprinted):
    """The same path on another file system: other inodes."""
    real = agreement.see
    monkeypatch.setattr(agreement, "see", lambda paths: [(*known[:3], 7) for known in real(paths)])
    assert len(run_ranks(2, open_at(corpora["jsonl"]))) == 2
    assert len(fingerprinted) == 2


def test_what_rank_0_does_not_find_ends_every_rank(tmp_path):
    errors = run_ranks(2, outcome_of(within_errors(open_at(tmp_path / "nothing"))))
    assert isinstance(errors[0], DataError)
    assert isinstance(errors[1], RankError)
    assert "does not exist" in str(errors[1])


def within_errors(work):
    def guarded(runtime):
        with sharing_errors(runtime):
            return work(runtime)

    return guarded


@pytest.mark.parametrize("kind", ["indexed", "text_indexed"])
def test_folders_are_mapped_by_each_and_measured_once(kind, corpora, tokenizer, make_config):
    source = list_shared_splits(
        SourceSpec(path=(str(corpora[kind]),), section=DatasetSection()), lambda find, **_: find()
    )["train"](tokenizer)
    sent = pickle.dumps(source)
    assert len(sent) < 4000, "nothing of the size of the data is sent"
    other = pickle.loads(sent)
    assert (other.fingerprint, len(other), other.count()) == (source.fingerprint, 150, 150)
    if kind == "indexed":
        assert [other.content(n).tolist() for n in range(5)] == [source.content(n).tolist() for n in range(5)]
        assert other.longest(source.slice(3, None)) == max(len(source.content(n)) for n in range(3, 150))
    else:
        assert other.text(3) == source.text(3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hub"])
def test_ranks_that_share_read_the_rows_of_one_process(
    kind, corpora, make_config, make_data, tokenizer, policy, tmp_path
):
    config = make_config(**dataset_values(kind, corpora), num_lanes=None, eval_samples=5)
    loader = make_data(config).loader()
    expected = [next(loader) for _ in range(2)]

    def read(runtime):
        data = build_data(
            config,
            tokenizer,
            Reader(
                rows_per_step=24,
                prepared_dir=tmp_path / "prepared",
                rank=runtime.rank,
                world=3,
                share=SharedFiles(runtime),
            ),
            train_masks=policy,
            eval_masks=policy,
        )
        own = data.loader()
        return [next(own) for _ in range(2)], data.fingerprint, data.num_tokens

    found = run_ranks(3, read)
    assert len({(fingerprint, tokens) for _, fingerprint, tokens in found}) == 1
    for number, step in enumerate(expected):
        rows = {key: row for steps, _, _ in found for key, row in rows_of(steps[number]).items()}
        assert rows == rows_of(step)
        assert merge_states([steps[number].state for steps, _, _ in found]) == step.state


def test_lanes_grow_with_the_processes_of_the_first_start():
    assert [choose_stream_lanes(world) for world in (1, 16, 24, 512)] == [16, 16, 24, 512]
    assert [fit_lanes(most, limit) for most, limit in ((16, 5), (24, 100), (96, 50), (96, 20))] == [5, 24, 48, 16]
    # Each of the first three is read by 1, 2 and 8 of 512 processes; few shards are dealt like in a small run.
    assert [choose_num_lanes(shards, 512) for shards in (100_000, 5000, 1000, 100)] == [512, 256, 64, 10]


def test_the_lanes_of_a_run_are_those_it_started_with(tmp_path, make_config, make_data, tokenizer, policy):
    for number in range(60):
        lines_of = "".join(json.dumps({"text": f"w{number} w{n} " * 8}) + "\n" for n in range(8))
        (tmp_path / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(lines_of.encode()))
    config = make_config(path=str(tmp_path), num_lanes=None)

    def lanes(**values):
        reader = Reader(rows_per_step=24, prepared_dir=tmp_path / "prepared", **values)
        return build_data(config, tokenizer, reader, train_masks=policy, eval_masks=policy).order.num_lanes

    assert lanes() == 15
    assert lanes(world=20, stream_lanes=20) == 20
    assert lanes(world=1, stream_lanes=20) == 20
