"""Rows of a data set as the batches of optimizer steps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unsloth_jax import data
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch


@dataclass(frozen=True)
class Batches:
    """Optimizer-step batches of an epoch's rows: [accumulation, batch, length] arrays.

    Packed rows fill bins of `length` tokens; else each row stands alone, padded to the longest of
    its step. A last, partial step is filled up with empty rows, which count nothing.
    """

    rows: Sequence[Row]
    batch: int
    accumulation: int
    length: int
    packing: bool
    seed: int | None  # None leaves rows in their order

    def bins(self, epoch: int) -> list[list[Row]]:
        rows = self.rows
        if self.seed is not None:
            rows = data.shuffled(rows, self.seed, epoch)
        return list(data.packed(rows, self.length)) if self.packing else [[row] for row in rows]

    @property
    def widest(self) -> int:
        """The most tokens that a row of a batch has, padding included."""
        return self.length if self.packing else data.bucket(self.rows, self.length)

    def steps(self, epoch: int) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil(len(self.bins(epoch)) / (self.batch * self.accumulation))

    def documents(self, steps: int) -> int:
        """The most rows that share a bin in the first `steps` optimizer steps."""
        if not self.packing:
            return 1
        most, epoch = 1, 0
        while steps > 0:
            most = max(most, *map(len, self.bins(epoch)))
            steps -= self.steps(epoch)
            epoch += 1
        return most

    def epoch(self, epoch: int) -> Iterator[Batch]:
        bins = self.bins(epoch)
        size = self.batch * self.accumulation
        for at in range(0, len(bins), size):
            group = bins[at : at + size]
            width = self.length
            if not self.packing:
                width = data.bucket(itertools.chain.from_iterable(group), self.length)
            micro = [group[i : i + self.batch] for i in range(0, size, self.batch)]
            yield data.stacked([data.collate(m, self.batch, width) for m in micro])

    def forever(self, skip: int = 0) -> Iterator[tuple[float, Batch]]:
        """(epochs done after the step, batch), the first `skip` steps left out."""
        for epoch in itertools.count():
            count = self.steps(epoch)
            if skip >= count:
                skip -= count
                continue
            for n, batch in enumerate(self.epoch(epoch), start=1):
                if n > skip:
                    yield epoch + n / count, batch
            skip = 0
