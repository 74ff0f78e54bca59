"""Data sets of the hub, and everything else that only `datasets` can read.

Reading is always streamed, shard by shard, with the library's own `state_dict` as cursor. Its `shuffle` is never used
(the state leaves out the buffer, so a resumed stream loses documents), and every reading starts with a fresh shard
object: a loaded state would otherwise be applied again in each later epoch.

`datasets` is imported where it reads: it takes a second, and brings pandas, which local files do without.
"""

import copy
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from huggingface_hub import HfApi

from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.rows.lanes import State
from neobert.data.source.files import fingerprint_files, local_file
from neobert.data.source.network import is_transient, with_retries
from neobert.data.source.sharing import ShardedSource
from neobert.data.source.spec import TEXT_COLUMNS, SourceSpec, choose_candidates, choose_text_column
from neobert.data.source.text import (
    STREAM_LANES,
    WHOLE,
    Record,
    Records,
    ShardFault,
    Span,
    TooLong,
    add_limit,
    check_length,
)
from neobert.errors import OR_SKIP_SHARD, DataError
from neobert.secrets import build_logger

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = build_logger(__name__)

Result = TypeVar("Result")

_REPORT_SECONDS = 10
_COLUMN_SAMPLE = 100
_EXAMPLES = 20
_STATE_EVERY = 64
"""Records between two saved states of the library; the ones in between are read again and skipped."""


