"""How long a data set's rows are: what a run's page draws, and what a dry run prints."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from unsloth_jax.data import Row
from workflows.batching import Batches

BINS = 24
WIDTH = 40  # letters of the longest bar


class Lengths(NamedTuple):
    """Rows by their tokens; `density` is the share of an epoch's places that hold a token."""

    rows: int
    tokens: int
    supervised: int
    shortest: int
    median: float
    longest: int
    limit: int  # tokens a row may have
    packing: bool
    density: float
    edges: list[int]  # rows of edges[i] to edges[i + 1] - 1 tokens are counted in counts[i]
    counts: list[int]


def lengths(batches: Any) -> Lengths | None:
    """Of the rows that batches are made of; None where they are streamed, or no token rows."""
    if not isinstance(batches, Batches) or not all(isinstance(r, Row) for r in batches.rows):
        return None
    sizes = [len(row.tokens) for row in batches.rows]
    supervised = sum(sum(row.mask) for row in batches.rows)
    edges, counts = histogram(sizes)
    return Lengths(
        len(sizes), sum(sizes), supervised, min(sizes), statistics.median(sizes), max(sizes),
        batches.length, batches.packing, sum(sizes) / _places(batches), edges, counts,
    )  # fmt: skip


def prompts(rows: Sequence[Any], limit: int) -> dict[str, Any] | None:
    """Of prompts, rows with `ids`, of at most `limit` tokens; None where they are none."""
    sizes = [len(row.ids) for row in rows if hasattr(row, "ids")]
    if len(sizes) != len(rows):
        return None
    edges, counts = histogram(sizes)
    return {
        "rows": len(sizes), "shortest": min(sizes), "median": statistics.median(sizes),
        "longest": max(sizes), "limit": limit, "edges": edges, "counts": counts,
    }  # fmt: skip


def histogram(sizes: Sequence[int], most: int = BINS) -> tuple[list[int], list[int]]:
    """(edges, counts) of at most `most` bins of equal whole widths, from 0 past the largest."""
    width = -(-(max(sizes) + 1) // most)
    counts = [0] * (max(sizes) // width + 1)
    for size in sizes:
        counts[size // width] += 1
    return [width * n for n in range(len(counts) + 1)], counts


def _places(batches: Batches) -> int:
    """Tokens that the batches of the first epoch have room for, but for a last step's filling."""
    bins = batches.bins(0)
    if batches.packing:
        return len(bins) * batches.width(bins)
    size, out = batches.batch * batches.accumulation, 0
    for at in range(0, len(bins), size):
        group = bins[at : at + size]
        out += len(group) * batches.width(group)
    return out


def sentence(found: Lengths) -> str:
    """The totals in one line."""
    how = "packed" if found.packing else "padded"
    return (
        f"{found.rows:,} rows, {found.tokens:,} tokens, {found.supervised:,} supervised "
        f"({found.supervised / found.tokens:.1%}); {found.shortest} to {found.longest} a row, "
        f"median {found.median:g}, limit {found.limit:,}; {how} rows are {found.density:.1%} tokens"
    )


def drawn(found: Lengths) -> str:
    """The histogram in letters, a line a bin, from the first that holds something."""
    most, last = max(found.counts), found.edges[-1]
    digits = len(f"{last:,}")
    lines = []
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        if not count and not lines:
            continue
        bar = "#" * (-(-count * WIDTH // most) if count else 0)
        lines.append(f"{low:>{digits},} to {high - 1:>{digits},} |{bar} {count:,}".rstrip())
    return "\n".join(lines)
