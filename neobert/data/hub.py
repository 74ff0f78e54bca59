"""Text through `datasets`: data sets of the hub, and Parquet files.

Reading is always streamed, shard by shard, with the library's own `state_dict` as cursor. Its `shuffle` is never used
(the state leaves out the buffer, so a resumed stream loses documents), and every reading begins with a fresh shard
object: a loaded state would otherwise be applied again in each later epoch.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import IterableDataset, get_dataset_split_names, load_dataset
from huggingface_hub import HfApi

from neobert.data.columns import choose_text_column
from neobert.data.errors import DataError
from neobert.data.jsonl import STREAM_LANES, choose_num_lanes, fingerprint_files
from neobert.data.lanes import State
from neobert.data.spec import SourceSpec
from neobert.data.text import WHOLE, Reader, Record, Records, ShardReader, Span, read_shards

_STATE_EVERY = 64
"""Records between two saved states of the library; the ones in between are read again and passed over."""


class HubShard:
    """One shard of a streamed data set. Its position is `{"state": the library's, "skip": records after it}`."""

    size = 0

    def __init__(
        self, dataset: IterableDataset, num_shards: int, number: int, column: str, begin: State | None = None
    ) -> None:
        self._dataset, self._num_shards, self._number = dataset, num_shards, number
        self._column, self._begin = column, begin

    def read(self, position: State | None) -> Records:
        shard = self._dataset.shard(num_shards=self._num_shards, index=self._number)
        start = position or self._begin or {"state": None, "skip": 0, "done": 0}
        state, skip, done = start["state"], start["skip"], start["done"]
        if state is not None:
            shard.load_state_dict(copy.deepcopy(state))
        since = 0
        for example in shard:
            since += 1
            if since <= skip:
                continue
            done += 1
            if since == _STATE_EVERY:
                state, since, skip = shard.state_dict(), 0, 0
            text = example[self._column]
            usable = isinstance(text, str) and bool(text.strip())
            cursor = {"state": state, "skip": since, "done": done}
            yield Record((self._number << 40) | (done - 1), text if usable else None, None, cursor)


class HubSource:
    """A streamed split; its shards are read whole, in their order, or shared out to lanes."""

    def __init__(self, dataset: IterableDataset, *, column: str | None, place: str, fingerprint: str) -> None:
        self._column, note = _choose_column(dataset, column, place)
        self._dataset = dataset.select_columns([self._column])
        self._place = place
        self.notes = [note]
        self.fingerprint = fingerprint
        self.commit: str | None = None
        """The commit that is read; None for local files."""

    def records(self, span: Span = WHOLE) -> Records:
        return read_shards(self._shards(None), span.after or {"shard": 0, "position": None})

    def count(self) -> int | None:
        return None

    def part(self, number: int, count: int) -> Span:
        raise DataError("this source cannot be cut into parts yet; tokenise it without --shard")

    def readers(self, *, seed: int, num_lanes: int | None, after: State | None) -> list[Reader]:
        shards = self._shards(after)
        if num_lanes is not None and num_lanes > len(shards):
            raise DataError(
                f"dataset.num_lanes: {num_lanes}, but {self._place} has {len(shards)} shards to share out; "
                "give at most that, or leave it null"
            )
        count = num_lanes or choose_num_lanes(len(shards))
        return [ShardReader(shards[lane::count], seed, lane) for lane in range(count)]

    def _shards(self, after: State | None) -> list[HubShard]:
        first, begin = (0, None) if after is None else (after["shard"], after["position"])
        count = self._dataset.num_shards
        return [
            HubShard(self._dataset, count, number, self._column, begin if number == first else None)
            for number in range(first, count)
        ]


def open_hub(spec: SourceSpec, split: str) -> HubSource:
    """A split of `dataset.name`, pinned to the commit that its revision names now.

    Raises:
        DataError: the data set cannot be reached or has no text column.
    """
    name = str(spec.name)
    try:
        if Path(name).exists():
            commit, fingerprint = None, fingerprint_files(sorted(p for p in Path(name).rglob("*") if p.is_file()))
        else:
            commit = HfApi().dataset_info(name, revision=spec.revision).sha
            fingerprint = "sha256:" + hashlib.sha256(f"{name}\0{spec.config}\0{split}\0{commit}".encode()).hexdigest()
        dataset = load_dataset(
            name, spec.config, split=split, revision=commit, streaming=True, cache_dir=spec.cache_dir
        )
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise _cannot_load(name, error) from error
    source = HubSource(_spread(dataset, spec.num_lanes), column=spec.text_column, place=name, fingerprint=fingerprint)
    source.commit = commit
    if commit is not None:
        source.notes.append(f"{name} at commit {commit}; dataset.revision: {commit} stays on it")
    return source


def open_parquet(paths: Sequence[Path], spec: SourceSpec) -> HubSource:
    """Local Parquet files, in the order of their names."""
    files = sorted(paths)
    try:
        dataset = load_dataset("parquet", data_files=[str(p) for p in files], split="train", streaming=True)
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise _cannot_load(spec.label, error) from error
    return HubSource(
        _spread(dataset, spec.num_lanes),
        column=spec.text_column,
        place=spec.label,
        fingerprint=fingerprint_files(files),
    )


def list_hub_splits(spec: SourceSpec) -> list[str]:
    """Names of the splits of `dataset.name`.

    Raises:
        DataError: the data set cannot be reached.
    """
    name = str(spec.name)
    try:
        return list(get_dataset_split_names(name, spec.config, revision=spec.revision))
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise _cannot_load(name, error) from error


def _spread(dataset: IterableDataset, num_lanes: int | None) -> IterableDataset:
    """Cuts files into their row groups when there are fewer files than lanes; the order of the records stays."""
    return dataset if dataset.num_shards >= (num_lanes or STREAM_LANES) else dataset.reshard()


def _choose_column(dataset: IterableDataset, wanted: str | None, place: str) -> tuple[str, str]:
    text_columns: list[str] = []
    others: list[str] = []
    if dataset.features is not None:
        for name, feature in dataset.features.items():
            is_text = getattr(feature, "dtype", None) in ("string", "large_string")
            (text_columns if is_text else others).append(name)
    else:
        first: dict[str, Any] = next(iter(dataset), {})
        for name, value in first.items():
            (text_columns if isinstance(value, str) else others).append(name)
    return choose_text_column(text_columns, others, wanted, place)


def _cannot_load(name: str, error: BaseException) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return DataError(
        f"dataset.name: {name} cannot be loaded: {reason}. Check the spelling, dataset.config, dataset.revision and "
        "the connection, or name local files with dataset.path"
    )
