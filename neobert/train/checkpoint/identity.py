"""What a resume may change: the checkpoint's facts and this start's facts -> differences, each of one class.

| class | meaning |
|---|---|
| fixed | never changes: architecture, tokenizer, optimizer, the data under the same setting |
| needs declaring | changes what is learned; taken when `trainer.resume_allow` names it |
| declared | was named |
| source | another source was named: the order of rows begins at its first row |
| free | everything else |

Another order of rows (row shape, lanes, seed, source) begins at row 0. Another global batch does not: the position is
the number of the next row, so no row is lost or repeated.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal

from neobert.config.fields import FIELDS
from neobert.config.load import without_secrets
from neobert.config.resume_rules import (
    BATCH_WARMUP,
    DECLARED,
    EVAL_BATCH,
    EVALUATION,
    FIXED,
    HELD_OUT,
    MASKING,
    ORDER,
    SOURCE,
)
from neobert.config.schema import Config
from neobert.data.fingerprint import fits
from neobert.data.rows.loader import ORDER_KEYS
from neobert.errors import StartupError
from neobert.model.config import ModelConfig
from neobert.optim.groups import list_decayed

Kind = Literal["fixed", "needs declaring", "declared", "source", "free"]
Facts = dict[str, Any]

FINGERPRINT = "data fingerprint"
TOKENIZER = "tokenizer digest"
SPECIAL_IDS = "tokenizer special ids"
GROUPS = "optimizer groups"
BATCH = "trainer.global_batch_size"

_FIXED = frozenset((*FIXED, "model.pad_token_id", TOKENIZER, SPECIAL_IDS, GROUPS))
_ORDER_FACTS = {name: key for name, key in ORDER_KEYS.items() if name != "packing"}
"""Field of `RowOrder` -> the key that makes it; `packing` comes from two keys, which are facts themselves."""

_FULL_ROWS = "trainer.enforce_full_packed_batches"
_OF_THE_START = ("trainer.resume_from_checkpoint", "trainer.resume_allow", "trainer.overwrite_output_dir")
_FOLLOW_THE_SOURCE = ("dataset.num_lanes", "dataset.window_documents")
MASK_END = "datacollator.mlm_probability_final_step"
_IN_THE_ROWS = (
    *MASKING,
    MASK_END,
    "dataset.alpha",
    "contrastive.num_hard_negatives",
    "contrastive.pretraining_prob",
    "contrastive.pretraining_objective",
    "contrastive.loss_type",
    "contrastive.anchor_prefix",
    "contrastive.positive_prefix",
)
"""Change what is in the next rows, and not which rows they are."""


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
        """Whether the order of rows begins anew."""
        return any(d.key in ORDER or d.key == FINGERPRINT for d in self.differences)

    @property
    def refused(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.kind in ("fixed", "needs declaring"))

    def describe(self) -> dict[str, Any]:
        """What has to be equal on all ranks: which keys changed, and what follows from that."""
        changed = {f"{d.key}, compared with the checkpoint": d.kind for d in self.differences if d.kind != "free"}
        return changed | {
            "the order of rows begins anew": self.restarts_order,
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
) -> Facts:
    """Everything that identifies a run, by key; secrets are left out, and what is not known is None.

    Args:
        order: fields of `RowOrder`, as it is now or as the checkpoint's data state holds them.
        mask_end: the step at which the share of masked tokens reaches its final value, where it changes.
    """
    public = without_secrets(config)
    facts = {key: _as_plain(field.value_in(public)) for key, field in FIELDS.items()}
    facts |= {f"model.{name}": value for name, value in asdict(model).items()}
    facts |= {key: order[name] for name, key in _ORDER_FACTS.items() if name in order}
    if not config.datacollator.pack_sequences:
        facts[_FULL_ROWS] = None  # It decides about packed rows only.
    facts[BATCH], facts[MASK_END] = rows_per_step, mask_end
    facts[FINGERPRINT], facts[TOKENIZER] = fingerprint, tokenizer_digest
    facts[SPECIAL_IDS] = None if special_ids is None else list(special_ids)
    facts[GROUPS] = groups
    return facts


def compare(saved: Facts, now: Facts, allow: Sequence[str], *, same_ranks: bool) -> Comparison:
    """The differences, classified. Pure.

    Args:
        allow: `trainer.resume_allow`.
        same_ranks: whether processes and micro-batch are the checkpoint's.
    """
    changed = {key for key in now if _differs(key, saved.get(key), now[key])}
    differences = tuple(
        Difference(key=key, saved=saved.get(key), now=now[key], kind=_classify(key, changed, now, allow))
        for key in now
        if key in changed and key not in _OF_THE_START
    )
    used = {d.key for d in differences if d.kind == "declared"}
    next_fit = now["datacollator.pack_sequences"] and not now[_FULL_ROWS]
    moved = changed & {*ORDER, *_IN_THE_ROWS, *BATCH_WARMUP, BATCH, FINGERPRINT}
    return Comparison(
        differences=differences,
        unneeded=tuple(key for key in allow if key not in used),
        same_next_batch=not moved and (same_ranks or not next_fit),
    )


def _differs(key: str, saved: Any, now: Any) -> bool:
    if key == FINGERPRINT:
        return not fits(saved, now)
    if saved is None and key in (SPECIAL_IDS, GROUPS):
        return False  # Not recorded by an earlier version.
    if key == _FULL_ROWS and None in (saved, now):
        return False  # One of the two does not pack; that difference is told already.
    return (list(saved) if isinstance(saved, tuple) else saved) != (list(now) if isinstance(now, tuple) else now)


def _classify(key: str, changed: set[str], now: Facts, allow: Sequence[str]) -> Kind:
    declared: Kind = "declared" if key in allow else "needs declaring"
    switched = FINGERPRINT in changed and not changed.isdisjoint(SOURCE)
    if key in _FIXED or (key == "model.max_position_embeddings" and not now["model.rope"]):
        return "fixed"  # Learned positions are weights of that number of rows.
    if key == "tokenizer.name":
        # A tokenizer of the hub is not fetched only to compare it: another name is another tokenizer.
        named = now["tokenizer.path"] is None and not now["tokenizer.train"] and now[key] is not None
        return "fixed" if named else "free"
    if key == FINGERPRINT:
        if switched:
            return "source"
        held_out = changed & set(HELD_OUT)
        if not held_out:
            return "fixed"
        return "declared" if held_out <= set(allow) else "needs declaring"
    if switched and key in (*SOURCE, *_FOLLOW_THE_SOURCE):
        return "source"
    if key in EVALUATION and not switched:
        return declared
    if key == EVAL_BATCH and now["trainer.eval_max_batches"] is not None:
        return declared
    if key in HELD_OUT:
        return declared if FINGERPRINT in changed and not switched else "free"
    return declared if key in DECLARED else "free"


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
            "new source with dataset.path or dataset.name to go on with it from its first row"
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
            "dataset.path or dataset.name to go on with it from its first row"
        )


def as_int64(digest: int) -> int:
    """The 64 bits of a digest as a signed number: int64 sums over ranks wrap around like the digest itself does."""
    return digest - 2**64 if digest >= 2**63 else digest
