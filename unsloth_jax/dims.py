"""Axis letters and shared array types.

B batch   T query tokens   S key tokens   D model width   F mlp width   V vocabulary
H query heads   K key/value heads   h head width   u width of a head's values   L layers
r LoRA rank   N rows (B*T)   E experts   O, I the two sides of a weight [out, in]   M micro-batches
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

Params = dict[str, Any]  # nested dict of leaves: arrays, quantized weights, Lora and Stacks nodes
# Name of a tensor -> (its shape, what makes it of a weight).
Parts = dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]


class Shared(NamedTuple):
    """Where completions lie that follow their one prompt in a row (`shared_prompts`).

    k completions a row, whose own rows, prompt first, have S tokens; C tokens behind the prompt.
    """

    places: Int[Array, "*M B k S"]  # of each token of the own rows in its row; -1 where none is
    owners: Int[Array, "*M B C"]  # number in its row of each token's completion; -1 for padding


class Batch(NamedTuple):
    """One device batch. Padding has segment 0; `weights` is 1 where the target counts.

    `embedded` holds the tokens' rows where the embedding table stays in host memory; `key` is a
    random key's data (`jax.random.key_data`) where training draws noise, None in evaluation.
    `beside` holds what a loss reads of whole answers or of the whole step, by name. With `shared`
    prompts a completion's `targets` and `weights` stand where the tokens themselves do.
    """

    tokens: Int[Array, "*M B T"]
    targets: Int[Array, "*M B T"]
    weights: Float[Array, "*M B T"]
    positions: Int[Array, "*M B T"]
    segments: Int[Array, "*M B T"]
    embedded: Float[Array, "*M B T D"] | None = None
    key: UInt32[Array, "*M 2"] | None = None
    beside: dict[str, Array] | None = None
    shared: Shared | None = None


class Scores(NamedTuple):
    """What is done to a head's scores: their factor, then c tanh(s / c) (arXiv:2408.00118)."""

    scale: float = 1.0
    cap: float | None = None


PLAIN = Scores()


class Total(NamedTuple):
    """A sum that has not been divided yet, so that accumulation over batches stays exact.

    Of `statistics` the value may be one of several numbers.
    """

    value: Float[Array, "..."]
    count: Float[Array, ""]

    def mean(self) -> Float[Array, "..."]:
        """value / count, and 0 where nothing was counted."""
        return self.value / jnp.where(self.count == 0, 1.0, self.count)


class Measured(NamedTuple):
    """A loss and what else is reported of its batch, sums by name."""

    total: Total
    metrics: dict[str, Total]


def measured(found: Total | Measured) -> Measured:
    """A loss function's result with its metrics, of which a bare `Total` has none."""
    return found if isinstance(found, Measured) else Measured(found, {})
