"""Preference rows as the batches of optimizer steps; what belongs together stays in one batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from unsloth_jax import data
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch
from workflows.batching import Batches
from workflows.pairs import Judged, Pair


@dataclass(frozen=True)
class PairBatches(Batches):
    """[accumulation, batch, length] arrays of whole answers: chosen rows, then rejected ones.

    `batch` counts rows, two a pair. A last, partial step is filled up with empty rows.
    """

    rows: Sequence[Any]

    @property
    def items(self) -> int:
        """Pairs of a micro-batch."""
        return self.batch // 2

    @property
    def widest(self) -> int:
        return data.bucket((side for pair in self.rows for side in pair[:2]), self.length)

    def steps(self, epoch: int) -> int:
        return math.ceil(len(self.rows) / (self.items * self.accumulation))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        rows = self.rows
        if self.seed is not None:
            rows = data.shuffled(rows, self.seed, epoch)
        size = self.items * self.accumulation
        for at in range(0, len(rows), size):
            yield self.step(rows[at : at + size])

    def step(self, pairs: Sequence[Pair]) -> Batch:
        """The batch of one step's pairs, with their `reference` if all have one."""
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        known = [pair.reference for pair in pairs if pair.reference is not None]
        if len(known) < len(pairs):
            return self._laid(sides)
        columns = zip(*known, strict=True)
        reference = np.concatenate([self._split(column) for column in columns], 1)
        return self._laid(sides)._replace(beside={"reference": reference})

    def _laid(self, sides: Sequence[Sequence[Row]]) -> Batch:
        """Micro-batches in which each side's rows stand together."""
        width = data.bucket((row for side in sides for row in side), self.length)
        micro = []
        for at in range(0, self.items * self.accumulation, self.items):
            parts = [side[at : at + self.items] for side in sides]
            bins = [[[row] for row in p] + [[]] * (self.items - len(p)) for p in parts]
            micro.append(data.collate([b for side in bins for b in side], self.batch, width))
        return data.stacked(micro)

    def _split(self, numbers: Sequence[float | bool]) -> np.ndarray:
        """One number an item as [accumulation, items], 0 where there is none."""
        whole = np.zeros(self.items * self.accumulation, np.float32)
        whole[: len(numbers)] = numbers
        return whole.reshape(self.accumulation, self.items)


@dataclass(frozen=True)
class JudgedBatches(PairBatches):
    """Answers with a verdict; `turned` adds each prompt with the answer of the row before it in
    its step, from which KTO's KL is estimated.
    """

    turned: bool = True

    @property
    def items(self) -> int:
        return self.batch // 2 if self.turned else self.batch

    @property
    def widest(self) -> int:
        answers = [one.answer for one in self.rows]
        if not self.turned:
            return data.bucket(answers, self.length)
        prompts = [row.mask.index(1) for row in answers]
        longest = max(prompts) + max(
            len(row.tokens) - at for row, at in zip(answers, prompts, strict=True)
        )
        return min(self.length, -(-longest // data.STEP) * data.STEP)

    def step(self, judged: Sequence[Judged]) -> Batch:
        """The batch of one step's answers, `beside` says which are desirable."""
        answers = [one.answer for one in judged]
        sides = [answers, turned(answers, self.length)] if self.turned else [answers]
        desirable = self._split([one.desirable for one in judged]) > 0
        return self._laid(sides)._replace(beside={"desirable": desirable})


def turned(answers: Sequence[Row], length: int) -> list[Row]:
    """Each row's prompt with the answer of the row before it, the first with the last one's."""
    out = []
    for row, other in zip(answers, [*answers[-1:], *answers[:-1]], strict=True):
        start, begins = row.mask.index(1), other.mask.index(1)
        tokens = row.tokens[:start] + other.tokens[begins:]
        mask = [0] * start + other.mask[begins:]
        out.append(Row(tokens[:length], mask[:length]))
    return out


def between(batch: Batch, start: int, end: int) -> Batch:
    """Rows `start` to `end` of one micro-batch; the key and `beside` stay."""
    whole = batch._replace(key=None, beside=None)
    cut = jax.tree.map(lambda x: x[start:end], whole)
    return cut._replace(key=batch.key, beside=batch.beside)
