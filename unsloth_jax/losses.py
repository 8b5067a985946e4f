"""Loss functions: per-token log-probabilities in, undivided sums out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import cross_entropy
from unsloth_jax import leaves
from unsloth_jax.dims import Params, Total

CHUNK = cross_entropy.CHUNK


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Params,
    targets: Int[Array, "B T"],
    chunk: int = CHUNK,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """log p(target) of each token, float32, never holding more than `chunk` rows of scores.

    Tokens of weight 0 may be left out; then they hold 0. The gradient reaches the hidden states
    and the head alike.
    """
    batch, length, width = hidden.shape
    x, y = hidden.reshape(-1, width), targets.reshape(-1)
    if isinstance(head["weight"], jax.Array) and "bias" not in head:
        wanted = None if weights is None else weights.reshape(-1) != 0
        rule = cross_entropy.Rule(chunk)
        logps = cross_entropy.token_logprobs(x, head["weight"], y, wanted, rule).logps
    else:
        logps = _recomputed(x, head, y, chunk)
    return logps.reshape(batch, length)


def _recomputed(x: Array, head: Params, y: Array, chunk: int) -> Array:
    """`token_logprobs` [N] under a head of any kind, by computing each chunk again backward."""
    rows = x.shape[0]
    chunk = min(chunk, rows)
    pad = -rows % chunk

    @jax.checkpoint
    def one(head: Any, x: Array, y: Array) -> Array:
        scores = leaves.scores(head, x)
        picked = jnp.take_along_axis(scores, y[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(scores, axis=-1)

    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, chunk, x.shape[1])
    y = jnp.pad(y, (0, pad)).reshape(-1, chunk)
    return jax.lax.map(lambda xy: one(head, *xy), (x, y)).reshape(-1)[:rows]


def sft(logps: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Total:
    """Cross entropy in nats, summed over the tokens with weight."""
    return Total(-(logps * weights).sum(), weights.sum())
