import json
import threading
import traceback
from dataclasses import replace

import pytest
from reading import PACKINGS, read_world

from neobert.data.rows.loader import merge_states
from neobert.errors import DataError


def test_state_is_small_and_constant(corpora, make_config, make_data):
    found = read_world(make_data, make_config(path=str(corpora["indexed"])), 1, 0, None, num_steps=30)
    sizes = [len(json.dumps(state)) for _, _, state in found]
    assert max(sizes) < 1000
    assert max(sizes) - min(sizes) < 100


def test_every_micro_batch_is_full_and_equally_shaped(corpora, make_config, make_data):
    loader = make_data(make_config(path=str(corpora["jsonl"]), per_device_train_batch_size=4)).loader()
    shapes = {
        (tuple(b.input_ids.shape), tuple(b.targets.shape), tuple(b.segments.cu_seqlens.shape))
        for _ in range(10)
        for b in next(loader).micro_batches
    }
    assert shapes == {((4, 32), (4 * 9,), (4 * 5 + 1,))}


def test_batches_that_need_not_be_full_pack_their_own_documents(corpora, make_config, make_data):
    """Six documents a micro-batch, next-fit in the order of the rows: the same documents as without packing."""
    values = {"path": str(corpora["indexed"]), "per_device_train_batch_size": 6}
    step = next(make_data(make_config(**values, **PACKINGS["not_full"])).loader())
    unpacked = next(make_data(make_config(**values, **PACKINGS["unpacked"])).loader())
    assert [batch.num_tokens for batch in step.micro_batches] == [b.num_tokens for b in unpacked.micro_batches]
    assert all(batch.input_ids.shape[0] <= 6 for batch in step.micro_batches)
    assert any(batch.input_ids.shape[0] < 6 for batch in step.micro_batches)


def test_unpacked_rows_hold_one_document(corpora, make_config, make_data):
    step = next(
        make_data(make_config(path=str(corpora["indexed"]), pad_to_multiple_of=8, **PACKINGS["unpacked"])).loader()
    )
    for batch in step.micro_batches:
        assert int(batch.segments.ids.max()) == 1
        assert batch.input_ids.shape[1] % 8 == 0
        longest = int((batch.segments.ids > 0).sum(1).max())
        assert batch.input_ids.shape[1] - longest < 8


def test_an_error_in_a_thread_reaches_the_caller_with_its_traceback(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["indexed"]), num_workers=2))
    collate, calls = data.collate, []

    class Failing:
        def __call__(self, rows, *, step):
            calls.append(len(rows))
            if len(calls) == 30:
                raise RuntimeError("collating went wrong")
            return collate(rows, step=step)

    loader = replace(data, collate=Failing()).loader()
    next(loader)
    next(loader)
    with pytest.raises(RuntimeError, match="collating went wrong") as failure:
        next(loader)
    assert "__call__" in "".join(traceback.format_tb(failure.value.__traceback__))
    with pytest.raises(RuntimeError, match="collating went wrong"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_close_ends_all_threads(num_workers, corpora, make_config, make_data):
    before = set(threading.enumerate())
    loader = make_data(make_config(path=str(corpora["jsonl"]), num_workers=num_workers)).loader()
    next(loader)
    assert set(threading.enumerate()) > before
    loader.close()
    assert set(threading.enumerate()) == before


def test_without_workers_there_is_no_thread(corpora, make_config, make_data):
    before = set(threading.enumerate())
    next(make_data(make_config(path=str(corpora["jsonl"]), num_workers=0)).loader())
    assert set(threading.enumerate()) == before


def test_a_state_of_another_order_is_refused_with_all_differences(corpora, make_config, make_data):
    config = make_config(path=str(corpora["indexed"]))
    state = next(make_data(config).loader()).state
    changed = replace(config, seed=6, dataset=replace(config.dataset, window_documents=8, num_lanes=2))
    with pytest.raises(DataError) as failure:
        make_data(changed).loader(state)
    message = str(failure.value)
    for part in ("seed was 5 and is 6", "dataset.window_documents was 16 and is 8", "dataset.num_lanes was 3 and is 2"):
        assert part in message
    unpacked = make_config(path=str(corpora["indexed"]), pack_sequences=False)
    with pytest.raises(DataError, match=r"pack_sequences.* was 'best_fit' and is 'none'"):
        make_data(unpacked).loader(state)
    with pytest.raises(DataError, match="version 0"):
        make_data(config).loader(state | {"version": 0})


def test_a_batch_that_cannot_be_shared_is_refused(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["indexed"])), world=5)
    with pytest.raises(DataError, match=r"24 rows cannot be shared by 5 processes.*multiple of 10"):
        data.loader()


def test_ranks_that_disagree_are_refused():
    state = {"next_row": 4, "next_batch_digest": None, "lanes": {"0": {"row": 1}}}
    with pytest.raises(DataError, match=r"rank 1 .*row 8"):
        merge_states([state, state | {"next_row": 8}])
    with pytest.raises(DataError, match="lane 0 differently"):
        merge_states([state, state | {"lanes": {"0": {"row": 2}}}])
