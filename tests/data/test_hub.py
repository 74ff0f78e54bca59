import pytest

from neobert.data import hub
from neobert.data.errors import DataError
from neobert.data.hub import HubShard, open_hub, pin_hub
from neobert.data.sharing import Stretch
from neobert.data.sources import list_splits
from neobert.data.spec import SourceSpec
from neobert.data.text import Share, Span


@pytest.fixture
def section(corpora, tmp_path):
    return SourceSpec(name=str(corpora["jsonl.gz"]), cache_dir=str(tmp_path / "cache"))


def test_a_named_data_set_is_read_in_the_order_of_its_files(section, texts):
    assert list(list_splits(section)) == ["train"]
    source = open_hub(pin_hub(section), "train")
    assert [record.text for record in source.records()] == texts
    assert source.notes == ["text from column 'text'"]


@pytest.mark.parametrize("every", [1, 4, 64])
def test_a_shard_goes_on_from_every_position(every, section, texts, monkeypatch):
    monkeypatch.setattr(hub, "_STATE_EVERY", every)
    dataset = open_hub(pin_hub(section), "train")._dataset
    shard = HubShard(dataset, "text", dataset.num_shards, Stretch(1, None, None))
    records = list(shard.read(None))
    assert 15 < len(records) < 30
    for n, record in enumerate(records):
        assert list(shard.read(record.cursor)) == records[n + 1 :]
    assert list(shard.read(None)) == records


def test_held_out_documents_are_passed_over_by_every_lane(section, texts):
    source = open_hub(pin_hub(section), "train")
    cursor = [record.cursor for record in source.records()][29]
    for num_lanes in (1, 2, 5):
        found = []
        for reader in source.readers(Share(seed=0, num_lanes=num_lanes, span=Span(after=cursor))):
            found += [record.text for record in reader.read(0, reader.start())]
        assert sorted(found) == sorted(texts[30:])


def test_more_lanes_than_shards_is_an_error(section):
    with pytest.raises(DataError, match=r"dataset.num_lanes: 20, but .* has 7 shards"):
        open_hub(pin_hub(section), "train").readers(Share(seed=0, num_lanes=20))


def test_a_missing_column_is_named(section):
    with pytest.raises(DataError, match=r"dataset.text_column: 'body' is not in .*: text"):
        open_hub(pin_hub(SourceSpec(name=section.name, text_column="body")), "train")


def test_a_data_set_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(hub, "get_dataset_split_names", unreachable)
    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    section = SourceSpec(name="nobody/nothing", network_retries=0)
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

    real = hub.load_dataset
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "load_dataset", load)
    source = open_hub(pin_hub(SourceSpec(name="some/data", revision="main")), "train")
    assert (asked["name"], asked["revision"], asked["split"]) == ("some/data", "c0ffee", "train")
    assert "dataset.revision: c0ffee stays on it" in source.notes[-1]
