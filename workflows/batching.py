"""Rows of a data set as the batches of optimizer steps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from unsloth_jax import data
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch
from workflows.keywords import say

SAMPLING = ("random", "sequential", "group_by_length")
PACKING = ("bfd", "bfd_split")


def check(a: Any) -> None:
    """Raises ValueError where a config's order and width of batches can't be."""
    multiple = a.pad_to_multiple_of
    if multiple not in (None, "auto") and (isinstance(multiple, str) or multiple < 1):
        raise ValueError(
            "SFTConfig: pad_to_multiple_of must be a whole number from 1, 'auto' or None, got "
            f"{multiple!r}"
        )
    if a.group_by_length and a.train_sampling_strategy == "sequential":
        raise ValueError(
            "SFTConfig: group_by_length=True and train_sampling_strategy='sequential' are two "
            "orders; expected one of them"
        )


def order(a: Any) -> dict[str, Any]:
    """What a config says of the order and width of batches, as Batches takes it."""
    sampling = "group_by_length" if a.group_by_length else a.train_sampling_strategy
    if a.packing and sampling == "group_by_length":
        say("group_by_length makes no difference to packed rows, which are all of one length")
    seed = None if sampling == "sequential" else a.seed
    return {"seed": seed, "grouped": sampling == "group_by_length", "multiple": width_multiple(a)}


def width_multiple(a: Any) -> int | None:
    """What the width of a batch is a multiple of, None where that is left to us."""
    return None if a.pad_to_multiple_of == "auto" else a.pad_to_multiple_of


@runtime_checkable
class Steps(Protocol):
    """What a run asks of its batches, whoever makes them."""

    batch: int  # rows of a micro-batch
    accumulation: int
    widest: int  # tokens of the longest row, padding included

    def documents(self, steps: int) -> int: ...
    def steps(self, epoch: int) -> int: ...
    def forever(self, skip: int = 0) -> Iterator[tuple[float, Batch]]: ...


@dataclass(frozen=True)
class Batches:
    """Optimizer-step batches of an epoch's rows: [accumulation, batch, length] arrays.

    Packed rows fill bins of `length` tokens by best fit; else each row stands alone, padded to the
    longest of its step. A last, partial step is filled up with empty rows, which count nothing.
    """

    rows: Sequence[Row]
    batch: int
    accumulation: int
    length: int
    packing: bool
    seed: int | None  # None leaves rows in their order
    grouped: bool = False  # rows of like length share a step; no difference to packed ones
    multiple: int | None = None  # of the width of a batch

    def bins(self, epoch: int) -> list[list[Row]]:
        """The rows of one epoch, by the row of a batch that they share."""
        if self.packing:
            return data.best_fit(self._drawn(self.rows, epoch), self.length)
        if self.grouped and self.seed is not None:
            size = self.batch * self.accumulation
            return [[row] for row in data.grouped(self.rows, size, self.seed, epoch)]
        return [[row] for row in self._drawn(self.rows, epoch)]

    def _drawn(self, rows: Sequence[Row], epoch: int) -> Sequence[Row]:
        return rows if self.seed is None else data.shuffled(rows, self.seed, epoch)

    @property
    def widest(self) -> int:
        """The most tokens that a row of a batch has, padding included."""
        return self.width([self.rows])

    def width(self, bins: Sequence[Sequence[Row]]) -> int:
        """The width of a batch of these bins."""
        if self.packing:
            return data.rounded(self.length, self.multiple or 1)
        return data.bucket(itertools.chain.from_iterable(bins), self.length, self.multiple)

    def steps(self, epoch: int) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil(len(self.bins(epoch)) / (self.batch * self.accumulation))

    def documents(self, steps: int) -> int:
        """The most rows that share a bin in the first `steps` optimizer steps."""
        # Best fit gives every epoch bins of the same lengths.
        return max(map(len, self.bins(0)), default=1) if self.packing else 1

    def epoch(self, epoch: int) -> Iterator[Batch]:
        bins = self.bins(epoch)
        size = self.batch * self.accumulation
        for at in range(0, len(bins), size):
            group = bins[at : at + size]
            width = self.width(group)
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
