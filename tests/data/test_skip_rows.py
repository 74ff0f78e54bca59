"""Rows that a run skips: planned like all rows, so the others stay what they are, and never returned."""

import json
import threading
import time

import pytest

from neobert.data.rows.loader import _merge, merge_states
from neobert.errors import DataError

B = 24
"""Rows of a step."""

SKIP = [(2 * B, 4 * B), (5 * B, 6 * B)]


def read(make_data, config, *, skip=(), steps=1, state=None, world=1):
    """Digest of each micro-batch of one row by its row number, the row numbers of each step, and the last state."""
    loaders = [make_data(config, rank=rank, world=world).loader(state, skip=skip) for rank in range(world)]
    digests, per_step = {}, []
    for _ in range(steps):
        given = [next(loader) for loader in loaders]
        found = {int(m.row_keys[0]): m.digest for step in given for m in step.micro_batches}
        per_step.append(sorted(found))
        digests |= found
        state = json.loads(json.dumps(merge_states([step.state for step in given])))
    for loader in loaders:
        loader.close()
    return digests, per_step, state


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["indexed", "jsonl"])
def test_all_other_rows_are_returned_unchanged_also_across_restarts_and_ranks(
    kind, num_workers, corpora, make_config, make_data
):
    config = make_config(path=str(corpora[kind]), per_device_train_batch_size=1, num_workers=num_workers)
    every, _, _ = read(make_data, config, steps=9)
    whole, per_step, last = read(make_data, config, skip=SKIP, steps=6)
    starts = [0, B, 4 * B, 6 * B, 7 * B, 8 * B]
    assert per_step == [list(range(start, start + B)) for start in starts]
    assert whole == {row: every[row] for rows in per_step for row in rows}
    assert last["next_row"] == 9 * B
    for world, cut in ((1, 2), (2, 1), (2, 3)):
        _, _, state = read(make_data, config, skip=SKIP, steps=cut)
        rest, continued, end = read(make_data, config, skip=SKIP, steps=6 - cut, state=state, world=world)
        assert continued == per_step[cut:]
        assert rest == {row: whole[row] for rows in continued for row in rows}
        assert end == last


def test_ranges_that_ranks_cannot_split_are_refused(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["indexed"]), per_device_train_batch_size=2), world=2)
    data.loader(skip=[(0, 8)]).close()
    with pytest.raises(DataError, match=r"\[\(24, 30\)\].* multiple of 4"):
        data.loader(skip=[(0, 8), (24, 30)])


def test_waiting_ends_when_a_stop_is_requested(corpora, make_config, make_data):
    loader = make_data(make_config(path=str(corpora["indexed"]), num_workers=1)).loader()
    step, go_on = loader._assembler.step, threading.Event()
    assert loader.next_unless(lambda: False) is not None
    assert loader.next_unless(lambda: True) is None, "also when a batch is ready"
    loader._assembler.step = lambda: (go_on.wait(30), step())[1]
    start = time.monotonic()
    while loader.next_unless(lambda: time.monotonic() - start > 0.3) is not None:
        pass
    assert time.monotonic() - start < 5
    go_on.set()
    assert loader.next_unless(lambda: False) is not None, "nothing was lost"
    loader.close()


def test_ranges_of_a_checkpoint_and_of_a_rollback_are_joined() -> None:
    """Those of the checkpoint are lists of JSON."""
    assert _merge([[16, 32], (40, 48), (30, 36)]) == [(16, 36), (40, 48)]  # type: ignore[list-item]
