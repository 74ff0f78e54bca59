"""Rows of every step while the batch grows: a table, and sums against a plain loop."""

from itertools import pairwise

import pytest

from neobert.data.rows.batch_size import BatchSchedule, constant_batch
from neobert.data.rows.loader import merge_states
from neobert.errors import DataError


def test_table() -> None:
    batch = BatchSchedule(rows=16, start_rows=4, warmup_steps=6)
    assert [batch(step) for step in range(9)] == [4, 4, 8, 8, 12, 12, 16, 16, 16]
    assert [batch.rows_before(step) for step in range(9)] == [0, 4, 8, 16, 24, 36, 48, 64, 80]
    assert [batch.steps_for(rows) for rows in (0, 1, 4, 5, 8, 9, 48, 49, 64, 65)] == [0, 1, 1, 2, 2, 3, 6, 7, 7, 8]
    assert [batch.steps_for(slots, per_row=10) for slots in (40, 41, 480, 480.5, 640, 640.1)] == [1, 2, 6, 7, 7, 8]
    uneven = BatchSchedule(rows=64, start_rows=40, warmup_steps=4)
    assert [uneven(step) for step in range(6)] == [40, 40, 48, 56, 64, 64]
    assert [constant_batch(6)(step) for step in (0, 1, 1000)] == [6, 6, 6]
    assert (constant_batch(6).rows_before(7), constant_batch(6).steps_for(43)) == (42, 8)


@pytest.mark.parametrize(
    ("rows", "start", "steps"),
    [(16, 4, 6), (64, 40, 4), (64, 2, 3), (100, 10, 1), (48, 36, 100), (7, 7, 5), (9, 1, 1000)],
)
def test_sums_are_those_of_a_plain_loop(rows: int, start: int, steps: int) -> None:
    batch = BatchSchedule(rows=rows, start_rows=start, warmup_steps=steps)
    sizes = [batch(step) for step in range(steps + 20)]
    assert sizes[0] == start if steps > 1 or start == rows else True
    assert sizes == sorted(sizes)
    assert set(sizes[steps:]) == {rows}
    assert all(size % batch.unit == 0 for size in sizes)
    assert [batch.rows_before(step) for step in range(len(sizes))] == [sum(sizes[:step]) for step in range(len(sizes))]
    for wanted in (0, 1, start, start + 1, sum(sizes[:steps]), sum(sizes[:steps]) + 1, sum(sizes) - 5):
        assert batch.steps_for(wanted) == next(s for s in range(len(sizes) + 1) if sum(sizes[:s]) >= wanted)


def growing(make_data, make_config, corpora, micro=2, **position):
    config = make_config(path=str(corpora["indexed"]), per_device_train_batch_size=micro)
    data = make_data(config, **position)
    batch = BatchSchedule(rows=12, start_rows=4, warmup_steps=3)
    object.__setattr__(data.loader_settings, "batch", batch)
    return data


def read(loader, steps):
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return found


def rows_of(step):
    return [row for micro in step.micro_batches for row in micro.row_keys.tolist()]


def test_steps_take_the_next_rows_and_go_on_where_they_were(make_data, make_config, corpora) -> None:
    data = growing(make_data, make_config, corpora)
    whole = read(data.loader(), 6)
    starts = [0, 4, 8, 16, 28, 40, 52]
    assert [rows_of(step) for step in whole] == [list(range(a, b)) for a, b in pairwise(starts)]
    assert [len(step.micro_batches) for step in whole] == [2, 2, 4, 6, 6, 6]
    for cut in range(1, 6):
        rest = read(data.loader(whole[cut - 1].state, step=cut), 6 - cut)
        assert [step.digest for step in rest] == [step.digest for step in whole[cut:]]


def test_rows_that_are_skipped_leave_the_sizes_alone(make_data, make_config, corpora) -> None:
    data = growing(make_data, make_config, corpora)
    steps = read(data.loader(skip=[(4, 16)]), 4)
    assert [rows_of(step) for step in steps] == [
        [0, 1, 2, 3],
        [16, 17, 18, 19],
        list(range(20, 28)),
        list(range(28, 40)),
    ]
    for cut in (1, 2, 3):
        rest = read(data.loader(steps[cut - 1].state, skip=[(4, 16)], step=cut), 4 - cut)
        assert [step.digest for step in rest] == [step.digest for step in steps[cut:]]


def test_two_ranks_split_every_step(make_data, make_config, corpora) -> None:
    whole = read(growing(make_data, make_config, corpora).loader(), 5)
    ranks = [read(growing(make_data, make_config, corpora, rank=rank, world=2).loader(), 5) for rank in range(2)]
    for number, step in enumerate(whole):
        parts = [steps[number] for steps in ranks]
        assert sorted(rows_of(parts[0]) + rows_of(parts[1])) == rows_of(step)
        assert sum(part.digest for part in parts) % 2**64 == step.digest
        assert merge_states([part.state for part in parts])["next_row"] == step.state["next_row"]


def test_a_first_batch_that_cannot_be_shared(make_data, make_config, corpora) -> None:
    data = growing(make_data, make_config, corpora, micro=3)
    with pytest.raises(DataError, match=r"batch_size_warmup_start: 4: a step of 4 rows .* must be a multiple of 3"):
        data.loader()
