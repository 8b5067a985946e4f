"""Adam whose moments are kept in 8 bits, block by block, as bitsandbytes keeps them.

The maps and one array's step are `pallas_kernels.adam8_update`'s; this is their optax face.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pallas_kernels import adam8_update
from pallas_kernels.adam8_update import BLOCK, Moment, Rates

SMALLEST = 4096  # a leaf with fewer elements keeps float32 moments


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """optax's `scale_by_adam` with moments of leaves of 4096 elements and more as `Moment`.

    The moments that a step uses are the float32 ones, before they are rounded.
    """
    rates = Rates(b1, b2, eps)

    def init(params):
        zeros = lambda: jax.tree.map(_no_moment, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        first, second = 1 / _reached(b1, count), 1 / jnp.sqrt(_reached(b2, count))
        unbias = jnp.stack([first, second])

        def one(grad, mu, nu):
            g = jnp.asarray(grad, jnp.float32)
            if isinstance(mu, Moment):
                out, *new = adam8_update.update(rates, g, mu, nu, unbias)
            else:
                out, *new = adam8_update.adam(rates, g, mu, nu, first, second)
            return out.astype(grad.dtype), *new

        leaves, tree = jax.tree.flatten(grads)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        done = [one(*leaf) for leaf in zip(leaves, *moments, strict=True)]
        updates, mu, nu = (tree.unflatten([leaf[i] for leaf in done]) for i in range(3))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _no_moment(leaf: Any) -> Any:
    if leaf.size < SMALLEST:
        return jnp.zeros(leaf.shape, jnp.float32)
    maxima = jnp.zeros(-(-leaf.size // BLOCK), jnp.float32)
    return Moment(jnp.zeros(leaf.shape, jnp.uint8), maxima)


def _reached(decay: float, count: Array) -> Array:
    """1 - decay**count; the plain difference is off by 1e-5 of itself at 0.999 and count 1."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))
