"""Loss functions: per-token log-probabilities in, undivided sums out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unsloth_jax import leaves
from unsloth_jax.dims import Params, Total

CHUNK = 1024


def token_logprobs(
    hidden: Float[Array, "B T D"], head: Params, targets: Int[Array, "B T"], chunk: int = CHUNK
) -> Float[Array, "B T"]:
    """log p(target) of each token, float32, never holding more than `chunk` rows of scores.

    The gradient reaches the hidden states and the head alike: each chunk is recomputed.
    """
    batch, length, width = hidden.shape
    rows = batch * length
    chunk = min(chunk, rows)
    pad = -rows % chunk
    x = jnp.pad(hidden.reshape(rows, width), ((0, pad), (0, 0))).reshape(-1, chunk, width)
    y = jnp.pad(targets.reshape(rows), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def one(head: Any, x: Array, y: Array) -> Array:
        scores = leaves.scores(head, x)
        picked = jnp.take_along_axis(scores, y[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(scores, axis=-1)

    logps = jax.lax.map(lambda xy: one(head, *xy), (x, y))
    return logps.reshape(-1)[:rows].reshape(batch, length)


def sft(logps: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Total:
    """Cross entropy in nats, summed over the tokens with weight."""
    return Total(-(logps * weights).sum(), weights.sum())
