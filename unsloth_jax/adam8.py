"""Adam whose moments are kept in 8 bits, block by block, as bitsandbytes keeps them.

    m' = b1 m + (1 - b1) g        v' = b2 v + (1 - b2) g^2
    out = m' / (1 - b1^n) / (sqrt(v' / (1 - b2^n)) + eps)

Between steps m and v are codes of a 256-entry map and one float32 maximum for every 256 elements
of the flattened leaf. The map is dynamic (arXiv:2110.02861): seven decades below 1, each in twice
as many equal cells as the decade below it, and the exact values 0 and 1.
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

BLOCK = 256
SMALLEST = 4096  # a leaf with fewer elements keeps float32 moments


class Decade(NamedTuple):
    """Levels that lie on one line: from level `first` on, which begins at |x| = `edge`."""

    first: int
    last: int
    edge: float
    step: float  # |x| between neighbouring levels
    shift: float  # |x| = step * (level + shift) in a level's middle


class Map(NamedTuple):
    """A dynamic map; levels count from `zero`, the code of 0, upwards and downwards."""

    zero: int
    decades: tuple[Decade, ...]


@flax.struct.dataclass
class Blocks:
    """A leaf's moment in 8 bits; each 256 elements of the flattened leaf share a maximum."""

    codes: Any  # uint8, the leaf's shape
    absmax: Any  # float32 [N], N = elements / 256, rounded up


def dynamic_map(signed: bool) -> Map:
    """The map of the first moment (signed) or of the second; -1 is not in the signed one."""
    decades, first, below = [], 1, 0.0
    for n in range(7):
        count, unit = 2**n if signed else 2 ** (n + 1), 10.0 ** (n - 6)
        step, shift = 0.9 * unit / count, count / 9 + 0.5 - first
        edge = (below + step * (first + shift)) / 2
        decades.append(Decade(first, first + count - 1, edge, step, shift))
        first, below = first + count, unit - step / 2
    # 1 alone: a line of one level.
    decades.append(Decade(first, first, (below + 1) / 2, 1.0, 1.0 - first))
    return Map(127 if signed else 0, tuple(decades))


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def quantize(x: Float[Array, "*any"], table: Map) -> Blocks:
    """The nearest code of every x / absmax; in a signed map a negative x has a negative code."""
    rows = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(rows), axis=1)
    scaled = jnp.abs(x) / _spread(jnp.where(absmax > 0, absmax, 1.0), x.shape)
    level = jnp.zeros_like(x)
    for d in table.decades:
        # A decade's last level reaches up to the next edge, past its own half step.
        on_line = jnp.minimum(scaled * (1 / d.step) + (0.5 - d.shift), d.last + 0.5)
        level = jnp.where(scaled > d.edge, on_line, level)
    level = jnp.floor(level)
    below = table.zero - jnp.clip(level, 1, table.zero) if table.zero else level
    codes = jnp.where(x < 0, below, table.zero + level)
    return Blocks(codes.astype(jnp.uint8), absmax)


def dequantize(blocks: Blocks, table: Map) -> Float[Array, "*any"]:
    """What the codes stand for (to float32's rounding), times their block's maximum.

    Lines, not a table of 256 values: XLA would write what it looks up to memory, in float32.
    """
    signed = blocks.codes.astype(jnp.float32) - table.zero
    level, size = jnp.abs(signed), jnp.zeros_like(signed)
    for d in table.decades:
        size = jnp.where(level >= d.first, (level + d.shift) * d.step, size)
    return jnp.sign(signed) * size * _spread(blocks.absmax, signed.shape)


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """optax's `scale_by_adam` with moments of leaves of 4096 elements and more as `Blocks`.

    The moments that a step uses are the float32 ones, before they are rounded.
    """

    def init(params):
        zeros = lambda: jax.tree.map(_no_moment, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        fix1, fix2 = _reached(b1, count), _reached(b2, count)

        def one(grad, mu, nu):
            g = jnp.asarray(grad, jnp.float32)
            m = b1 * _read(mu, SIGNED) + (1 - b1) * g
            v = b2 * _read(nu, UNSIGNED) + (1 - b2) * g * g
            out = m / fix1 / (jnp.sqrt(v) / jnp.sqrt(fix2) + eps)
            return out.astype(grad.dtype), _kept(m, mu, SIGNED), _kept(v, nu, UNSIGNED)

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
    return Blocks(jnp.zeros(leaf.shape, jnp.uint8), maxima)


def _spread(absmax: Float[Array, " N"], shape: tuple[int, ...]) -> Array:
    """Every element's own maximum, in the leaf's shape."""
    rows = jnp.broadcast_to(absmax[:, None], (absmax.size, BLOCK))
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def _read(moment: Any, table: Map) -> Array:
    return dequantize(moment, table) if isinstance(moment, Blocks) else moment


def _kept(new: Array, old: Any, table: Map) -> Any:
    return quantize(new, table) if isinstance(old, Blocks) else new


def _reached(decay: float, count: Array) -> Array:
    """1 - decay**count; the plain difference is off by 1e-5 of itself at 0.999 and count 1."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))
