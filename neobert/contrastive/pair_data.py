"""The data of a contrastive run: its prepared sets, what is held out of them, and the loader over pairs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neobert.config.rules_data import FORMS
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.batches import PairCollator
from neobert.contrastive.examples import FORM_NAMES, Form
from neobert.contrastive.pair_order import PairLane, PairOrder, TrainSet, step_fractions
from neobert.contrastive.prepare_sets import NamedSource, describe, is_same_source, list_sets_of
from neobert.contrastive.set_folder import PairStore, SetInfo, list_sets, sets_folder
from neobert.data.pipeline import Reader, build_loader
from neobert.data.rows.batch_size import BatchSchedule, constant_batch
from neobert.data.rows.lanes import RowOrder, State, sum_counters
from neobert.data.rows.loader import Loader, LoaderSettings
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError
from neobert.objectives.pair_batch import Kind
from neobert.train.build import build_train_masks

_KINDS: dict[Form, Kind] = {"pairs": "infonce", "scored": "cosent", "labelled": "supcon"}
"""The loss that `contrastive.loss_type: auto` takes."""


class NotPrepared(DataError):
    """Sets that `preprocess.py` has not written yet."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOut:
    """Examples to evaluate on: those from `first` up to `last` of a set."""

    key: str
    store: PairStore
    first: int
    last: int
    anchor_prefix: str
    positive_prefix: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ContrastiveData:
    """Everything a contrastive run reads."""

    tokenizer: Tokenizer
    sets: tuple[TrainSet, ...]
    held_out: tuple[HeldOut, ...]
    pair_order: PairOrder
    order: RowOrder
    loader_settings: LoaderSettings
    collate: PairCollator
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def eval_fingerprint(self) -> str | None:
        """Changes when the held-out examples change; None without any."""
        parts = [f"{part.key} {part.store.info.fingerprint} {part.first}:{part.last}" for part in self.held_out]
        return " ".join(parts) or None

    @property
    def inventory(self) -> Inventory:
        """Prepared sets are no files of a user."""
        return NO_FILES

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(item.key for item in self.sets)

    @property
    def num_rows(self) -> int:
        """Pairs of all sets, without the texts of `contrastive.pretraining_dataset`."""
        paired = self.sets[:-1] if self.pair_order.pretraining_prob else self.sets
        return sum(len(item) for item in paired)

    @property
    def num_tokens(self) -> None:
        """Texts are tokenised when they are read."""
        return None

    @property
    def batch(self) -> BatchSchedule:
        """The rows of every step."""
        return self.loader_settings.batch

    def loader(self, state: State | None = None, skip: Sequence[tuple[int, int]] = (), step: int = 0) -> Loader:
        """The training batches of this rank from step `step` on, after `state` or from the start."""
        return build_loader(
            self, lambda _: PairLane(self.sets, self.pair_order, self.tokenizer.encode_batch), state, skip, step
        )

    def counters(self, state: State) -> dict[str, int]:
        return sum_counters(state)


