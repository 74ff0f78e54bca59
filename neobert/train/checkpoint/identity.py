"""What a resume may change: the checkpoint's facts and this start's facts -> differences, each of one class.

| class | meaning |
|---|---|
| fixed | never changes: architecture, tokenizer, optimizer, the data under the same setting |
| needs declaring | changes what is learned; accepted when `trainer.resume_allow` names it |
| declared | was named |
| source | another source was named: the order of rows starts at its first row |
| schedule | length of the run and learning rate, functions of the step: may always change |
| free | changes nothing that is learned |

The class of a key is written at its field in the schema.

Another order of rows (row shape, lanes, seed, source) starts at row 0. Another global batch does not: the position is
the number of the next row, so no row is lost or repeated.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal

from neobert.config.fields import FIELDS, list_fields, list_keys
from neobert.config.load import without_secrets
from neobert.config.schema import Config
from neobert.data.fingerprint import fits
from neobert.data.rows.loader import ORDER_KEYS
from neobert.errors import StartupError
from neobert.inference.teacher import TEACHERS
from neobert.model.config import ModelConfig
from neobert.optim.groups import list_decayed

Kind = Literal["fixed", "needs declaring", "declared", "source", "schedule", "free"]
Facts = dict[str, Any]

FINGERPRINT = "data fingerprint"
TOKENIZER = "tokenizer digest"
SPECIAL_IDS = "tokenizer special ids"
GROUPS = "optimizer groups"
BATCH = "trainer.global_batch_size"
MASK_END = "datacollator.mlm_probability_final_step"
FINAL_MASKS = "step of the final masked fraction"
"""`MASK_END`, or the end of the run where that is null."""

_FIXED = ("model.pad_token_id", TOKENIZER, SPECIAL_IDS, GROUPS)
"""Facts that are no keys and never change; all others that are no keys follow from keys."""

_ORDER_FACTS = {name: key for name, key in ORDER_KEYS.items() if name != "packing"}
"""Field of `RowOrder` -> the key that makes it; `packing` comes from two keys, which are facts themselves."""

_FULL_ROWS = "trainer.enforce_full_packed_batches"
_OF_THE_START = ("trainer.resume_from_checkpoint", "trainer.resume_allow", "trainer.overwrite_output_dir")
_FOLLOW_THE_SOURCE = ("dataset.num_lanes", "dataset.window_documents")
_SOURCE, _SPLIT, _EVALUATION = list_keys("source"), list_keys("split"), list_keys("evaluation")
_ORDER = frozenset(k for k, f in FIELDS.items() if f.known.resume == "order") - _SOURCE - _SPLIT
_NEXT_BATCH = list_keys("batch") | _ORDER | {FINAL_MASKS, FINGERPRINT}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact that is not what it was."""

    key: str
    saved: Any
    now: Any
    kind: Kind

    def as_row(self) -> tuple[str, str, str, str]:
        return self.key, self.kind, _show(self.saved), _show(self.now)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All differences between a checkpoint and this start."""

    differences: tuple[Difference, ...]
    unneeded: tuple[str, ...]
    """Keys that were declared and did not change."""

    same_next_batch: bool
    """Whether the next batch must be the one the checkpoint's run would have had."""

    @property
    def source_switched(self) -> bool:
        return any(d.kind == "source" for d in self.differences)

    @property
    def restarts_order(self) -> bool:
        """Whether the order of rows starts again."""
        return any(d.key in _ORDER or d.key == FINGERPRINT for d in self.differences)

    @property
    def refused(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.kind in ("fixed", "needs declaring"))

    def describe(self) -> dict[str, Any]:
        """What has to be equal on all ranks: which keys changed, and what follows from that."""
        changed = {f"{d.key}, compared with the checkpoint": d.kind for d in self.differences if d.kind != "free"}
        return changed | {
            "the order of rows starts again": self.restarts_order,
            "the next batch is the checkpoint's": self.same_next_batch,
        }

    def table(self) -> str:
        """All differences, one line each; an empty text without any."""
        rows = sorted((d.as_row() for d in self.differences), key=lambda row: (row[1] == "free", row[0]))
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"  {key:<{widths[0]}}  {kind:<{widths[1]}}  {old} -> {new}" for key, kind, old, new in rows)


