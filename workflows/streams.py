"""Rows that come from a data set as long as it lasts, never all at once."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from unsloth_jax import data
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch

MOST = 64  # rows of a bin: attention's kernels make room for as many
FIRST = 64  # rows by which streams are told apart
Rows = Callable[[int], Iterator[Row]]  # a pass over the data set, by its number


@dataclass(frozen=True)
class Streamed:
    """Optimizer-step batches as `batching.Batches` gives them, of rows in the order they come in.

    A pass that ends is followed by the next one, whose rows fill up the step that it began.
    """

    rows: Rows
    batch: int
    accumulation: int
    length: int
    packing: bool
    total: int  # steps of the run, which count as one epoch, as in transformers
    multiple: int | None = None  # of the width of a batch

    @property
    def widest(self) -> int:
        """The most tokens that a row of a batch may have, padding included."""
        return data.rounded(self.length, self.multiple or 1)

    def documents(self, steps: int) -> int:
        """The most rows that share a bin."""
        return MOST if self.packing else 1

    def steps(self, epoch: int) -> int:
        """Optimizer steps in one epoch."""
        return self.total

    def forever(self, skip: int = 0) -> Iterator[tuple[float, Batch]]:
        """(epochs done after the step, batch), the first `skip` steps left out.

        Raises ValueError where a pass brings no row.
        """
        bins, size = self._bins(), self.batch * self.accumulation
        for step in itertools.count():
            group = list(itertools.islice(bins, size))
            if step < skip:
                continue
            width = self.widest
            if not self.packing:
                rows = itertools.chain.from_iterable(group)
                width = data.bucket(rows, self.length, self.multiple)
            micro = [group[i : i + self.batch] for i in range(0, size, self.batch)]
            batches = [data.collate(m, self.batch, width) for m in micro]
            yield (step + 1) / self.total, data.stacked(batches)

    def begun(self) -> tuple[list[Row], "Streamed"]:
        """The first rows, and the stream with them put back: some can be read only once."""
        rows = self.rows(0)
        first = list(itertools.islice(rows, FIRST))
        left = [itertools.chain(first, rows)]
        again = lambda number: left.pop() if left and number == 0 else self.rows(number)
        return first, replace(self, rows=again)

    def _bins(self) -> Iterator[list[Row]]:
        rows = self._passes()
        return (
            data.packed(rows, self.length, most=MOST) if self.packing else ([row] for row in rows)
        )

    def _passes(self) -> Iterator[Row]:
        for number in itertools.count():
            empty = True
            for row in self.rows(number):
                empty = False
                yield row
            if empty:
                raise ValueError(
                    f"pass {number + 1} over the streamed data set brought no row; it must be "
                    "one that can be read again, or max_steps smaller"
                )
