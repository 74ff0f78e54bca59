"""The data of a run: which source, which documents train and which evaluate, and the loader over them.

`Reader` is who reads it: one of the processes of a run, and with how many threads.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import Config, DatasetSection
from neobert.data.fingerprint import combine, digest_json, fits
from neobert.data.rows.batch_size import BatchSchedule, build_batch_schedule
from neobert.data.rows.collate import Collator, bound_segments
from neobert.data.rows.evaluation import EvalSet, choose_evaluation
from neobert.data.rows.lanes import Lane, RowOrder, State, sum_counters
from neobert.data.rows.loader import Collate, Loader, LoaderSettings
from neobert.data.rows.packing import max_segments_per_row
from neobert.data.rows.training import TrainData, build_row_order, build_train, mix_by_tokens
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.source.one_reader import Share, alone
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import STREAM_LANES
from neobert.data.store.opening import Source, View, list_sources, open_training_texts
from neobert.data.tokenizer import Tokenizer, check_mask_token, limit_threads, load_tokenizer, train_tokenizer
from neobert.host import available_cpus
from neobert.types import Corruption, PackedBatch

PREFETCH_STEPS = 4
"""Steps kept ready when `dataset.prefetch_factor` is null."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reader:
    """The process that reads: what a step takes, which part of it is this one's, and where prepared data is."""

    rows_per_step: int
    """Global batch in rows, after a warm-up of the batch."""

    prepared_dir: Path
    """Where text that is not streamed is tokenised to, unless `dataset.pre_tokenize_output` says; used again when it
    fits."""

    rank: int = 0
    world: int = 1
    """Number of processes."""

    main_first: Callable[..., AbstractContextManager[Any]] = nullcontext
    """A context in which rank 0 runs before the others, put around the tokenising. `main_first(facts)`: what is made
    depends on these named values, which must be equal on all ranks."""

    share: Share = alone
    """What rank 0 finds in files, for all ranks."""

    stream_lanes: int = STREAM_LANES
    """Lanes of a stream that is large enough, where `dataset.num_lanes` is null; see `choose_stream_lanes`."""

    pin_memory: bool = False
    """Whether batches go to page-locked memory as they are made."""

    def loader_settings(
        self, section: DatasetSection, *, batch: BatchSchedule, micro_batch_rows: int
    ) -> LoaderSettings:
        """How this process reads the steps of `batch`."""
        return LoaderSettings(
            batch=batch,
            micro_batch_rows=micro_batch_rows,
            rank=self.rank,
            world=self.world,
            num_workers=choose_num_workers(self.world) if section.num_workers is None else section.num_workers,
            prefetch_steps=section.prefetch_factor or PREFETCH_STEPS,
            pin_memory=self.pin_memory,
        )


def choose_stream_lanes(world: int) -> int:
    """Lanes of streams in a run that starts with so many processes: 16, and one for each where they are more.

    They are a part of the order of the rows, so a run keeps the number it started with."""
    return max(STREAM_LANES, world)


