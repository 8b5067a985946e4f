"""Token rows -> fixed-shape numpy batches. No JAX here, so it can run ahead of the device."""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unsloth_jax.dims import Batch

STEP = 64  # unpacked rows are padded to a multiple of this, so few shapes are compiled
BLOCK = 50  # groups among whose rows lengths are sorted, as in transformers


class Row(NamedTuple):
    """One example: token ids, and 1 for each token the loss should predict."""

    tokens: list[int]
    mask: list[int]


def shuffled(rows: Sequence[Any], seed: int, epoch: int) -> list[Any]:
    """The rows in the order of one epoch; the same for the same seed and epoch."""
    return [rows[i] for i in np.random.default_rng((seed, epoch)).permutation(len(rows))]


def grouped(rows: Sequence[Row], size: int, seed: int, epoch: int) -> list[Row]:
    """The rows in an order of one epoch in which each `size` in succession are of like length.

    Rows are drawn into blocks of 50 groups and sorted within; the groups follow each other at
    random, the one with the longest row first, so that what needs most memory is tried at once.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows)).tolist()
    longest_first = lambda part: sorted(part, key=lambda i: -len(rows[i].tokens))
    blocks = [longest_first(order[at : at + size * BLOCK]) for at in _starts(order, size * BLOCK)]
    groups = [block[at : at + size] for block in blocks for at in _starts(block, size)]
    partial = [groups.pop()] if len(rows) % size else []
    drawn = [groups[i] for i in rng.permutation(len(groups))]
    if drawn:
        first = max(range(len(drawn)), key=lambda i: len(rows[drawn[i][0]].tokens))
        drawn.insert(0, drawn.pop(first))
    return [rows[i] for group in drawn + partial for i in group]


def _starts(items: Sequence, size: int) -> range:
    return range(0, len(items), size)


def best_fit(rows: Sequence[Row], length: int) -> list[list[Row]]:
    """Best-fit-decreasing packing of whole rows into bins of `length` tokens.

    The longest row first, each into the bin that it leaves the least room in (Ding et al. 2024,
    arXiv 2404.10830); rows, and bins by their longest, then stand in the order of `rows`. The
    lengths in the bins depend on the rows' lengths alone. Raises ValueError for a longer row.
    """
    sizes = [_fitting(n, row, length) for n, row in enumerate(rows)]
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms left, ascending
    having: dict[int, deque[int]] = defaultdict(deque)  # bins by the room they have left
    for n in sorted(range(len(rows)), key=lambda n: -sizes[n]):
        at = bisect_left(rooms, sizes[n])
        if at == len(rooms):
            home, room = len(bins), length
            bins.append([])
        else:
            room = rooms[at]
            home = having[room].popleft()
            if not having[room]:
                rooms.pop(at)
        bins[home].append(n)
        left = room - sizes[n]
        if left and not having[left]:
            insort(rooms, left)
        having[left].append(home)
    # By their longest row: were it by any row, bins of many short ones would come first.
    return [[rows[n] for n in sorted(b)] for b in sorted(bins, key=lambda b: b[0])]


def _fitting(n: int, row: Row, length: int) -> int:
    if len(row.tokens) > length:
        raise ValueError(f"row {n} has {len(row.tokens)} tokens, the limit is {length}")
    return len(row.tokens)


def packed(
    rows: Iterable[Row], length: int, open_bins: int = 32, most: int | None = None
) -> Iterator[list[Row]]:
    """First-fit packing of whole rows as they come into bins of `length` tokens, in order.

    Raises ValueError for a row that is longer. At most `open_bins` bins wait for more rows, each
    of which takes at most `most`.
    """
    room = lambda b, row: sum(len(r.tokens) for r in b) + len(row.tokens) <= length
    bins: list[list[Row]] = []
    for n, row in enumerate(rows):
        _fitting(n, row, length)
        fits = (b for b in bins if room(b, row) and (most is None or len(b) < most))
        home = next(fits, None)
        if home is None:
            bins.append([row])
        else:
            home.append(row)
        if len(bins) > open_bins:
            yield bins.pop(0)
    yield from bins


def bucket(rows: Iterable[Row], limit: int, multiple: int | None = None) -> int:
    """The row length that holds the longest of `rows`: a multiple of 64, at most `limit`.

    A `multiple` given is kept, above `limit` too. Raises ValueError where a row is longer.
    """
    longest = max(len(row.tokens) for row in rows)
    if longest > limit:
        raise ValueError(f"a row has {longest} tokens, the limit is {limit}")
    if multiple is not None:
        return rounded(longest, multiple)
    return min(limit, rounded(longest, STEP))


def rounded(length: int, multiple: int) -> int:
    """The next multiple at or above `length`."""
    return -(-length // multiple) * multiple


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
