"""Packing and batching of token rows: nothing cut, lost, reordered or counted twice."""

import numpy as np
import pytest

from unsloth_jax import data
from unsloth_jax.data import Row


def rows_of(lengths, seed=0) -> list[Row]:
    """Rows whose tokens are all different, so that each can be told from the others."""
    rng, at, out = np.random.default_rng(seed), 1, []
    for n in lengths:
        out.append(Row(list(range(at, at + n)), [0, *rng.integers(0, 2, n - 1).tolist()]))
        at += n
    return out


LENGTHS = np.random.default_rng(1).integers(1, 65, 200).tolist()


@pytest.mark.parametrize("open_bins", [1, 4, 32])
@pytest.mark.parametrize("length", [64, 100, 1000])
def test_every_row_is_packed_once_whole_and_none_overflows(length, open_bins):
    rows = rows_of(LENGTHS)
    bins = list(data.packed(rows, length, open_bins))
    assert sorted(row.tokens[0] for b in bins for row in b) == [row.tokens[0] for row in rows]
    assert all(row in rows for b in bins for row in b)
    assert all(sum(len(row.tokens) for row in b) <= length for b in bins)
    assert all(b == sorted(b) for b in bins)


def test_packing_fills_the_first_bin_with_room():
    a, b, c, d, e = rows_of([6, 7, 4, 3, 1])
    assert list(data.packed([a, b, c, d, e], 10)) == [[a, c], [b, d], [e]]
    assert list(data.packed([a, b, c, d, e], 10, open_bins=1)) == [[a], [b], [c, d, e]]


def test_packing_leaves_little_room_and_works_as_a_stream():
    total = sum(LENGTHS)
    bins = list(data.packed(rows_of(LENGTHS), 128))
    assert total / (128 * len(bins)) > 0.95
    endless = (row for _ in iter(int, 1) for row in rows_of(LENGTHS))
    assert next(data.packed(endless, 128))


def test_a_row_that_is_too_long_is_named_and_not_cut():
    with pytest.raises(ValueError, match="row 2 has 11 tokens, the limit is 10"):
        list(data.packed(rows_of([3, 10, 11, 2]), 10))
    with pytest.raises(ValueError, match="a row has 11 tokens, the limit is 10"):
        data.bucket(rows_of([3, 11]), 10)


def test_a_batch_holds_shifted_targets_restarting_positions_and_one_segment_a_row():
    a, b, c = Row([5, 6, 7], [0, 1, 1]), Row([8, 9], [1, 1]), Row([4], [1])
    got = data.collate([[a, b], [c]], batch=3, length=6)
    assert got.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [4, 0, 0, 0, 0, 0], [0] * 6]
    assert got.targets.tolist() == [[6, 7, 0, 9, 0, 0], [0] * 6, [0] * 6]
    assert got.weights.tolist() == [[1, 1, 0, 1, 0, 0], [0] * 6, [0] * 6]
    assert got.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0] * 6]
    assert got.segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    assert {x.dtype for x in got[:5]} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_a_token_counts_where_its_own_mask_says_so():
    row = Row([5, 6, 7, 8], [0, 0, 1, 0])
    assert data.collate([[row]], 1, 4).weights.tolist() == [[0, 1, 0, 0]]


def test_packed_and_padded_batches_supervise_the_same_tokens():
    rows = rows_of(LENGTHS)
    bins = list(data.packed(rows, 128))
    together = data.collate(bins, len(bins), 128)
    apart = data.collate([[row] for row in rows], len(rows), 64)
    said = lambda b: sorted(b.targets[b.weights > 0].tolist())
    assert (
        said(together)
        == said(apart)
        == sorted(t for row in rows for t, on in zip(row.tokens, row.mask, strict=True) if on)
    )


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([[Row([1], [1])], [Row([1], [1])]], "2 bins don't go into a batch of 1"),
        ([[Row([1, 2], [1, 1]), Row([3, 4], [1, 1])]], "bin 0 has 4 tokens, the limit is 3"),
        ([[Row([1, 2], [1])]], "masks differ in length"),
    ],
)
def test_bins_that_do_not_fit_a_batch_are_refused(bins, message):
    with pytest.raises(ValueError, match=message):
        data.collate(bins, batch=1, length=3)


@pytest.mark.parametrize(
    ("longest", "limit", "expected"), [(1, 512, 64), (64, 512, 64), (65, 512, 128), (65, 100, 100)]
)
def test_a_bucket_is_a_multiple_of_64_within_the_limit(longest, limit, expected):
    assert data.bucket(rows_of([1, longest, 1]), limit) == expected


def test_an_epoch_has_one_order_and_the_next_another():
    rows = rows_of(LENGTHS)
    orders = [data.shuffled(rows, seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0)]]
    assert data.shuffled(rows, 1, 0) == orders[0]
    assert all(sorted(order) == sorted(rows) for order in orders)
    assert all(x != y for x, y in [orders[:2], orders[::2], orders[1:], (orders[0], rows)])


def test_micro_batches_of_one_shape_are_stacked():
    one = data.collate([rows_of([3])], 1, 4)
    two = data.stacked([one, one])
    assert two.tokens.shape == (2, 1, 4) and two.weights.dtype == np.float32
    np.testing.assert_array_equal(two.tokens[1], one.tokens)