def _show(value: Any) -> str:
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_plain(value: Any) -> Any:
    """A value as JSON has it: lists, and mappings of what is set."""
    if isinstance(value, tuple):
        return [_as_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _as_plain(item) for name, item in asdict(value).items() if item is not None}
    return value


def build_facts(
    config: Config,
    model: ModelConfig,
    order: Mapping[str, Any],
    *,
    rows_per_step: int,
    mask_end: int | None,
    fingerprint: str,
    tokenizer_digest: str,
    special_ids: Sequence[int] | None,
    groups: str | None,
    teacher_digest: str | None,
) -> Facts:
    """Everything that identifies a run, by key; secrets are left out, and what is not known is None.

    Args:
        order: fields of `RowOrder`, as it is now or as the checkpoint's data state holds them.
        mask_end: the step at which the fraction of masked tokens reaches its final value, where it changes.
    """
    public = without_secrets(config)
    facts = {key: _as_plain(field.value_in(public)) for key, field in FIELDS.items()}
    facts |= {f"model.{name}": value for name, value in asdict(model).items()}
    facts |= {key: order[name] for name, key in _ORDER_FACTS.items() if name in order}
    if not config.datacollator.pack_sequences:
        facts[_FULL_ROWS] = None  # It decides about packed rows only.
    facts[BATCH], facts[FINAL_MASKS] = rows_per_step, mask_end
    facts[FINGERPRINT], facts[TOKENIZER] = fingerprint, tokenizer_digest
    facts[SPECIAL_IDS] = None if special_ids is None else list(special_ids)
    facts[GROUPS] = groups
    facts |= {key: teacher_digest for key in TEACHERS if facts[key] is not None}  # Wherever it is.
    return facts


def compare(saved: Facts, now: Facts, allow: Sequence[str], *, same_ranks: bool) -> Comparison:
    """The differences, classified. Pure.

    Args:
        allow: `trainer.resume_allow`.
        same_ranks: whether processes and micro-batch are the checkpoint's.
    """
    changed = {key for key in now if _differs(key, saved.get(key), now[key])}
    if FINAL_MASKS not in changed:
        changed.discard(MASK_END)  # Written in another way.
    kinds = _Classifier(saved, now, frozenset(changed), frozenset(allow))
    differences = tuple(
        Difference(key=key, saved=saved.get(key), now=now[key], kind=kinds.classify(key))
        for key in now
        if key in changed and key not in _OF_THE_START
    )
    used = {d.key for d in differences if d.kind == "declared"}
    next_fit = now["datacollator.pack_sequences"] and not now[_FULL_ROWS]
    return Comparison(
        differences=differences,
        unneeded=tuple(key for key in allow if key not in used),
        same_next_batch=changed.isdisjoint(_NEXT_BATCH) and (same_ranks or not next_fit),
    )


def _differs(key: str, saved: Any, now: Any) -> bool:
    if key == FINGERPRINT:
        return not fits(saved, now)
    if saved is None and key in (SPECIAL_IDS, GROUPS):
        return False  # Not recorded by an earlier version.
    if key == _FULL_ROWS and None in (saved, now):
        return False  # One of the two does not pack; that difference is reported already.
    return (list(saved) if isinstance(saved, tuple) else saved) != (list(now) if isinstance(now, tuple) else now)


