"""How a step's completions lie in rows: those of one prompt behind it, as many as fit in memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unsloth_jax import data
from unsloth_jax.data import STEP
from unsloth_jax.dims import Batch, Shared

# Of the most tokens: what widths are rounded up to, so that few shapes are compiled.
OF_PROMPT, OF_ROW, OF_ALL = 4, 8, 16


@dataclass(frozen=True)
class Layout:
    """The rows of `prompts` prompts with `group` completions each, at most `batch` at a time.

    With `apart` a row has one completion, since not even a prompt's tokens are alike in two.
    """

    prompts: int
    group: int
    batch: int
    longest: tuple[int, int]  # the most tokens of a prompt and of a completion
    limit: int  # tokens that a prompt may have with one completion
    apart: bool = False

    @property
    def parts(self) -> int:
        """Rows that one prompt's completions take."""
        return self.group if self.apart else math.ceil(self.group / min(self.batch, self.group))

    @property
    def together(self) -> int:
        """Completions of a row; the last of a prompt's may have fewer."""
        return math.ceil(self.group / self.parts)

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return min(max(1, self.batch // self.together), self.prompts * self.parts)

    @property
    def accumulation(self) -> int:
        return math.ceil(self.prompts * self.parts / self.rows)

    @property
    def most(self) -> tuple[int, int, int]:
        """The most tokens for a prompt, behind it, and of one completion with its prompt."""
        prompt, completion = self.longest
        wanted = prompt, self.together * completion, prompt + completion
        prompt, behind, whole = (data.rounded(n, STEP) for n in wanted)
        return prompt, behind, min(self.limit, whole)

    @property
    def widest(self) -> int:
        """Tokens of the longest row."""
        return sum(self.most[:2])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What `grpo_objective.grpo` asks for."""
        return self.together, *self.most[1:]

    def _members(self) -> list[list[int]]:
        """Numbers of the completions of each row."""
        starts = range(0, self.group, self.together)
        spans = [(at, min(at + self.together, self.group)) for at in starts]
        groups = [n * self.group for n in range(self.prompts)]
        return [list(range(first + a, first + b)) for first in groups for a, b in spans]

    def _widths(self, prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[int, int, int]:
        each = [len(prompts[n // self.group]) + len(one) for n, one in enumerate(completions)]
        if max(each) > self.limit:
            raise ValueError(f"a row has {max(each)} tokens, the limit is {self.limit}")
        behind = max(sum(len(completions[n]) for n in row) for row in self._members())
        wanted = max(map(len, prompts)), behind, max(each)
        parts = OF_PROMPT, OF_ALL, OF_ROW
        prompt, behind, whole = map(_width, wanted, self.most, parts)
        return prompt, behind, min(whole, self.limit)

    def laid(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        of_tokens: Mapping[str, Sequence[Sequence[float]]],
        of_completions: Mapping[str, Any],
    ) -> Batch:
        """One optimizer step; empty completions and rows fill its last micro-batch.

        `masks` has 1 for each token that is learnt from, `of_tokens` and `of_completions` what
        stands in `beside`, one entry a completion. Raises ValueError for one beyond the limit.
        """
        start, behind, whole = self._widths(prompts, completions)
        lead = self.accumulation * self.rows
        empty = lambda *shape: np.zeros((lead, *shape), np.int32)
        tokens, positions, segments = (empty(start + behind) for _ in range(3))
        weights = empty(start + behind).astype(np.float32)
        places, owners = empty(self.together, whole) - 1, empty(behind) - 1
        numbers = {name: np.zeros((lead, behind), np.float32) for name in of_tokens}
        each = {name: np.zeros((lead, self.together), np.float32) for name in of_completions}
        for r, members in enumerate(self._members()):
            prompt = prompts[members[0] // self.group]
            at, size = start, len(prompt)
            first = slice(start - size, start)
            tokens[r, first], positions[r, first], segments[r, first] = prompt, np.arange(size), 1
            for j, n in enumerate(members):
                here = slice(at, at + len(completions[n]))
                tokens[r, here], weights[r, here] = completions[n], masks[n]
                positions[r, here] = size + np.arange(len(completions[n]))
                segments[r, here], owners[r, at - start : here.stop - start] = j + 2, j
                places[r, j, :size] = np.arange(start - size, start)
                places[r, j, size : size + len(completions[n])] = np.arange(at, here.stop)
                for name, values in of_tokens.items():
                    numbers[name][r, at - start : here.stop - start] = values[n]
                for name, values in of_completions.items():
                    each[name][r, j] = values[n]
                at = here.stop
        micro = lambda x: x.reshape(self.accumulation, self.rows, *x.shape[1:])
        rows = map(micro, (tokens, tokens, weights, positions, segments))
        beside = {name: micro(x) for name, x in (numbers | each).items()}
        return Batch(*rows, beside=beside, shared=Shared(micro(places), micro(owners)))


def _width(tokens: int, most: int, parts: int) -> int:
    """The tokens rounded up to a part of the most, and to STEP; beyond the most to STEP alone."""
    part = data.rounded(math.ceil(most / parts), STEP)
    return data.rounded(tokens, STEP) if tokens > most else min(most, data.rounded(tokens, part))