def choose_num_workers(world: int) -> int:
    """Threads that open windows when `dataset.num_workers` is null: a quarter of the cores of this process,
    from 1 to 4. The tokenizer uses the other cores by itself."""
    local = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(4, available_cpus() // local // 4))


class RowsInOrder(Protocol):
    """What a loader needs of the data of a run, beside what opens its lanes."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def order(self) -> RowOrder: ...

    @property
    def loader_settings(self) -> LoaderSettings: ...

    @property
    def collate(self) -> Collate: ...


def build_loader(
    data: RowsInOrder,
    open_lane: Callable[[int], Lane],
    state: State | None,
    skip: Sequence[tuple[int, int]],
    step: int,
) -> Loader:
    """The loader of such data; arguments as of `Loader`."""
    return Loader(
        open_lane,
        order=data.order,
        settings=data.loader_settings,
        collate=data.collate,
        cls_id=data.tokenizer.cls_id,
        sep_id=data.tokenizer.sep_id,
        state=state,
        skip=skip,
        step=step,
    )


_COUNTED_TOKENS, _COUNTED_WINDOWS = 50_000_000, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class DataPipeline:
    """Everything a run reads."""

    tokenizer: Tokenizer
    train: TrainData
    loader_settings: LoaderSettings
    collate: Collator
    eval_set: EvalSet | None
    eval_collate: Collator
    fingerprint: str
    """Changes when the training documents change."""

    notes: tuple[str, ...]
    """What was found and chosen, for the console."""

    inventory: Inventory
    """The files of all sources."""

    @property
    def order(self) -> RowOrder:
        return self.train.order

    @property
    def eval_fingerprint(self) -> str | None:
        """Changes when the evaluation documents change; None without any."""
        return None if self.eval_set is None else self.eval_set.fingerprint

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their numbers."""
        return self.train.labels

    @property
    def num_documents(self) -> int | None:
        """Training documents; None when unknown."""
        return self.train.num_documents

    @property
    def num_tokens(self) -> int | None:
        """Tokens of one pass over the training data, [CLS] and [SEP] included; None when unknown."""
        return self.train.num_tokens

    @property
    def num_rows(self) -> int | None:
        """What the loader counts as rows in one pass, where a row is one piece of a document: without packing, and with
        `trainer.enforce_full_packed_batches: false`. None when rows are packed, or when unknown."""
        return None if self.order.packing == "best_fit" else self.train.num_pieces

    @property
    def batch(self) -> BatchSchedule:
        """Rows of each step."""
        return self.loader_settings.batch

    def loader(self, state: State | None = None, skip: Sequence[tuple[int, int]] = (), step: int = 0) -> Loader:
        """The training batches of this rank, from `state` (of a `StepBatch`, merged over ranks) or from the start.

        Rows whose numbers are in one of the half-open ranges of `skip` are skipped. The first batch is that of step
        `step`, counted from 0.
        """
        return build_loader(self, self.train.lane_opener(), state, skip, step)

    def eval_batches(self) -> Iterator[PackedBatch]:
        """This rank's part of the evaluation; as many batches on every rank, none without evaluation data."""
        return iter(()) if self.eval_set is None else self.eval_set.batches(self.eval_collate, **self._eval_part)

    def first_eval_batches(self, num_tokens: int) -> Iterator[PackedBatch]:
        """This rank's part of the first rows of the evaluation, which have about so many tokens together."""
        if self.eval_set is None:
            return iter(())
        return self.eval_set.first_batches(self.eval_collate, num_tokens, **self._eval_part)

    @property
    def _eval_part(self) -> dict[str, int]:
        settings, tokenizer = self.loader_settings, self.tokenizer
        ids = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
        return {**ids, "rank": settings.rank, "world": settings.world}

    def counters(self, state: State) -> dict[str, int]:
        """Records skipped up to `state`: `bad`, `skipped`, `dropped`."""
        return sum_counters(state)

    def unigram_entropy(self) -> float:
        """Entropy in nats of the token frequencies: the loss of a model that knows nothing but them."""
        counts = self.token_counts
        fractions = counts[counts > 0] / max(1, counts.sum())
        return float(-(fractions * np.log(fractions)).sum())

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """How often each token occurs in the training data, 0 for special ones: in all of an indexed source (an even
        sample of 50 million where it is larger), in the first window of up to 4 lanes of a stream."""
        counts = np.zeros(self.tokenizer.size, dtype=np.int64)
        if self.train.tokens is not None:
            for block in self.train.tokens.token_blocks(_COUNTED_TOKENS):
                counts += np.bincount(block, minlength=len(counts))
        else:
            open_lane = self.train.lane_opener()
            for number in range(min(_COUNTED_WINDOWS, self.train.order.num_lanes)):
                lane = open_lane(number)
                window = lane.open(lane.start())
                for piece in (piece for row in window.rows for piece in row):
                    counts += np.bincount(window.get(piece), minlength=len(counts))
        counts[list(self.tokenizer.special_ids)] = 0
        return counts


def build_data(
    config: Config,
    tokenizer: Tokenizer,
    reader: Reader,
    *,
    train_masks: Corruption,
    eval_masks: Corruption,
) -> DataPipeline:
    """Finds source and splits, tokenises what is to be tokenised once, and sets evaluation documents apart.

    Raises:
        DataError: the data cannot be used as configured.
    """
    section = config.dataset
    limit_threads(section.num_proc)
    to = reader.prepared_dir if section.pre_tokenize_output is None else Path(section.pre_tokenize_output)
    sources = list_sources(section, tokenizer, to, reader.main_first, reader.share)
    views = [source.open(source.train_split, source.spec.max_documents) for source in sources]
    order = build_row_order(config, views)
    evaluation = choose_evaluation(config, sources, views, order)
    mixed, mixing = mix_by_tokens(evaluation.train, section, order)
    train = build_train(mixed, tokenizer, order, section, stream_lanes=reader.stream_lanes, share=reader.share)
    collate = replace(_build_collate(config, tokenizer, train_masks), num_sources=len(sources))
    longest = [view.documents.longest(view.span) for view in evaluation.train]
    loader_settings = reader.loader_settings(
        section,
        batch=build_batch_schedule(config, reader.rows_per_step),
        micro_batch_rows=config.trainer.micro_batch_rows,
    )
    found = [note for source, view in zip(sources, views) for note in _note_source(source, view)]
    inventory = sum((view.documents.inventory for view in views), NO_FILES) + evaluation.inventory
    return DataPipeline(
        tokenizer=tokenizer,
        train=train,
        loader_settings=loader_settings,
        collate=replace(collate, max_segment_length=bound_segments(longest, section.max_seq_length)),
        eval_set=evaluation.eval_set,
        eval_collate=replace(collate, policy=eval_masks, seed=config.trainer.eval_seed, draw="document"),
        fingerprint=_combine_fingerprints(evaluation.train, section.sample_by),
        inventory=inventory,
        notes=(
            *found,
            *inventory.notes(),
            *mixing,
            *train.notes,
            *_note_shared_lanes(train, reader.world),
            *evaluation.notes,
            _note_threads(section, loader_settings),
        ),
    )


def _combine_fingerprints(views: Sequence[View], sample_by: str) -> str:
    return combine(
        (view.documents.fingerprint for view in views),
        lambda prints: digest_json(
            sample_by,
            [(one, *map(_describe_cursor, view.span), view.spec.weight) for one, view in zip(prints, views)],
        ),
    )


def _describe_cursor(cursor: State | None) -> State | int | None:
    """As it is in fingerprints: that of tokens on disk is the bare row, from before they had cursors."""
    return cursor["row"] if cursor is not None and cursor.keys() == {"row"} else cursor


def _note_source(source: Source, view: View) -> list[str]:
    found = f"training on split {str(source.train_split)!r} of {source.spec.label}"
    return [f"{found}; splits found: {', '.join(source.splits)}", *view.documents.notes]


def _note_threads(section: DatasetSection, settings: LoaderSettings) -> str:
    workers = f"{settings.num_workers} thread(s) open windows" + (" (chosen)" if section.num_workers is None else "")
    ahead = f"{settings.prefetch_steps} steps ahead" + (" (chosen)" if section.prefetch_factor is None else "")
    return f"{workers}, {ahead}, {'pinned' if settings.pin_memory else 'pageable'} memory"


def _build_collate(config: Config, tokenizer: Tokenizer, masks: Corruption) -> Collator:
    packed, length = config.datacollator.pack_sequences, config.dataset.max_seq_length
    return Collator(
        policy=masks,
        seed=config.seed,
        draw="row",
        max_seq_length=length,
        max_segments=max_segments_per_row(length, packed=packed),
        pad_id=tokenizer.pad_id,
        pad_to_multiple_of=None if packed else config.datacollator.pad_to_multiple_of,
    )


def build_tokenizer(
    config: Config,
    checkpoint: Path | None,
    output_dir: Path,
    main_first: Callable[..., AbstractContextManager[Any]] = nullcontext,
    share: Share = alone,
) -> Tokenizer:
    """The checkpoint's tokenizer where a run continues; else the one to train, or the one that is named.

    A trained tokenizer is kept in `output_dir/tokenizer` and read from there: every rank, and every start before the
    first checkpoint, has the same one. It is trained again when its settings or the documents have changed.

    Args:
        main_first, share: as of `Reader`.

    Raises:
        DataError: it cannot be loaded or trained, or its mask occurs in text.
    """
    tokenizer = _load_or_train(config, checkpoint, output_dir, main_first, share)
    check_mask_token(tokenizer)
    return tokenizer


def _load_or_train(
    config: Config,
    checkpoint: Path | None,
    output_dir: Path,
    main_first: Callable[..., AbstractContextManager[Any]],
    share: Share,
) -> Tokenizer:
    section = config.tokenizer
    if checkpoint is not None:
        return _load_folder(config, checkpoint / "tokenizer")
    if not section.train:
        with main_first():  # One process fetches it from the hub.
            return load_tokenizer(section)
    sources = describe_sources(config.dataset)
    training = open_training_texts(sources, config.dataset, section.train_documents, share)
    settings = [section.algorithm, section.vocab_size, section.train_documents, config.dataset.eval_samples]
    made_from = combine([training.fingerprint], lambda parts: digest_json(parts[0], settings))
    folder, stamp = output_dir / "tokenizer", output_dir / "tokenizer" / "trained_from.txt"
    with main_first({"documents that the tokenizer learns from": made_from}):
        if not stamp.is_file() or not fits(stamp.read_text(), made_from):
            tokenizer = train_tokenizer(training.texts, section.algorithm, section.vocab_size)
            temporary = output_dir / ".tmp-tokenizer"
            shutil.rmtree(temporary, ignore_errors=True)
            tokenizer.save(temporary)
            (temporary / stamp.name).write_text(made_from)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    return _load_folder(config, folder)


def _load_folder(config: Config, folder: Path) -> Tokenizer:
    return load_tokenizer(replace(config.tokenizer, path=str(folder), name=None, revision=None))


def _note_shared_lanes(train: TrainData, world: int) -> list[str]:
    readers = world // math.gcd(world, train.order.num_lanes)
    if readers == 1 or train.tokens is not None:
        return []
    return [
        f"each of the {train.order.num_lanes} lanes is read and tokenised by {readers} processes; with a "
        f"dataset.num_lanes that is a multiple of {world}, everything is read once"
    ]
