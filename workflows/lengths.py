"""How long rows are: what is said before a run of those that are too long."""

from collections.abc import Sequence

from workflows.keywords import say

BINS, BAR = 12, 40
REMEDY = "raise the limit, shorten the row or ask for truncation"


def too_long(index: int, tokens: int, limit: int) -> str:
    """What an error says of one row."""
    return f"row {index}: {tokens} tokens, more than max_length={limit}; {REMEDY}"


def judge(lengths: Sequence[int], limit: int | None, *, cut: bool) -> None:
    """Says how many rows are longer than `limit` where they are `cut`; else raises ValueError
    naming the first, with a histogram. Nothing where all fit.
    """
    long = [n for n, tokens in enumerate(lengths) if limit is not None and tokens > limit]
    if not long:
        return
    share = f"{len(long)} of {len(lengths)} rows are longer"
    if not cut:
        first = too_long(long[0], lengths[long[0]], limit)
        raise ValueError(f"{first} ({share})\n{histogram(lengths, limit)}")
    if len(long) == len(lengths):
        share = f"all {len(lengths)} rows are longer"
        print(histogram(lengths, limit))
    say(f"{share} than max_length={limit} and are cut")


def histogram(lengths: Sequence[int], limit: int | None = None) -> str:
    """Rows by their number of tokens, a line for each stretch, with a line where `limit` lies."""
    width = -(-max(lengths) // BINS)
    counts = [0] * (-(-max(lengths) // width) or 1)
    for tokens in lengths:
        counts[max(0, tokens - 1) // width] += 1
    lines = [f"{'tokens':>13}  rows"]
    for n, count in enumerate(counts):
        first, last = n * width + 1, (n + 1) * width
        bar = "#" * -(-count * BAR // max(counts))
        lines.append(f"{first:>6}-{last:<6}  {count:<6} {bar}".rstrip())
        if limit is not None and first <= limit <= last:
            lines.append(f"{'':>13}  ---- max_length={limit}")
    return "\n".join(lines)
