"""One row of a run, found again by its number: its documents, where they begin, and its mask.

Row g comes from lane g modulo V. From the saved data state nearest before g, only that lane is walked: a reader that
claims to be rank (g modulo V) of V processes reads the rows of that lane and no others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neobert.data.fingerprint import fits
from neobert.data.pipeline import DataPipeline, Reader, build_tokenizer
from neobert.data.rows.batch_size import constant_batch
from neobert.data.rows.collate import Collator
from neobert.data.rows.loader import Loader
from neobert.data.source.text import STREAM_LANES
from neobert.data.tokenizer import Tokenizer
from neobert.errors import StartupError
from neobert.objectives.base import Objective
from neobert.objectives.table import choose_objective
from neobert.train.build import build_config_data
from neobert.train.start import read_checkpoint_config, read_train_state
from neobert.types import IGNORE_INDEX, PackedBatch, PackedRow
from neobert.weights.folder import CheckpointError, choose_checkpoint, valid_steps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplayedRow:
    """A row and the batch of it alone."""

    row: PackedRow
    batch: PackedBatch
    tokenizer: Tokenizer
    objective: Objective
    step: int
    """The step (from 1) that trains on it, at the checkpoint's batch sizes; its mask is that of this step."""

    def describe(self) -> str:
        """The row as text: documents, borders, texts, and every predicted token."""
        row, batch, tokenizer = self.row, self.batch, self.tokenizer
        lines = [f"row {row.key} (step {self.step}): {sum(row.lengths)} tokens of {len(row.lengths)} documents"]
        end = 0
        for number, length in enumerate(row.lengths):
            start, end = end, end + length
            lines.append(
                f"  document {row.documents[number]}, source {row.sources[number]}, from token {row.offsets[number]}: "
                f"slots {start} to {end - 1}"
            )
            lines.append(f"    {tokenizer.decode(row.tokens[start:end])!r}")
        inputs = batch.input_ids.flatten().tolist()
        pairs = zip(batch.masked_index.tolist(), batch.targets.tolist())
        shown = [(slot, target) for slot, target in pairs if target != IGNORE_INDEX]
        if batch.segments.causal:
            return "\n".join([*lines, f"  {batch.num_targets} tokens are predicted, each by the slot before it"])
        if self.objective.predicts_tokens:
            lines.append(f"  mask: {batch.num_targets} tokens are predicted")
        else:
            shown = [(slot, target) for slot, target in shown if target != inputs[slot]]
            lines.append(f"  {len(shown)} of {batch.num_targets} tokens are replaced")
        lines += [
            f"    slot {slot}: {tokenizer.decode_token(target)!r} shown as {tokenizer.decode_token(inputs[slot])!r}"
            for slot, target in shown
        ]
        return "\n".join(lines)


class _Spy:
    """A collator that masks as one step does and keeps the rows of its last two calls, since a loader may be one batch
    ahead."""

    def __init__(self, collate: Collator, step: int) -> None:
        self._collate, self._step = collate, step
        self.rows: dict[int, PackedRow] = {}

    def __call__(self, rows: Sequence[PackedRow], *, step: int) -> PackedBatch:
        self.rows = dict(list(self.rows.items())[-1:]) | {row.key: row for row in rows}
        return self._collate(rows, step=self._step)


def replay_row(path: Path, row: int) -> ReplayedRow:
    """Row `row` of a run, by the settings of its newest valid checkpoint (or of the checkpoint that `path` is).

    Raises:
        StartupError: there is no such row, or the run's rows cannot be planned again: its data changed, or rows have
            no numbers.
        CheckpointError: there is no valid checkpoint.
    """
    if row < 0:
        raise StartupError(f"--row: {row}; rows are counted from 0")
    checkpoint = choose_checkpoint(path).path
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint: give a run folder, or one of its checkpoints")
    saved = read_train_state(checkpoint)
    data, tokenizer = _build_pipeline(checkpoint, saved)
    # From the row that the checkpoint's last step ended with, back through the rows of all steps.
    numbered = data.batch.rows_before(saved["step"]) - (saved["data"]["next_row"] - row)
    step = data.batch.steps_for(numbered + 1)
    spy, lanes = _Spy(data.collate, max(0, step - 1)), data.order.num_lanes
    settings = replace(
        data.loader_settings,
        batch=constant_batch(lanes),
        micro_batch_rows=1,
        rank=row % lanes,
        world=lanes,
        num_workers=0,
        pin_memory=False,
    )
    loader = Loader(
        data.train.lane_opener(),
        order=data.order,
        settings=settings,
        collate=spy,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        state=_nearest_state(checkpoint, saved, row, data.fingerprint),
    )
    try:
        batches = (step.micro_batches[0] for step in loader)
        batch = next(batch for batch in batches if int(batch.row_keys[0]) == row)
    finally:
        loader.close()
    assert isinstance(batch, PackedBatch), "made by the collator of pretraining"
    objective = choose_objective(read_checkpoint_config(checkpoint))
    return ReplayedRow(row=spy.rows[row], batch=batch, tokenizer=tokenizer, objective=objective, step=step)


def _build_pipeline(checkpoint: Path, saved: dict[str, Any]) -> tuple[DataPipeline, Tokenizer]:
    config = read_checkpoint_config(checkpoint)
    objective = choose_objective(config)
    if objective.reads != "documents":
        raise StartupError(
            f"{checkpoint}: {objective.title} reads {objective.reads}; only rows of documents can be shown"
        )
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else Path(config.trainer.output_dir)
    tokenizer = build_tokenizer(config, checkpoint, run)
    reader = Reader(
        rows_per_step=saved["rows_per_step"],
        prepared_dir=run / "tokenized",
        stream_lanes=saved.get("stream_lanes", STREAM_LANES),
    )
    data = build_config_data(config, tokenizer, reader)
    if not fits(saved["data_fingerprint"], data.fingerprint):
        raise StartupError(
            f"the data under this run changed: {checkpoint} was trained on a source with fingerprint "
            f"{saved['data_fingerprint']}, the same settings now find {data.fingerprint}; restore the files"
        )
    if data.order.packing == "next_fit":
        raise StartupError(
            "trainer.enforce_full_packed_batches: false packs each micro-batch by itself, so a row has no number of "
            "its own; only runs with full rows, or without packing, can be replayed"
        )
    return data, tokenizer


def _nearest_state(checkpoint: Path, saved: dict[str, Any], row: int, fingerprint: str) -> dict[str, Any] | None:
    """The data state at or before `row` among the checkpoints beside this one; None is the start of the order."""
    candidates = [saved, *_states_beside(checkpoint)]
    names = [name for name in saved["data"] if name not in ("next_row", "lanes", "next_batch_digest")]
    same_order = [
        state["data"]
        for state in candidates
        if state["data"]
        and fits(state["data_fingerprint"], fingerprint)
        and all(state["data"].get(name) == saved["data"][name] for name in names)
        and state["data"]["next_row"] <= row
    ]
    return max(same_order, key=lambda state: state["next_row"], default=None)


def _states_beside(checkpoint: Path) -> Iterator[dict[str, Any]]:
    run = checkpoint.parent.parent
    for step in valid_steps(run):
        yield read_train_state(run / "checkpoints" / str(step))