@dataclass(frozen=True, slots=True)
class _Classifier:
    """What the difference of each key is, from all of them."""

    saved: Facts
    now: Facts
    changed: frozenset[str]
    allow: frozenset[str]

    @property
    def named(self) -> frozenset[str]:
        """Keys that name other data than they did."""
        return frozenset(key for key in self.changed & _SOURCE if _name_others(key, self.saved.get(key), self.now[key]))

    @property
    def switched(self) -> bool:
        """Whether other data is read because other data was named."""
        return FINGERPRINT in self.changed and bool(self.named)

    def classify(self, key: str) -> Kind:
        if key == FINGERPRINT:
            return self._classify_data()
        if key not in FIELDS:
            return "fixed" if key in _FIXED else "free"
        if self.switched and key in (*_SOURCE, *_FOLLOW_THE_SOURCE):
            return "source"
        if self.switched and key in _EVALUATION:
            return "free"
        if key in _SOURCE:
            return self._declared(key) if FINGERPRINT in self.changed and key not in self.named else "free"
        if key in _SPLIT - _EVALUATION:
            return self._declared(key) if FINGERPRINT in self.changed and not self.switched else "free"
        if key == "tokenizer.name":
            # A tokenizer of the hub is not fetched only to compare it: another name is another tokenizer.
            named = self.now["tokenizer.path"] is None and not self.now["tokenizer.train"]
            return "fixed" if named and self.now[key] is not None else "free"
        resume = FIELDS[key].known.choose_class(self.now.__getitem__)
        return self._declared(key) if resume == "declared" or resume == "order" else resume

    def _classify_data(self) -> Kind:
        if self.switched:
            return "source"
        reasons = self.changed & (_SPLIT | (_SOURCE - self.named))
        if not reasons:
            return "fixed"
        return "declared" if reasons <= self.allow else "needs declaring"

    def _declared(self, key: str) -> Literal["declared", "needs declaring"]:
        return "declared" if key in self.allow else "needs declaring"


def _name_others(key: str, saved: Any, now: Any) -> bool:
    """Whether two values name other data, and not the same sources with other weights or columns."""
    item = FIELDS[key].item
    if item is None:
        return True
    names = [field.key for field in list_fields(item) if "source" in field.known.changes]
    before, after = ([[entry.get(name) for name in names] for entry in entries] for entries in (saved or [], now))
    return before != after


def check_comparison(comparison: Comparison, where: str, *, advice_on_batch: str) -> None:
    """Raises when something differs that must not.

    Raises:
        StartupError: with all differences and what to write.
    """
    refused = comparison.refused
    if not refused:
        return
    lines = [f"{where} does not fit this start (checkpoint -> now):", comparison.table()]
    if any(d.key == FINGERPRINT and d.kind == "fixed" for d in refused):
        lines.append(
            "the data under this run changed: the same settings find other documents; restore the files, or name the "
            "new source with dataset.path or dataset.name to continue with it from its first row"
        )
    if any(d.kind == "fixed" and d.key != FINGERPRINT for d in refused):
        lines.append("fixed: write the checkpoint's values into the config, or start a new trainer.output_dir")
    keys = [d.key for d in refused if d.kind == "needs declaring" and d.key != FINGERPRINT]
    if keys:
        lines.append(
            "needs declaring: write the checkpoint's values again, or accept the change with "
            f"trainer.resume_allow=[{','.join(keys)}]"
        )
    if BATCH in keys:
        lines.append(advice_on_batch)
    raise StartupError("\n".join(lines))


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """Which weights decay and which do not, as a short digest with the number of tensors of each."""
    names = [part for part in list_decayed(groups) if part]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    return f"{'+'.join(str(len(group)) for group in names)} tensors, {digest}"


def check_next_batch(saved: str | None, found: int) -> None:
    """Raises when the first batch after a resume is not the one that the checkpoint promised.

    Args:
        saved: 16 hex digits of the digest over all ranks, None where it is not known.
        found: the sum of the ranks' digests.

    Raises:
        StartupError: they differ.
    """
    if saved is not None and int(saved, 16) != found % 2**64:
        raise StartupError(
            "the data under this run changed: the first batch after the resume has digest "
            f"{found % 2**64:016x}, the checkpoint says {saved}; restore the files, or name the new source with "
            "dataset.path or dataset.name to continue with it from its first row"
        )


def as_int64(digest: int) -> int:
    """The 64 bits of a digest as a signed number: int64 sums over ranks wrap around like the digest itself does."""
    return digest - 2**64 if digest >= 2**63 else digest