def build_contrastive_data(config: Config, tokenizer: Tokenizer, reader: Reader) -> ContrastiveData:
    """What one process of a run with this config reads; arguments as of `neobert.train.build.build_config_data`.

    Raises:
        NotPrepared: a set is not there, or was made from another source.
        DataError: a set cannot be used as configured.
    """
    if reader.rows_per_step < 2:
        raise DataError(
            f"trainer.per_device_train_batch_size: a step of {reader.rows_per_step} row has nothing to compare it with;"
            " raise it, or trainer.global_batch_size"
        )
    section, data = config.contrastive, config.dataset
    chosen = choose_sets(config)
    sets = tuple(_build_train_set(config, item, store) for item, store in chosen.train)
    if chosen.pretraining is not None:
        sets = (*sets, _build_train_set(config, *chosen.pretraining, pretraining=True))
    pair_order = PairOrder(
        seed=config.seed,
        rows_per_step=reader.rows_per_step,
        alpha=data.alpha,
        max_seq_length=data.max_seq_length,
        pretraining_prob=section.pretraining_prob,
        rank=reader.rank,
        world=reader.world,
    )
    held_out = _held_out(config, chosen)
    return ContrastiveData(
        tokenizer=tokenizer,
        sets=sets,
        held_out=held_out,
        pair_order=pair_order,
        # A window is a step.
        order=RowOrder.of_examples(seed=config.seed, window_documents=0, max_seq_length=config.dataset.max_seq_length),
        # All rows of a process are compared with each other.
        loader_settings=reader.loader_settings(
            data, batch=constant_batch(reader.rows_per_step), micro_batch_rows=reader.rows_per_step // reader.world
        ),
        collate=PairCollator(
            sets=sets,
            chunk_rows=config.trainer.micro_batch_rows,
            max_seq_length=data.max_seq_length,
            pad_id=tokenizer.pad_id,
            seed=config.seed,
            masks=build_train_masks(config, tokenizer),
        ),
        fingerprint=_fingerprint(chosen, sets),
        notes=_notes(sets, pair_order, held_out),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenSets:
    """The sets of a config, opened."""

    train: tuple[tuple[NamedSource, PairStore], ...]
    evaluation: tuple[tuple[NamedSource, PairStore], ...]
    pretraining: tuple[NamedSource, PairStore] | None


def choose_sets(config: Config) -> ChosenSets:
    """Opens the prepared sets that a config names; where it names none to train on, all that are there.

    Raises:
        NotPrepared: one is not there, or was made from another source.
    """
    path = str(config.dataset.path)
    requested, there = list_sets_of(config), list_sets(path)
    others = [*requested.evaluation, *([requested.pretraining] if requested.pretraining is not None else [])]
    train = requested.train
    is_named = config.dataset.name is not None or bool(config.contrastive.sets)
    if config.dataset.load_all_from_disk or not is_named:
        named = {item.key: item for item in requested.train} if is_named else {}
        used = {item.key for item in others}
        train = tuple(named.get(key) or _as_stored(info) for key, info in there.items() if key not in used)
        if not train:
            raise NotPrepared(f"dataset.path: {sets_folder(path)} holds no set to train on")
    missing = dict.fromkeys(item.key for item in (*train, *others) if item.key not in there)
    if missing:
        held = ", ".join(there) or "no set"
        raise NotPrepared(f"dataset.path: {sets_folder(path)} lacks {', '.join(missing)}; it holds {held}")

    def open_set(item: NamedSource) -> tuple[NamedSource, PairStore]:
        if not is_same_source(there[item.key].source, describe(item.source)):
            raise NotPrepared(
                f"{sets_folder(path) / item.key} was made from {there[item.key].source}, the config says"
                f" {describe(item.source)}"
            )
        return item, PairStore(sets_folder(path) / item.key)

    return ChosenSets(
        train=tuple(map(open_set, train)),
        evaluation=tuple(map(open_set, requested.evaluation)),
        pretraining=None if requested.pretraining is None else open_set(requested.pretraining),
    )


def _as_stored(info: SetInfo) -> NamedSource:
    """The entry that a set was made from."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in info.source.items()
    }
    return NamedSource(key=info.key, source=PairSource(**values))


def _build_train_set(config: Config, item: NamedSource, store: PairStore, *, pretraining: bool = False) -> TrainSet:
    kind = config.contrastive.pretraining_objective if pretraining else _choose_kind(config, store.info)
    held_out = 0 if pretraining else _num_held_out(config, store.info)
    if len(store) <= held_out:
        raise DataError(
            f"dataset.eval_samples: {held_out} leaves nothing of {item.key} to train on, it has {len(store)} rows;"
            " lower it"
        )
    anchor_prefix, positive_prefix = _prefixes(config, item)
    return TrainSet(
        key=item.key,
        store=store,
        kind=kind,
        first=held_out,
        anchor_prefix="" if pretraining else anchor_prefix,
        positive_prefix=positive_prefix,
        num_negatives=min(config.contrastive.num_hard_negatives, store.info.max_negatives) if kind == "infonce" else 0,
    )


def _choose_kind(config: Config, info: SetInfo) -> Kind:
    chosen = config.contrastive.loss_type
    if chosen == "auto":
        if info.form not in _KINDS:
            raise DataError(
                f"{info.key} holds texts without pairs, scores or labels; write contrastive.loss_type: simcse, or name"
                " its columns in contrastive.sets"
            )
        return _KINDS[info.form]
    if chosen not in ("simcse", "distill") and _KINDS.get(info.form) != chosen:
        raise DataError(
            f"contrastive.loss_type: {chosen} needs {FORMS[chosen]}, but {info.key} holds {FORM_NAMES[info.form]};"
            " write auto, or name other columns in contrastive.sets"
        )
    return chosen


def _prefixes(config: Config, item: NamedSource) -> tuple[str, str]:
    section, source = config.contrastive, item.source
    anchor = section.anchor_prefix if source.anchor_prefix is None else source.anchor_prefix
    positive = section.positive_prefix if source.positive_prefix is None else source.positive_prefix
    return anchor or "", positive or ""


def _num_held_out(config: Config, info: SetInfo) -> int:
    return (config.dataset.eval_samples or 0) if info.form in ("pairs", "scored") else 0


def _held_out(config: Config, chosen: ChosenSets) -> tuple[HeldOut, ...]:
    """The sets of `contrastive.eval_sets`, and the first `dataset.eval_samples` examples of every training set."""
    found = [(item, store, len(store)) for item, store in chosen.evaluation]
    found += [(item, store, n) for item, store in chosen.train if (n := _num_held_out(config, store.info))]
    unfit = [item.key for item, store, _ in found if store.info.form not in ("pairs", "scored")]
    if unfit:
        raise DataError(
            f"contrastive.eval_sets: {', '.join(unfit)} has neither pairs nor scored pairs to evaluate on; name its"
            " columns"
        )
    return tuple(
        HeldOut(
            key=item.key,
            store=store,
            first=0,
            last=last,
            anchor_prefix=_prefixes(config, item)[0],
            positive_prefix=_prefixes(config, item)[1],
        )
        for item, store, last in found
    )


def _fingerprint(chosen: ChosenSets, sets: Sequence[TrainSet]) -> str:
    opened = [*chosen.train, *([chosen.pretraining] if chosen.pretraining is not None else [])]
    parts = [
        (item.key, store.info.fingerprint, pairs.first, item.source.anchor_prefix, item.source.positive_prefix)
        for (item, store), pairs in zip(opened, sets)
    ]
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _notes(sets: Sequence[TrainSet], order: PairOrder, held_out: Sequence[HeldOut]) -> tuple[str, ...]:
    notes = []
    for item, fraction in zip(sets, step_fractions(sets, order)):
        negatives = f", {item.num_negatives} hard negatives each" if item.num_negatives else ""
        size = f"{len(item):,} {FORM_NAMES[item.store.info.form]}"
        notes.append(f"{fraction:.1%} of the steps: {item.key}, {size}{negatives}: {item.kind}")
    notes += [
        f"evaluation on {part.last - part.first:,} {FORM_NAMES[part.store.info.form]} of {part.key}"
        for part in held_out
    ]
    return tuple(notes)
