import datasets
import pytest
from huggingface_hub import errors as hf_errors

from neobert.config.schema_data import DatasetSection
from neobert.data.source import hub
from neobert.data.source.formats import list_splits
from neobert.data.source.hub import HubShard, HubSource, open_hub, pin_hub
from neobert.data.source.spec import SourceSpec, describe_sources
from neobert.data.source.text import BadShard, Sharding, Span
from neobert.errors import DataError


@pytest.fixture
def section(corpora, tmp_path):
    (spec,) = describe_sources(DatasetSection(name=str(corpora["jsonl.gz"]), cache_dir=str(tmp_path / "cache")))
    return spec


def test_a_named_data_set_is_read_in_the_order_of_its_files(section, texts):
    assert list(list_splits(section)) == ["train"]
    source = open_hub(pin_hub(section), "train")
    assert [record.text for record in source.records()] == texts
    assert source.notes == ["text from column 'text'"]


@pytest.mark.parametrize("every", [1, 4, 64])
def test_a_shard_continues_from_every_position(every, section, texts, monkeypatch):
    monkeypatch.setattr(hub, "_STATE_EVERY", every)
    dataset = open_hub(pin_hub(section), "train")._dataset
    shard = HubShard(dataset, "text", dataset.num_shards, 1)
    records = list(shard.read(None))
    assert 15 < len(records) < 30
    for n, record in enumerate(records):
        assert list(shard.read(record.cursor)) == records[n + 1 :]
    assert list(shard.read(None)) == records


def test_held_out_documents_are_skipped_by_every_lane(section, texts):
    source = open_hub(pin_hub(section), "train")
    cursor = [record.cursor for record in source.records()][29]
    for num_lanes in (1, 2, 5):
        found = []
        for reader in source.readers(Sharding(seed=0, num_lanes=num_lanes), Span(after=cursor)):
            found += [record.text for record in reader.read(0, reader.start())]
        assert sorted(found) == sorted(texts[30:])


def test_more_lanes_than_shards_is_an_error(section):
    with pytest.raises(DataError, match=r"dataset.num_lanes: 20, but .* has 7 shards"):
        open_hub(pin_hub(section), "train").readers(Sharding(seed=0, num_lanes=20))


def test_a_missing_column_is_named(section):
    with pytest.raises(DataError, match=r"dataset.text_column: 'body' is not in .*: text"):
        open_hub(pin_hub(SourceSpec(name=section.name, text_column="body")), "train")


def test_a_data_set_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    (section,) = describe_sources(DatasetSection(name="nobody/nothing", network_retries=0))
    for failing in (lambda: list_splits(section), lambda: pin_hub(section)):
        with pytest.raises(
            DataError, match=r"dataset.name: nobody/nothing cannot be read: .*Couldn't reach.*dataset.network_retries"
        ):
            failing()


def test_a_hub_data_set_is_pinned_to_its_commit(section, monkeypatch, tmp_path):
    """The commit that the revision names at the start is the one that is read, and part of the fingerprint."""
    asked = {}

    class Api:
        def dataset_info(self, name, revision):
            asked["revision"] = revision
            return type("Info", (), {"sha": "c0ffee"})

    def load(name, config, **kwargs):
        asked.update(kwargs, name=name)
        return real(section.name, split="train", streaming=True)

    real = datasets.load_dataset
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_hub(pin_hub(SourceSpec(name="some/data", revision="main")), "train")
    assert (asked["name"], asked["revision"], asked["split"]) == ("some/data", "c0ffee", "train")
    assert "dataset.revision: c0ffee stays on it" in source.notes[-1]


class FakeShard:
    """A data set of the library that cannot report its state."""

    num_shards, features = 2, None

    def __init__(self, index=None):
        self._index = index

    def select_columns(self, names):
        return self

    def shard(self, num_shards, index):
        return FakeShard(index)

    def state_dict(self):
        raise NotImplementedError("no state here")

    def load_state_dict(self, state):
        raise AssertionError("there is no state to load")

    def __iter__(self):
        yield from ({"text": f"shard {self._index} text {n}"} for n in range(200))


def test_without_a_state_records_are_skipped_by_counting(monkeypatch, caplog):
    source = HubSource(FakeShard(), column=None, label="some/data", fingerprint="sha256:0")
    records = list(source.records())
    assert len(records) == 400
    assert records[150].cursor == {"shard": 0, "position": {"state": None, "skip": 151, "done": 151}}
    for index in (0, 63, 64, 150, 199, 200, 398):
        assert list(source.records(Span(after=records[index].cursor))) == records[index + 1 :]
    ticks = iter(range(0, 10**6, 7))
    monkeypatch.setattr(hub.time, "monotonic", lambda: next(ticks))
    with caplog.at_level("INFO"):
        next(source.records(Span(after=records[99].cursor)))
    assert "shard 0: skipped 2 of 100 records in 14 s" in caplog.messages[0]
    assert "skipped 100 records in" in caplog.messages[-1]
    assert "keeps no state" in caplog.messages[-1]


def test_a_shard_that_the_library_cannot_read(section):
    class Damaged(FakeShard):
        def shard(self, num_shards, index):
            return Damaged(index)

        def __iter__(self):
            yield {"text": "one"}
            if self._index == 0:
                raise ValueError("the file is damaged")

    source = HubSource(Damaged(0), column="text", label="some/data", fingerprint="sha256:0")
    (reader,) = source.readers(Sharding(seed=0, num_lanes=1, shuffle=False))
    with pytest.raises(BadShard, match=r"shard 0 of the data set .*ValueError: the file is damaged") as failure:
        list(reader.read(0, reader.start()))
    assert failure.value.shard == 0
    assert [record.text for record in reader.read(0, failure.value.next_cursor)] == ["one"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hf_errors.GatedRepoError, r"Accept its terms on the hub, then log in with `hf auth login` or set HF_TOKEN"),
        (hf_errors.RepositoryNotFoundError, r"Check the spelling; for a private one log in"),
        (hf_errors.RevisionNotFoundError, r"dataset.revision must be a branch, tag or commit"),
    ],
)
def test_what_the_hub_refuses_is_explained(error, words, monkeypatch):
    def refuse(*args, **kwargs):
        raise error("it said no", response=type("Response", (), {"headers": {}, "request": None, "status_code": 403})())

    monkeypatch.setattr(hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=rf"dataset.name: nobody/nothing cannot be loaded: .*{words}"):
        list_splits(SourceSpec(name="nobody/nothing"))


def test_a_revision_that_moves_during_the_start(section, monkeypatch):
    """The commit is asked for once; splits and documents are read at that one."""
    commits, asked = iter(["sha-one", "sha-two", "sha-three"]), []

    class Api:
        def dataset_info(self, name, revision):
            return type("Info", (), {"sha": next(commits)})

    real = datasets.load_dataset
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda *a, **kw: asked.append(kw["revision"]) or ["train", "test"]
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **kw: asked.append(kw["revision"]) or real(section.name, split="train", streaming=True),
    )
    found = list_splits(SourceSpec(name="some/data"))
    prints = {found[name](None).fingerprint for name in ("train", "test")}
    assert asked == ["sha-one"] * 3
    assert len(prints) == 2
    other = list_splits(SourceSpec(name="some/data"))["train"](None).fingerprint
    assert other not in prints
