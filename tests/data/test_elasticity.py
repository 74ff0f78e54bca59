"""A run that is cut anywhere and continues with other ranks and threads reads the same rows with the same masks.

Sampled with fixed seeds; `pytest -m full` runs many more chains.
"""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from reading import KINDS, PACKINGS, dataset_values, read_world, rows_of

from neobert.errors import DataError

NUM_STEPS = 16


def check_chain(expected, config, make_data, draw):
    """Cuts the run at random steps; each part continues from the state before it, with other ranks and threads."""
    step, state = 0, None
    while step < len(expected):
        count = min(draw.randint(1, 9), len(expected) - step)
        world, num_workers = draw.choice([1, 2, 3, 4]), draw.choice([0, 1, 4])
        found = read_world(make_data, config, world, num_workers, state, count)
        for number, (here, there) in enumerate(zip(found, expected[step : step + count])):
            assert here == there, f"step {step + number}, {world} ranks, {num_workers} threads"
        step, state = step + count, expected[step + count - 1][2]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_restarts_equals_the_uninterrupted_run(kind, packing, corpora, make_config, make_data):
    config = make_config(**dataset_values(kind, corpora), **PACKINGS[packing])
    expected = read_world(make_data, config, 1, 0, None, NUM_STEPS)
    check_chain(expected, config, make_data, random.Random(f"{kind} {packing}"))


@pytest.mark.full
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_chains_of_restarts(kind, packing, corpora, make_config, make_data):
    for number in range(12):
        draw = random.Random(f"{kind} {packing} {number}")
        sizes = {"num_lanes": draw.choice([1, 2, 3]), "window_documents": draw.choice([1, 5, 16, 100])}
        config = make_config(**(dataset_values(kind, corpora) | sizes), **PACKINGS[packing])
        check_chain(read_world(make_data, config, 1, 0, None, 40), config, make_data, draw)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_token_once(kind, corpora, texts, tokenizer, make_config, make_data):
    data = make_data(make_config(**dataset_values(kind, corpora)))
    wanted = Counter(t for tokens in tokenizer.encode_batch(texts) for t in tokens.tolist())
    open_lane = data.train.lane_opener()
    for epoch in (0, 1):
        found = Counter()
        for number in range(data.train.order.num_lanes):
            lane = open_lane(number)
            state = lane.start()
            while state["epoch"] <= epoch:
                window = lane.open(state)
                if state["epoch"] == epoch:
                    for piece in (piece for row in window.rows for piece in row):
                        found.update(np.asarray(window.get(piece)).tolist())
                state = window.next_state
        assert found == wanted


@pytest.mark.parametrize("world", [1, 3])
def test_a_state_has_the_digest_of_the_batch_after_it(world, corpora, make_config, make_data):
    """Whatever the number of ranks: a resumed run compares its first batch with it."""
    found = read_world(make_data, make_config(path=str(corpora["jsonl"])), world, 1, None, 6)
    digests = [digest for _, digest, _ in found]
    assert [state["next_batch_digest"] for _, _, state in found[:-1]] == [f"{digest:016x}" for digest in digests[1:]]


def test_an_error_ahead_leaves_the_batches_before_it(tmp_path, make_config, make_data):
    """The loader looks one step ahead for the digest; the step before a failure is still returned, without a digest."""
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"w{n} " * 20}) + "\n" for n in range(24))
    path.write_text(good + "{broken\n" * 30)
    config = make_config(path=str(path), num_lanes=1, window_documents=24, max_bad_records=3, pack_sequences=False)
    loader = make_data(config).loader()
    step = next(loader)
    assert len(rows_of(step)) == 24
    assert step.state["next_batch_digest"] is None
    with pytest.raises(DataError, match=r"dataset\.max_bad_records"):
        next(loader)


@pytest.mark.parametrize("kind", ["indexed", "text_indexed", "jsonl", "jsonl.gz", "parquet"])
def test_order_of_the_source_is_kept_without_shuffling(kind, corpora, texts, tokenizer, make_config, make_data):
    config = make_config(**dataset_values(kind, corpora), num_lanes=None, window_documents=None, shuffle_buffer_size=0)
    data = make_data(replace(config, datacollator=replace(config.datacollator, pack_sequences=False)))
    assert data.train.order.num_lanes == 1
    lane = data.train.lane_opener()(0)
    state, found = lane.start(), []
    while state["epoch"] < 2:
        window = lane.open(state)
        found += [int(np.asarray(window.get(piece))[0]) for row in window.rows for piece in row]
        state = window.next_state
    order = [token for token, _ in Counter(found[: len(found) // 2]).items()]
    assert order == [tokens[0] for tokens in tokenizer.encode_batch(texts)]
    assert found[: len(found) // 2] == found[len(found) // 2 :]


@pytest.mark.parametrize(("size", "lanes", "window"), [(1000, 7, 143), (100, 1, 100), (10, 1, 10)])
def test_a_neighbourhood_becomes_lanes_and_windows(size, lanes, window, corpora, make_config, make_data):
    config = make_config(path=str(corpora["jsonl.gz"]), num_lanes=None, window_documents=None, shuffle_buffer_size=size)
    train = make_data(config).train
    assert (train.order.num_lanes, train.order.window_documents) == (lanes, window)


def test_a_fraction_of_the_documents_is_held_out(corpora, make_config, make_data):
    data = make_data(make_config(path=str(corpora["indexed"]), validation_split=0.1))
    assert (data.eval_set.num_documents, data.num_documents) == (15, 135)
    with pytest.raises(DataError, match=r"dataset.validation_split: 0.1 needs the number of documents.*eval_samples"):
        make_data(make_config(path=str(corpora["jsonl"]), validation_split=0.1))
