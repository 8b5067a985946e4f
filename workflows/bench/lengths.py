"""The rows that both sides of a comparison train on: numpy only, the same for the same seed."""

from collections.abc import Iterator

import numpy as np

MEAN, SPREAD = 200, 0.8  # tokens; standard deviation of the logarithm
SHORTEST, LONGEST = 16, 2048
OPEN_BINS = 32
SEED = 3407


def shapes(text: str) -> list[tuple[int, int]]:
    """(batch, length) pairs of a list like "2x2048,1x8192". Raises ValueError for another."""
    pairs = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(f"a shape is BATCHxLENGTH like 2x2048, got {part!r}")
        pairs.append((int(numbers[0]), int(numbers[1])))
    return pairs


def tokens(batch: int, length: int, vocabulary: int, step: int) -> np.ndarray:
    """Random token ids [batch, length] of training step `step`, int32."""
    rng = np.random.default_rng((SEED, step, batch, length))
    return rng.integers(0, vocabulary, (batch, length), dtype=np.int32)


def documents(longest: int = LONGEST) -> Iterator[int]:
    """Lengths of documents without end, spread like Alpaca's: log-normal with a mean of MEAN."""
    rng = np.random.default_rng(SEED)
    while True:
        middle = np.log(MEAN) - SPREAD**2 / 2
        yield from np.clip(rng.lognormal(middle, SPREAD, 1024), SHORTEST, longest).astype(int)


def packed(batch: int, length: int) -> Iterator[list[list[int]]]:
    """Batches without end of `batch` bins, each the lengths of the documents that share a row.

    First fit in order of arrival with OPEN_BINS bins open, as `unsloth_jax.data.packed` packs.
    """
    bins: list[list[int]] = []
    full: list[list[int]] = []
    for size in documents(min(length, LONGEST)):
        home = next((b for b in bins if sum(b) + size <= length), None)
        if home is None:
            bins.append([int(size)])
        else:
            home.append(int(size))
        if len(bins) > OPEN_BINS:
            full.append(bins.pop(0))
        if len(full) == batch:
            yield full
            full = []
