"""Token rows -> fixed-shape numpy batches. No JAX here, so it can run ahead of the device."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from unsloth_jax.dims import Batch

STEP = 64  # unpacked rows are padded to a multiple of this, so few shapes are compiled


class Row(NamedTuple):
    """One example: token ids, and 1 for each token the loss should predict."""

    tokens: list[int]
    mask: list[int]


def shuffled(rows: Sequence[Row], seed: int, epoch: int) -> list[Row]:
    """The rows in the order of one epoch; the same for the same seed and epoch."""
    return [rows[i] for i in np.random.default_rng((seed, epoch)).permutation(len(rows))]


def packed(
    rows: Iterable[Row], length: int, open_bins: int = 32, most: int | None = None
) -> Iterator[list[Row]]:
    """First-fit packing of whole rows into bins of `length` tokens, in order.

    Raises ValueError for a row that is longer. At most `open_bins` bins wait for more rows, each
    of which takes at most `most`.
    """
    room = lambda b, row: sum(len(r.tokens) for r in b) + len(row.tokens) <= length
    bins: list[list[Row]] = []
    for n, row in enumerate(rows):
        if len(row.tokens) > length:
            raise ValueError(f"row {n} has {len(row.tokens)} tokens, the limit is {length}")
        fits = (b for b in bins if room(b, row) and (most is None or len(b) < most))
        home = next(fits, None)
        if home is None:
            bins.append([row])
        else:
            home.append(row)
        if len(bins) > open_bins:
            yield bins.pop(0)
    yield from bins


def bucket(rows: Iterable[Row], limit: int) -> int:
    """The row length that holds the longest of `rows`: a multiple of 64, at most `limit`.

    Raises ValueError where a row is longer than that.
    """
    longest = max(len(row.tokens) for row in rows)
    if longest > limit:
        raise ValueError(f"a row has {longest} tokens, the limit is {limit}")
    return min(limit, -(-longest // STEP) * STEP)


def collate(bins: Sequence[Sequence[Row]], batch: int, length: int) -> Batch:
    """Up to `batch` bins of rows as one padded batch; each row is a segment, positions restart.

    Raises ValueError for more bins, a bin of more than `length` tokens, a mask of another length.
    """
    _check_bins(bins, batch, length)
    tokens, targets, positions, segments = (np.zeros((batch, length), np.int32) for _ in range(4))
    weights = np.zeros((batch, length), np.float32)
    for i, rows in enumerate(bins):
        at = 0
        for n, row in enumerate(rows, start=1):
            size = len(row.tokens)
            here, before = slice(at, at + size), slice(at, at + size - 1)
            tokens[i, here] = row.tokens
            positions[i, here] = np.arange(size)
            segments[i, here] = n
            targets[i, before] = row.tokens[1:]
            weights[i, before] = row.mask[1:]
            at += size
    return Batch(tokens, targets, weights, positions, segments)


def _check_bins(bins: Sequence[Sequence[Row]], batch: int, length: int) -> None:
    if len(bins) > batch:
        raise ValueError(f"{len(bins)} bins don't go into a batch of {batch}")
    for i, rows in enumerate(bins):
        sizes = [len(row.tokens) for row in rows]
        if sum(sizes) > length:
            raise ValueError(f"bin {i} has {sum(sizes)} tokens, the limit is {length}")
        if sizes != [len(row.mask) for row in rows]:
            raise ValueError(f"bin {i} has rows of {sizes} tokens, masks differ in length")


def stacked(micro: Sequence[Batch]) -> Batch:
    """Micro-batches of one shape as one batch with a leading micro-batch axis."""
    present = lambda parts: None if parts[0] is None else np.stack(parts)
    return Batch(*(present(parts) for parts in zip(*micro, strict=True)))
