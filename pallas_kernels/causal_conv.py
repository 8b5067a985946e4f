"""A convolution along time, each channel by itself, that sees the past of its document only.

    y[b, t, c] = bias[c] + sum_i w[c, 0, i] x[b, t - (taps - 1) + i, c]

Terms from before the start of t's document are left out. `w` is torch's `Conv1d.weight` with as
many groups as channels. Sums are float32.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def convolve(
    x: Float[Array, "B T C"],
    w: Float[Array, "C 1 taps"],
    bias: Float[Array, " C"] | None,
    starts: Bool[Array, "B T"],
) -> Float[Array, "B T C"]:
    """In x's dtype."""
    document = jnp.cumsum(starts, axis=1, dtype=jnp.int32) + 1
    taps, length = w.shape[-1], x.shape[1]
    later = lambda a, n: jnp.pad(a, ((0, 0), (n, 0)) + ((0, 0),) * (a.ndim - 2))[:, :length]
    y = jnp.zeros(x.shape, jnp.float32)
    for back in range(taps):
        same = (later(document, back) == document)[..., None]
        y = y + jnp.where(same, later(x, back), 0).astype(jnp.float32) * _tap(w, taps - 1 - back)
    return _finished(y, bias, x)


def step(
    x: Float[Array, "B C"],
    w: Float[Array, "C 1 taps"],
    bias: Float[Array, " C"] | None,
    tail: Float[Array, "B past C"],
) -> tuple[Float[Array, "B C"], Float[Array, "B past C"]]:
    """One token a row, and the `tail` after it: the last taps - 1 inputs of its document."""
    seen = jnp.concatenate([tail.astype(x.dtype), x[:, None]], axis=1)
    taps = w[:, 0].T[None].astype(jnp.float32)
    y = (seen.astype(jnp.float32) * taps).sum(1)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    return y.astype(x.dtype), seen[:, 1:].astype(tail.dtype)


def _tap(w, i):
    return w[:, 0, i].astype(jnp.float32)[None, None]


def _finished(y, bias, x):
    y = y if bias is None else y + bias.astype(jnp.float32)[None, None]
    return y.astype(x.dtype)