class HubShard:
    """One shard of a streamed data set.

    Its position is `{"state": the library's, "skip": records after it, "done": records of the shard}`. Where the
    library keeps no state, `state` stays null and `skip` counts from the start: continuing reads everything before
    again.
    """

    size = 0

    def __init__(
        self,
        dataset: "IterableDataset",
        column: str,
        num_shards: int,
        number: int,
        span: Span = WHOLE,
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        self._max_record_bytes = max_record_bytes
        self._dataset, self._column, self._num_shards = dataset, column, num_shards
        self.number, self._begin = number, span.after
        self._end: int | None = None if span.until is None else span.until["done"]

    def read(self, position: State | None) -> Records:
        from datasets.exceptions import DatasetsError

        shard = self._dataset.shard(num_shards=self._num_shards, index=self.number)
        start = position or self._begin or {"state": None, "skip": 0, "done": 0}
        state, skip, done = start["state"], start["skip"], start["done"]
        if self._end is not None and done >= self._end:
            return
        if state is not None:
            shard.load_state_dict(copy.deepcopy(state))
        try:
            for example in _skip_records(iter(shard), skip, f"shard {self.number}"):
                done, skip = done + 1, skip + 1
                if skip % _STATE_EVERY == 0 and (found := _find_state(shard)) is not None:
                    state, skip = found, 0
                text, problem = self._check(example[self._column], done)
                cursor = {"state": state, "skip": skip, "done": done}
                yield Record((self.number << 40) | (done - 1), text, problem, cursor)
                if done == self._end:
                    return
        except (OSError, EOFError, ValueError, DatasetsError, pa.ArrowException) as error:
            if is_transient(error):
                raise
            raise ShardFault(
                f"shard {self.number} of the data set cannot be read ({type(error).__name__}: {error}); check the data "
                f"set{OR_SKIP_SHARD}"
            ) from error

    def _check(self, text: Any, number: int) -> tuple[str | None, str | None]:
        """(text, problem) of a value of the column."""
        if not isinstance(text, str):
            return None, None
        try:
            check_length(text, self._max_record_bytes)
        except TooLong as error:
            return None, f"shard {self.number} of the data set, record {number}: {error}"
        return (text if text.strip() else None), None


def _find_state(shard: "IterableDataset") -> State | None:
    try:
        state: State | None = shard.state_dict()
    except NotImplementedError:
        return None
    return state


def _skip_records(examples: Iterator[Any], count: int, where: str) -> Iterator[Any]:
    """What comes after the first `count` examples; says how it goes when that takes long."""
    started = reported = time.monotonic()
    for number in range(1, count + 1):
        if next(examples, None) is None:
            return
        if (now := time.monotonic()) - reported > _REPORT_SECONDS:
            reported = now
            logger.info("%s: skipped %d of %d records in %.0f s", where, number, count, now - started)
    if (seconds := time.monotonic() - started) > 1:
        logger.info("%s: skipped %d records in %.1f s; this data set keeps no state", where, count, seconds)
    yield from examples


class HubSource(ShardedSource):
    """A streamed split; its shards are read whole, in their order, or shared out to lanes."""

    def __init__(
        self,
        dataset: "IterableDataset",
        *,
        column: str | None,
        label: str,
        fingerprint: str,
        count: int | None = None,
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        self._column, note = _choose_column(dataset, column, label)
        self._dataset = dataset.select_columns([self._column])
        super().__init__(label, [0] * self._dataset.num_shards)
        self._count = count
        self.commit: str | None = None
        """The commit that is read; None for local files."""

        self.notes = [note]
        self._max_record_bytes = max_record_bytes
        self.fingerprint = add_limit(fingerprint, max_record_bytes)

    def build_shard(self, number: int, span: Span = WHOLE) -> HubShard:
        return HubShard(self._dataset, self._column, len(self._sizes), number, span, self._max_record_bytes)

    def count(self, span: Span = WHOLE) -> int | None:
        return self._count if span.is_whole else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubPin:
    """A data set at the commit that its revision named when the run started."""

    spec: SourceSpec
    commit: str | None
    """None for a local folder."""


def pin_hub(spec: SourceSpec) -> HubPin:
    """Finds the commit of `dataset.name`; everything is read at this one, whatever becomes of the revision.

    Raises:
        DataError: the data set cannot be reached.
    """
    name = str(spec.name)
    if Path(name).exists():
        return HubPin(spec=spec, commit=None)
    info = _ask_hub(spec, lambda: HfApi().dataset_info(name, revision=spec.revision))
    return HubPin(spec=spec, commit=info.sha)


def list_hub_splits(pin: HubPin) -> list[str]:
    """Names of the splits.

    Raises:
        DataError: the data set cannot be reached.
    """
    from datasets import get_dataset_split_names

    spec = pin.spec
    return list(_ask_hub(spec, lambda: get_dataset_split_names(str(spec.name), spec.config, revision=pin.commit)))


def open_hub(pin: HubPin, split: str) -> HubSource:
    """A split of `dataset.name`.

    Raises:
        DataError: the data set cannot be reached or has no text column.
    """
    from datasets import load_dataset

    spec, name, commit = pin.spec, str(pin.spec.name), pin.commit
    if commit is None:
        files = [local_file(path) for path in sorted(Path(name).rglob("*")) if path.is_file()]
        fingerprint = fingerprint_files(files)
    else:
        fingerprint = "sha256:" + hashlib.sha256(f"{name}\0{spec.config}\0{split}\0{commit}".encode()).hexdigest()

    def load() -> HubSource:
        dataset = load_dataset(
            name, spec.config, split=split, revision=commit, streaming=True, cache_dir=spec.section.cache_dir
        )
        described = (dataset.info.splits or {}).get(split)
        return HubSource(
            _spread(dataset, spec.section.num_lanes),
            column=spec.text_column,
            label=name,
            fingerprint=fingerprint,
            count=(described.num_examples or None) if described is not None else None,
            max_record_bytes=spec.section.max_record_bytes,
        )

    source = _ask_hub(spec, load)
    source.commit = commit
    if commit is not None:
        source.notes.append(f"{name} at commit {commit}; dataset.revision: {commit} stays on it")
    return source


def _ask_hub(spec: SourceSpec, ask: Callable[[], Result]) -> Result:
    """What the hub answers.

    Raises:
        DataError: it does not, or refuses.
    """
    try:
        return with_retries(ask, retries=spec.section.network_retries, where=f"dataset.name: {spec.name}")
    except DataError:
        raise
    except Exception as error:
        raise _cannot_load(str(spec.name), error) from error


def _spread(dataset: "IterableDataset", num_lanes: int | None) -> "IterableDataset":
    """Cuts files into their row groups when there are fewer files than lanes; the order of the records stays."""
    return dataset if dataset.num_shards >= (num_lanes or STREAM_LANES) else dataset.reshard()


def _choose_column(dataset: "IterableDataset", requested: str | None, label: str) -> tuple[str, str]:
    text_columns: list[str] = []
    others: list[str] = []
    if dataset.features is not None:
        for name, feature in dataset.features.items():
            is_text = getattr(feature, "dtype", None) in ("string", "large_string")
            (text_columns if is_text else others).append(name)
    else:
        for example in islice(dataset, _COLUMN_SAMPLE):
            text_columns = [name for name, value in example.items() if isinstance(value, str)]
            others = [name for name in example if name not in text_columns]
            if text_columns:
                break
    if requested is None and text_columns and not set(TEXT_COLUMNS) & set(text_columns):  # A guess: look at the values.
        examples = list(islice(dataset, _EXAMPLES))
        some = {name: [x[name] for x in examples if isinstance(x.get(name), str)] for name in text_columns}
        candidates = choose_candidates(some, requested)
        others, text_columns = [*others, *(n for n in text_columns if n not in candidates)], candidates
    return choose_text_column(text_columns, others, requested, label)


def _cannot_load(name: str, error: BaseException) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    kinds = {base.__name__ for base in type(error).__mro__}
    if "GatedRepoError" in kinds or "gated dataset" in reason:
        remedy = "Accept its terms on the hub, then log in with `hf auth login` or set HF_TOKEN"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        remedy = "Check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN"
    elif "RevisionNotFoundError" in kinds:
        remedy = "dataset.revision must be a branch, tag or commit that it has"
    else:
        remedy = (
            "Check the spelling, dataset.config, dataset.revision and the connection, or name local files with "
            "dataset.path"
        )
    return DataError(f"dataset.name: {name} cannot be loaded: {reason}. {remedy}")


def write_documents(data: "Dataset | Sequence[str]", parent: Path) -> Path:
    """The folder in `parent` that holds these documents as `save_to_disk` writes them; written when it is not there.

    Raises:
        DataError: `data` is neither a Dataset nor texts, or empty, or `parent` holds other documents.
    """
    from datasets import Dataset

    if not isinstance(data, Dataset):
        if isinstance(data, str) or not all(isinstance(text, str) for text in data):
            raise DataError("data: pass a datasets.Dataset, or a list of texts (str)")
        data = Dataset.from_dict({"text": list(data)})
    if not len(data):
        raise DataError("data: there are no documents in it; pass at least one")
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    folder = parent / digest.hexdigest()[:16]
    if others := [path for path in parent.glob("[!.]*") if path != folder]:
        raise DataError(
            f"data: the run of this trainer.output_dir was made with other documents, those in {others[0]}; pass them "
            f"to resume it, choose another trainer.output_dir, or remove {parent} to start with these"
        )
    if not folder.is_dir():
        # Every process of a run does this before they know each other: each writes a copy, and the first rename stays.
        temporary = parent / f".tmp-{folder.name}-{secrets.token_hex(4)}"
        try:
            data.flatten_indices().save_to_disk(str(temporary))
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
