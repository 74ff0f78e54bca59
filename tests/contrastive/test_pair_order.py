"""The order of pairs and the batches made of them: literal plans, fractions, exact continuation, layout."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from neobert.config.schema import Config
from neobert.contrastive.batches import PairCollator
from neobert.contrastive.examples import Example
from neobert.contrastive.pair_data import ContrastiveData, build_contrastive_data
from neobert.contrastive.pair_order import PairLane, PairOrder, TrainSet, step_fractions
from neobert.contrastive.set_folder import PairStore, write_set
from neobert.data.pipeline import Reader
from neobert.data.rows.lanes import State, Window
from neobert.data.rows.side_by_side import digest_rows
from neobert.data.tokenizer import load_tokenizer
from neobert.objectives.pair_batch import PairBatch
from neobert.types import PackedRow

Contrastive = Callable[..., Config]


def encode(texts: list[str]) -> list[NDArray[np.int32]]:
    return [np.array([ord(letter) for letter in text], dtype=np.int32) for text in texts]


@pytest.fixture
def sets(tmp_path: Path) -> list[TrainSet]:
    """Three sets of 10, 40 and 20 pairs; the last one has 4 negatives an anchor, of which 2 are used."""
    found = []
    for name, count in (("A", 10), ("B", 40), ("C", 20)):
        negatives = tuple("wxyz") if name == "C" else ()
        examples = [Example(anchor=f"{name}{n}", positive=f"p{n}", negatives=negatives) for n in range(count)]
        write_set(tmp_path / name, name, "pairs", examples, {})
        store = PairStore(tmp_path / name)
        found.append(
            TrainSet(
                key=name,
                store=store,
                kind="infonce",
                first=0,
                anchor_prefix="q:",
                positive_prefix="d:",
                num_negatives=2 if negatives else 0,
            )
        )
    return found


def order(**changes: float) -> PairOrder:
    values = {"seed": 3, "rows_per_step": 4, "alpha": 1.0, "max_seq_length": 12} | changes
    return PairOrder(**values)  # type: ignore[arg-type]


def texts_of(window: Window, row: int) -> list[str]:
    return ["".join(map(chr, window.get(piece))) for piece in window.rows[row]]


def test_windows_are_pinned(sets: list[TrainSet]) -> None:
    """Another order would continue no checkpoint: then the version of the data state must be raised."""
    lane = PairLane(sets, order(), encode)
    state, found = lane.start(), []
    for _ in range(4):
        window = lane.open(state)
        found.append([texts_of(window, row)[0] for row in range(4)])
        state = window.next_state
    assert found == [
        ["q:B12", "q:B32", "q:B2", "q:B5"],
        ["q:B4", "q:B24", "q:B14", "q:B23"],
        ["q:C17", "q:C4", "q:C13", "q:C6"],
        ["q:B3", "q:B16", "q:B18", "q:B22"],
    ]
    assert state == {"row": 0, "window": 4, "first_row": 16, "size": 4, "used": [0, 12, 4]}


def test_a_step_takes_one_set_and_an_epoch_takes_every_pair_once(sets: list[TrainSet]) -> None:
    lane = PairLane(sets, order(), encode)
    state, seen, orders = lane.start(), Counter[tuple[str, int]](), defaultdict[tuple[int, int], list[str]](list)
    for _ in range(200):
        window = lane.open(state)
        (source,) = set(window.sources.tolist())
        before = state["used"][source]
        for row in range(4):
            text = texts_of(window, row)[0].removeprefix("q:")
            assert text[0] == "ABC"[source]
            epoch = (before + row) // len(sets[source])
            seen[text, epoch] += 1
            orders[source, epoch].append(text)
        state = window.next_state
    for source, name in enumerate("ABC"):
        for epoch in range(state["used"][source] // len(sets[source])):
            assert all(seen[f"{name}{n}", epoch] == 1 for n in range(len(sets[source])))
            assert epoch == 0 or orders[source, epoch] != orders[source, epoch - 1], "every epoch has its own order"


def test_sets_are_drawn_in_proportion_to_a_power_of_their_size(sets: list[TrainSet]) -> None:
    for alpha, expected in ((1.0, [1 / 7, 4 / 7, 2 / 7]), (0.0, [1 / 3] * 3)):
        chosen = order(alpha=alpha)
        lane = PairLane(sets, chosen, encode)
        counts = Counter(lane.choose_set(window) for window in range(6000))
        assert [counts[s] / 6000 for s in range(3)] == pytest.approx(expected, abs=0.02)
        assert step_fractions(sets, chosen) == pytest.approx(expected)
    mixed = order(pretraining_prob=0.25)
    counts = Counter(PairLane(sets, mixed, encode).choose_set(window) for window in range(6000))
    expected = [0.75 / 5, 0.75 * 4 / 5, 0.25]
    assert [counts[s] / 6000 for s in range(3)] == pytest.approx(expected, abs=0.02)
    assert step_fractions(sets, mixed) == pytest.approx(expected)


def test_rows_hold_prefixes_and_drawn_negatives_and_are_cut(sets: list[TrainSet]) -> None:
    lane = PairLane(sets, order(max_seq_length=6), encode)
    state: State = lane.start()
    while lane.choose_set(state["window"]) != 2:
        state = lane.open(state).next_state
    window = lane.open(state)
    drawn = set()
    for row in range(4):
        anchor, positive, *negatives = texts_of(window, row)
        assert (anchor[:3], positive[:3]) == ("q:C", "d:p")
        assert max(map(len, (anchor, positive))) <= 4
        assert len(set(negatives)) == 2
        assert set(negatives) < {"d:w", "d:x", "d:y", "d:z"}
        drawn.add(tuple(negatives))
    assert len(drawn) > 1, "drawn for each pair"
    assert [texts_of(lane.open(state), row) for row in range(4)] == [texts_of(window, row) for row in range(4)], "pure"


def test_processes_read_their_own_rows_only(sets: list[TrainSet]) -> None:
    whole = PairLane(sets, order(), encode)
    parts_of = [PairLane(sets, order(rank=rank, world=2), encode) for rank in range(2)]
    state = whole.open(whole.start()).next_state | {"first_row": 5}  # As after a change of the global batch.
    window, parts = whole.open(state), [lane.open(state) for lane in parts_of]
    for row in range(4):
        rank = (5 + row) % 2
        assert texts_of(parts[rank], row) == texts_of(window, row)
        assert parts[1 - rank].rows[row] == []
    assert parts[0].next_state == parts[1].next_state == window.next_state


def test_a_changed_global_batch_continues_with_the_next_pair(sets: list[TrainSet]) -> None:
    before = PairLane(sets[:1], order(), encode)
    state = before.open(before.start()).next_state
    after = PairLane(sets[:1], order(rows_per_step=2), encode)
    used = after.open(state)  # The window that was used up has its old size.
    assert len(used.rows) == 4
    fresh = after.open(used.next_state)
    assert len(fresh.rows) == 2
    assert fresh.next_state["used"] == [10]


# ---- batches ----


def build(contrastive: Contrastive, tokenizer_folder: Path, folder: Path, *overrides: str) -> ContrastiveData:
    config = contrastive(folder, "dataset.num_workers=0", *overrides)
    tokenizer = load_tokenizer(config.tokenizer)
    return build_contrastive_data(config, tokenizer, Reader(rows_per_step=8, prepared_dir=folder))


def first_batch(data: ContrastiveData) -> PairBatch:
    loader = data.loader()
    try:
        batch = next(loader).micro_batches[0]
    finally:
        loader.close()
    assert isinstance(batch, PairBatch)
    return batch


def test_the_layout_of_a_batch(sets: list[TrainSet]) -> None:
    def row(key: int, *texts: list[int]) -> PackedRow:
        return PackedRow(
            tokens=np.array([t for text in texts for t in (1, *text, 2)], dtype=np.int32),
            lengths=tuple(len(text) + 2 for text in texts),
            documents=(key,) * len(texts),
            offsets=(0,) * len(texts),
            sources=(2,) * len(texts),
            key=key,
        )

    rows = [row(0, [7], [8, 9], [6]), row(1, [7], [5]), row(2, [9, 9], [7], [6], [4])]
    collate = PairCollator(
        sets=sets,
        chunk_rows=2,
        max_seq_length=12,
        pad_id=0,
        seed=0,
        masks=None,  # type: ignore[arg-type]
    )
    batch = collate(rows)
    assert [chunk.num_tokens for chunk in batch.chunks] == [16, 13]
    assert batch.chunks[0].input_ids.tolist() == [[1, 7, 2, 1, 8, 9, 2, 1, 6, 2, 1, 7, 2, 1, 5, 2, *[0] * 48]]
    assert batch.chunks[0].segments.ids[0, :17].tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 0]
    assert batch.chunks[0].segments.cu_seqlens.tolist() == [0, 3, 7, 10, 13, 16, 64]
    assert [lengths.tolist() for lengths in batch.lengths] == [[3, 4, 3, 3, 3], [4, 3, 3, 3]]
    assert (batch.anchors.tolist(), batch.positives.tolist()) == ([0, 3, 5], [1, 4, 6])
    assert batch.negatives.tolist() == [[2, 0], [0, 0], [7, 8]]
    assert batch.has_negative.tolist() == [[True, False], [False, False], [True, True]]
    ids = batch.text_ids.tolist()
    assert ids[0] == ids[3] == ids[6], "the text 7"
    assert ids[2] == ids[7], "the text 6"
    assert len(set(ids)) == 6
    assert (batch.num_targets, batch.num_tokens, batch.num_documents, batch.num_slots) == (3, 29, 9, 128)
    assert batch.row_keys.tolist() == [0, 1, 2]


@pytest.mark.parametrize("objective", ["simcse", "mlm"])
def test_the_digest_does_not_depend_on_chunks(
    contrastive: Contrastive, tokenizer_folder: Path, tmp_path: Path, pair_files: Path, objective: str
) -> None:
    mixed = [f"contrastive.pretraining_dataset={pair_files}/texts.jsonl", "contrastive.pretraining_prob=0.99"]
    mixed += [f"contrastive.pretraining_objective={objective}", "model.dropout_prob=0.1"]
    batches = [
        first_batch(
            build(contrastive, tokenizer_folder, tmp_path, *mixed, f"trainer.per_device_train_batch_size={size}")
        )
        for size in (8, 3)
    ]
    assert [len(batch.chunks) for batch in batches] == [1, 3]
    assert batches[0].kind == objective
    assert batches[0].digest == batches[1].digest
    assert batches[0].num_targets == batches[1].num_targets
    other = first_batch(build(contrastive, tokenizer_folder, tmp_path, *mixed, "seed=4"))
    assert other.digest != batches[0].digest


def test_masks_are_drawn_again_in_every_step(
    contrastive: Contrastive, tokenizer_folder: Path, tmp_path: Path, pair_files: Path
) -> None:
    mixed = [f"contrastive.pretraining_dataset={pair_files}/texts.jsonl", "contrastive.pretraining_prob=0.99"]
    data = build(
        contrastive,
        tokenizer_folder,
        tmp_path,
        *mixed,
        "contrastive.pretraining_objective=mlm",
        "datacollator.mlm_probability=0.3",
    )
    loader, positions = data.loader(), {}
    try:
        for _ in range(17):  # 60 texts: some come twice.
            batch = next(loader).micro_batches[0]
            assert isinstance(batch, PairBatch)
            if batch.kind != "mlm":
                continue
            chunk = batch.chunks[0]
            ends = np.cumsum(batch.lengths[0].numpy())
            slots = chunk.masked_index[: chunk.num_targets].numpy()
            for start, end in zip(ends - batch.lengths[0].numpy(), ends):
                text = chunk.input_ids[0, start:end].clone()
                inside = (slots >= start) & (slots < end)
                text[slots[inside] - start] = chunk.targets[: chunk.num_targets][inside].int()
                positions.setdefault(tuple(text.tolist()), set()).add(tuple((slots[inside] - start).tolist()))
    finally:
        loader.close()
    assert max(map(len, positions.values())) > 1


def test_digests_tell_rows_apart() -> None:
    def row(key: int, tokens: list[int], lengths: tuple[int, ...]) -> PackedRow:
        n = len(lengths)
        return PackedRow(
            tokens=np.array(tokens, dtype=np.int32),
            lengths=lengths,
            documents=(0,) * n,
            offsets=(0,) * n,
            sources=(0,) * n,
            key=key,
        )

    base = digest_rows([row(0, [1, 5, 2, 1, 6, 2], (3, 3))])
    assert base != digest_rows([row(1, [1, 5, 2, 1, 6, 2], (3, 3))])
    assert base != digest_rows([row(0, [1, 6, 2, 1, 5, 2], (3, 3))])
    assert base != digest_rows([row(0, [1, 5, 2, 1, 6, 2], (2, 4))])
    both = [row(0, [1, 5, 2], (3,)), row(1, [1, 6, 2], (3,))]
    assert digest_rows(both) == sum(digest_rows([r]) for r in both) % 2**64
