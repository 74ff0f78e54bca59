"""What the data of a run costs each of many ranks: simulated in one process, without a model.

Tiny compressed files are written, a few documents each. Rank 0 starts as in a run: it lists and looks into the files,
and what it sends to the others is kept. Another rank starts from what was sent. Then the batches of all ranks are
made, one rank after the other, until every file was read once: each row must be read by one rank, and every document
be in one of them.
"""

import gzip
import json
import multiprocessing
import os
import pickle
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neobert.config.schema import Config, DatasetSection
from neobert.config.schema_trainer import TrainerSection
from neobert.data.pipeline import DataPipeline, Reader, choose_stream_lanes
from neobert.data.rows.loader import merge_states
from neobert.data.source.one_reader import Seen, Share
from neobert.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from neobert.errors import DataError
from neobert.train.build import build_config_data
from neobert.types import PackedBatch

DOCUMENTS = 3
"""Of a file."""

_BASE = 1000
_PER_FOLDER = 1000
_LENGTH = 32

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What building the data and the first batch cost a rank."""

    seconds: float
    cpu_seconds: float
    """Of `seconds`: the rest is the disk, and other programs."""

    seconds_to_first_batch: float
    memory_bytes: int
    """What the process grew by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCosts:
    """The result of `simulate`."""

    ranks: int
    shards: int
    documents: int
    lanes: int
    seconds_to_write: float
    main: Start
    other: Start
    sent_bytes: int
    """What rank 0 sends to each of the others."""

    state_bytes: int
    """Of the merged state, as a checkpoint holds it."""

    steps: int
    rows: int
    """Of all ranks; each was read by one of them."""

    seconds_to_read: float
    """Of all ranks, one after the other."""

    def describe(self) -> str:
        """A table for people."""
        lines = [
            f"{self.ranks:,} ranks, {self.shards:,} files of {DOCUMENTS} documents, {self.lanes:,} lanes",
            "| | rank 0 | another rank |\n|---|---|---|",
        ]
        for label, name in (
            ("seconds to open the data", "seconds"),
            ("CPU seconds of these", "cpu_seconds"),
            ("seconds to the first batch after that", "seconds_to_first_batch"),
        ):
            lines.append(f"| {label} | {getattr(self.main, name):.2f} | {getattr(self.other, name):.2f} |")
        lines += [
            f"| memory, MB | {self.main.memory_bytes / 1e6:,.0f} | {self.other.memory_bytes / 1e6:,.0f} |",
            f"rank 0 sends {self.sent_bytes / 1e6:,.1f} MB to each; the data state has {self.state_bytes:,} bytes",
            f"{self.rows:,} rows in {self.steps:,} steps: each read by one rank, and every document in one of them "
            f"({self.seconds_to_read:.0f} s for all ranks, one after the other)",
        ]
        return "\n".join(lines)


def simulate(folder: Path, *, ranks: int, shards: int, say: Callable[[str], None] = print) -> RankCosts:
    """Writes the files below `folder` unless they are there, and reads them with all ranks.

    Raises:
        DataError: a row was read twice or not at all, or a document is in none.
    """
    start = time.perf_counter()
    _write_files(folder, shards)
    written = time.perf_counter() - start
    say(f"{shards:,} files are there after {written:.1f} s")
    config, tokenizer = _build_config(folder), _build_tokenizer()
    sent = folder.with_name(f"{folder.name}.sent")
    main = _measure(_start_main, config, tokenizer, ranks, sent)
    say(f"rank 0 has started after {main.seconds:.1f} s")
    other = _measure(_start_other, config, tokenizer, ranks, sent)
    say(f"another rank has started after {other.seconds:.1f} s")
    start = time.perf_counter()
    data = _start_other(config, tokenizer, ranks, sent)
    steps, rows, state = _read_all(data, ranks, shards * DOCUMENTS, tokenizer, say)
    sizes = sent.stat().st_size
    sent.unlink()
    return RankCosts(
        ranks=ranks,
        shards=shards,
        documents=shards * DOCUMENTS,
        lanes=data.order.num_lanes,
        seconds_to_write=written,
        main=main,
        other=other,
        sent_bytes=sizes,
        state_bytes=len(json.dumps(state)),
        steps=steps,
        rows=rows,
        seconds_to_read=time.perf_counter() - start,
    )


def _write_files(folder: Path, shards: int) -> None:
    for number in range(shards):
        path = folder / f"{number // _PER_FOLDER:04d}" / f"{number % _PER_FOLDER:04d}.jsonl.gz"
        if number % _PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            documents = range(number * DOCUMENTS, (number + 1) * DOCUMENTS)
            lines = "".join(json.dumps({"text": f"w{d // _BASE} w{d % _BASE} w0 w0 w0 w0"}) + "\n" for d in documents)
            path.write_bytes(gzip.compress(lines.encode(), compresslevel=1))


