"""Packing and batching of token rows: nothing cut, lost, reordered or counted twice."""

import itertools
import time

import datasets
import numpy as np
import pytest
import trl

from unsloth_jax import data
from unsloth_jax.data import Row
from workflows.bench import lengths


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


@pytest.mark.parametrize("length", [64, 100, 1000])
def test_best_fit_packs_every_row_once_whole_and_none_overflows(length):
    rows = rows_of(LENGTHS)
    bins = data.best_fit(rows, length)
    assert sorted(row for b in bins for row in b) == rows
    assert all(sum(len(row.tokens) for row in b) <= length for b in bins)
    assert all(b == sorted(b) for b in bins)


def test_best_fit_puts_the_longest_first_where_the_least_room_is_left():
    a, b, c, d, e, f = rows_of([3, 6, 4, 7, 2, 10])
    # 7 leaves 3 and 6 leaves 4: 4 goes to the 6, 3 to the 7, 2 where no room is left.
    assert data.best_fit([a, b, c, d, e, f], 10) == [[b, c], [a, d], [e], [f]]


def real_like(count: int) -> list[Row]:
    """Rows as long as Alpaca's; their tokens are made up."""
    sizes = itertools.islice(lengths.documents(1024), count)
    return [Row([n] * size, [1] * size) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("length", [1024, 2048])
def test_best_fit_is_as_dense_as_trls(length, figure):
    rows = real_like(1000)
    table = datasets.Dataset.from_list([{"input_ids": row.tokens} for row in rows])
    theirs = trl.pack_dataset(table, length, "bfd")["seq_lengths"]
    ours = [[len(row.tokens) for row in b] for b in data.best_fit(rows, length)]
    assert sorted(map(sorted, ours)) == sorted(map(sorted, theirs))
    empty = 1 - sum(map(sum, ours)) / (len(ours) * length)
    figure(f"empty part of packed rows of {length} tokens, Alpaca's lengths", empty, 0.01)


def test_best_fit_has_bins_of_the_same_lengths_in_any_order_of_rows():
    rows = rows_of(LENGTHS)
    sizes = lambda bins: sorted(sorted(len(row.tokens) for row in b) for b in bins)
    one, other = (data.best_fit(data.shuffled(rows, 0, epoch), 128) for epoch in (0, 1))
    assert sizes(one) == sizes(other) and one != other
    assert data.best_fit(data.shuffled(rows, 0, 0), 128) == one


def test_bins_of_many_rows_come_no_sooner_than_others():
    rows = data.shuffled(real_like(2000), 0, 0)
    counts = [len(b) for b in data.best_fit(rows, 1024)]
    half = len(counts) // 2
    assert abs(np.mean(counts[:half]) - np.mean(counts[half:])) < 0.15 * np.mean(counts)


def test_many_rows_are_packed_in_seconds():
    rows, began = real_like(20_000), time.monotonic()
    assert len(data.best_fit(rows, 2048)) > 1000 and time.monotonic() - began < 5


@pytest.mark.parametrize("count", [200, 203, 3])
def test_grouped_rows_share_steps_with_rows_of_like_length(count):
    rows, size = rows_of(LENGTHS * 2)[:count], 4
    order = data.grouped(rows, size, seed=1, epoch=0)
    assert sorted(order) == rows
    sizes = [len(row.tokens) for row in order]
    assert sizes[0] == max(sizes)
    padding = lambda sizes: (
        sum(max(sizes[at : at + size]) * len(sizes[at : at + size]) for at in range(0, count, size))
        / sum(sizes)
    )
    drawn = [len(row.tokens) for row in data.shuffled(rows, 1, 0)]
    assert count == 3 or padding(sizes) < 1.05 < 1.3 < padding(drawn)


def test_grouped_rows_have_one_order_an_epoch_and_no_slope():
    rows = rows_of(LENGTHS * 4)
    one, next_, other = (data.grouped(rows, 4, *key) for key in [(1, 0), (1, 1), (2, 0)])
    assert data.grouped(rows, 4, 1, 0) == one
    assert one != next_ != other != one
    firsts = [len(row.tokens) for row in one[4::4]]
    half = len(firsts) // 2
    assert abs(np.mean(firsts[:half]) - np.mean(firsts[half:])) < 0.25 * np.mean(firsts)


def test_a_row_that_is_too_long_is_named_and_not_cut():
    with pytest.raises(ValueError, match="row 2 has 11 tokens, the limit is 10"):
        data.best_fit(rows_of([3, 10, 11, 2]), 10)
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


@pytest.mark.parametrize(("longest", "multiple", "expected"), [(65, 8, 72), (99, 64, 128)])
def test_a_multiple_given_is_kept_above_the_limit_too(longest, multiple, expected):
    assert data.bucket(rows_of([1, longest]), 100, multiple) == expected


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
