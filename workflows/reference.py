"""The reference policy: the base with the adapters as they stood when the trainer was made."""

from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import Array

from unsloth_jax import decoder, lora, losses, preference, remat
from unsloth_jax.dims import Batch, Params
from workflows.model import Model
from workflows.objective import embedded
from workflows.run import short_hash

BASE = "the base"  # what a reference without adapters of its own is called in checkpoints


class Reference:
    """Log-probabilities of whole answers under the frozen policy.

    It keeps the small tree of adapters alone, and none where they change nothing yet. One program
    finds them for a step's batch before the step: so the step's own program and memory plan are
    those of training, and what is known beforehand takes the same road.
    """

    def __init__(self, model: Model):
        self.model = model
        self.start = model.adapters if changes(model.adapters) else None
        self._program = jax.jit(answers_of_each(model.family, model.config, model.scale))

    @property
    def name(self) -> str:
        """What tells references of one base apart."""
        return BASE if self.start is None else short_hash(self.start)

    def __call__(self, batch: Batch) -> Array:
        """float32 sums [M, B] over each row's answer, of micro-batches [M, B, T]."""
        whole = embedded(self.model.params, batch)._replace(beside=None, key=None)
        return self._program(self.start, self.model.params, whole)


def changes(adapters: Params) -> bool:
    """Whether adapters change what the base says: a fresh pair's `b` is zero."""
    own, whole = lora.parts(adapters)
    plain = all(path.endswith((".a", ".b")) for path in own)
    return (
        bool(whole)
        or not plain
        or any(np.asarray(x).any() for p, x in own.items() if p.endswith(".b"))
    )


def answers_of_each(family: ModuleType, c: Any, scale: float):
    """fn(adapters or None, frozen, micro-batches) -> sums [M, B] over the supervised tokens."""
    logps = token_logps(family, c, scale)

    def one(adapters: Params | None, frozen: Params, b: Batch) -> Array:
        return whole_answers(logps(adapters, frozen, b, b.weights), b.weights)[0]

    return lambda adapters, frozen, batches: jax.lax.map(
        lambda b: one(adapters, frozen, b), batches
    )


def token_logps(
    family: ModuleType,
    c: Any,
    scale: float,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = 1,
):
    """fn(adapters or None, frozen, batch, weights) -> log p of each target with weight [B, T]."""

    def fn(adapters: Params | None, frozen: Params, b: Batch, weights: Array) -> Array:
        params = frozen if adapters is None else lora.attach(frozen, adapters, scale)
        hidden = decoder.forward(
            family, c, params, b.tokens, b.positions, b.segments, memory, documents, b.embedded
        )
        return losses.token_logprobs(
            hidden,
            family.head(c, params),
            b.targets,
            memory.chunk,
            weights,
            scores=family.scores(c),
        )

    return fn


def whole_answers(logps: Array, weights: Array) -> tuple[Array, Array]:
    """Sum and number of the supervised tokens of each row, of [B, T]."""
    rows = logps.shape[0]
    owners = jax.lax.broadcasted_iota(np.int32, logps.shape, 0)
    return preference.summed(logps, weights, owners, rows)