def _build_tokenizer() -> Tokenizer:
    words = [*SPECIAL_TOKENS.values(), *(f"w{n}" for n in range(_BASE))]
    backend = Backend(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS))


def _build_config(folder: Path) -> Config:
    section = DatasetSection(path=str(folder), max_seq_length=_LENGTH, min_length=1, num_workers=0)
    trainer = TrainerSection(per_device_train_batch_size=1)
    # The first two tokens of a document are its number, so nothing is masked.
    base = Config(seed=1, dataset=section, trainer=trainer)
    return replace(base, datacollator=replace(base.datacollator, mlm_probability=1e-9))


def _reader(ranks: int, rank: int, share: Share) -> Reader:
    return Reader(
        rows_per_step=ranks,
        prepared_dir=Path(),
        rank=rank,
        world=ranks,
        share=share,
        stream_lanes=choose_stream_lanes(ranks),
    )


class _Sender:
    """Keeps what rank 0 sends, one message after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")

    def __call__(self, find: Callable[[], T], *, path: Sequence[str] = (), seen: Callable[[], Seen] | None = None) -> T:
        found = find()
        with self._path.open("ab") as file:
            pickle.dump(found, file)
        return found


class _Receiver:
    """Gives what was sent."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __call__(self, find: Callable[[], T], *, path: Sequence[str] = (), seen: Callable[[], Seen] | None = None) -> T:
        found: T = pickle.load(self._file)
        return found


def _start_main(config: Config, tokenizer: Tokenizer, ranks: int, sent: Path) -> DataPipeline:
    return build_config_data(config, tokenizer, _reader(ranks, 0, _Sender(sent)))


def _start_other(config: Config, tokenizer: Tokenizer, ranks: int, sent: Path) -> DataPipeline:
    with sent.open("rb") as file:
        return build_config_data(config, tokenizer, _reader(ranks, ranks - 1, _Receiver(file)))


def _measure(start: Callable[..., DataPipeline], *arguments: Any) -> Start:
    """In a process of its own, whose memory is only that of the start."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        before, began, cpu = _memory_bytes(), time.perf_counter(), time.process_time()
        data = start(*arguments)
        opened, cpu = time.perf_counter(), time.process_time() - cpu
        loader = data.loader()
        next(loader)
        first = time.perf_counter()
        loader.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = Start(
            seconds=opened - began,
            cpu_seconds=cpu,
            seconds_to_first_batch=first - opened,
            memory_bytes=max(0, peak - before),
        )
        theirs.send(asdict(found))
        theirs.close()
        os._exit(0)

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        return Start(**ours.recv())
    finally:
        process.join()


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _read_all(
    data: DataPipeline, ranks: int, num_documents: int, tokenizer: Tokenizer, say: Callable[[str], None]
) -> tuple[int, int, dict[str, Any]]:
    """Steps, rows and the merged state after every lane has ended its first epoch.

    Raises:
        DataError: a row was read twice or not at all, or a document is in none.
    """
    first_word = tokenizer.encode_batch(["w0"])[0][0]
    seen_rows: set[int] = set()
    seen_documents: set[int] = set()
    states, num_steps, began = [], 0, time.perf_counter()
    for rank in range(ranks):
        loader, made = replace(data, loader_settings=replace(data.loader_settings, rank=rank)).loader(), 0
        while rank == 0 or made < num_steps:
            step, made = next(loader), made + 1
            _take(step.micro_batches, seen_rows, seen_documents, int(first_word))
            if rank == 0 and not num_steps and all(lane["epoch"] for lane in step.state["lanes"].values()):
                num_steps = made + made // 8 + 2  # Lanes differ by a tenth at most.
            if made == num_steps:
                break
        loader.close()
        states.append(step.state)
        if time.perf_counter() - began > 30:
            say(f"{rank + 1:,} of {ranks:,} ranks have read")
            began = time.perf_counter()
    if seen_rows != set(range(num_steps * ranks)):
        raise DataError(f"the rows of {num_steps} steps are not 0 to {num_steps * ranks - 1}")
    missing = num_documents - len(seen_documents & set(range(num_documents)))
    if missing or len(seen_documents) != num_documents:
        raise DataError(f"{missing} of {num_documents} documents are in no row")
    return num_steps, len(seen_rows), merge_states(states)


def _take(batches: Sequence[Any], rows: set[int], documents: set[int], first_word: int) -> None:
    for batch in batches:
        assert isinstance(batch, PackedBatch), "made by the collator of pretraining"
        numbers = batch.row_keys.tolist()
        if not rows.isdisjoint(numbers):
            raise DataError(f"rows {sorted(rows.intersection(numbers))} were read twice")
        rows.update(numbers)
        ids = batch.input_ids.view(-1)
        starts = batch.segments.cu_seqlens.tolist()
        for begin, end in pairwise(starts):
            if end - begin > 2 and int(ids[begin + 1]) >= first_word:
                high, low = (ids[begin + 1 : begin + 3] - first_word).tolist()
                documents.add(high * _BASE + low)
