import numpy as np
import pytest

from neobert.data.rows.packing import (
    Piece,
    best_fit,
    max_segments_per_row,
    next_fit,
    one_per_row,
    piece_lengths,
    split_documents,
)


def test_worked_example():
    pieces, num_dropped = split_documents(np.array([3, 17, 4]), max_seq_length=10, min_length=2)
    assert pieces == [Piece(0, 0, 3), Piece(1, 0, 8), Piece(1, 8, 8), Piece(2, 0, 4)]
    assert num_dropped == 1
    rows = best_fit([piece.length + 2 for piece in pieces], capacity=10, max_items=4)
    assert [[pieces[i] for i in row] for row in rows] == [[pieces[1]], [pieces[2]], [pieces[3]], [pieces[0]]]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 10, 10, 6, 4], [[1], [2], [3, 4], [0]]),
        ([7, 3, 7, 3], [[0, 3], [2, 1]]),
        ([4, 4, 2, 2, 8], [[4, 3], [0, 1, 2]]),
        ([1, 1, 1, 1, 1, 1], [[0, 1, 2, 3], [4, 5]]),
        ([6, 7, 4, 3], [[1, 3], [0, 2]]),
        ([10], [[0]]),
        ([], []),
    ],
)
def test_best_fit_literally(lengths, rows):
    assert best_fit(lengths, capacity=10, max_items=4) == rows


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([5, 4, 10, 3], [[0, 1], [2], [3]]), ([2, 2, 2, 2, 2], [[0, 1, 2, 3], [4]]), ([6, 6, 4], [[0], [1, 2]]), ([], [])],
)
def test_next_fit_literally(lengths, rows):
    assert next_fit(lengths, capacity=10, max_items=4) == rows


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 17])
def test_document_lengths_around_a_row(length):
    pieces, num_dropped = split_documents(np.array([length]), max_seq_length=10, min_length=1)
    assert [p.start for p in pieces] == list(range(0, length, 8))
    assert sum(p.length for p in pieces) == length
    assert all(0 < p.length <= 8 for p in pieces)
    assert num_dropped == 0


def test_truncation_keeps_the_first_piece():
    assert split_documents(np.array([3, 20, 0]), 10, 2, truncate=True) == ([Piece(0, 0, 3), Piece(1, 0, 8)], 0)


def test_short_documents_are_dropped_and_counted():
    assert split_documents(np.array([1, 5, 0, 9]), 10, 2) == ([Piece(1, 0, 5), Piece(3, 0, 8)], 2)


def test_random_windows_lose_nothing_and_stay_in_bounds():
    rng = np.random.default_rng(1)
    for _ in range(50):
        capacity, max_items = int(rng.integers(4, 80)), int(rng.integers(1, 10))
        lengths = rng.integers(1, capacity + 1, size=int(rng.integers(0, 200))).tolist()
        for rows in (best_fit(lengths, capacity, max_items), next_fit(lengths, capacity, max_items)):
            assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
            assert all(sum(lengths[i] for i in row) <= capacity and len(row) <= max_items for row in rows)
        assert one_per_row(lengths) == [[i] for i in range(len(lengths))]


@pytest.mark.parametrize(("length", "fill"), [(512, 0.99), (1024, 0.99)])
def test_fill_of_a_window_of_realistic_documents(length, fill):
    documents = np.minimum(20_000, np.random.default_rng(0).lognormal(5.3, 1.0, size=1024)).astype(np.int64) + 1
    _, _, sizes, _ = piece_lengths(documents, length, 5, truncate=False)
    rows = best_fit((sizes + 2).tolist(), length, max_segments_per_row(length, packed=True))
    assert (sizes + 2).sum() / (len(rows) * length) > fill
