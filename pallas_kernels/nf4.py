"""NF4 on raw arrays: 4-bit codes in blocks of a flattened weight, and products with them.

    w[k] = CODES[code[k]] * absmax[k // block]                      in float32, then cast once
    absmax[i] = nested_map[codes8[i]] * nested_absmax[i // nested_block] + offset
    y = x @ w.T,  dx = dy @ w

QLoRA (arXiv:2305.14314); bytes and arithmetic are those of bitsandbytes 0.50: the first of two
codes lies in the high nibble and k runs over [O, I] row by row, so that blocks may straddle rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 64
NESTED_BLOCK = 256
CODES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32)  # fmt: skip
THRESHOLDS = ((CODES[1:].astype(np.float64) + CODES[:-1]) / 2).astype(np.float32)
SMALLEST = np.finfo(np.float32).tiny  # XLA on CPUs takes anything below for zero
LARGEST = np.finfo(np.float32).max


class Layout(NamedTuple):
    """What the bytes don't say: the weight's two sides, block lengths, dtype when dequantized."""

    matrix: tuple[int, int]
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK
    dtype: str = "bfloat16"


class Statistics(NamedTuple):
    """The scale of each block: float32, or 8-bit codes with what turns them into float32."""

    absmax: Array  # float32 [blocks], or uint8 [blocks] where the others are given
    nested_absmax: Array | None = None  # float32 [ceil(blocks / nested_block)]
    nested_map: Array | None = None  # float32 [256], sorted
    offset: Array | None = None  # float32 []


def dequantize(layout: Layout, packed: UInt8[Array, "..."], statistics: Statistics) -> Array:
    """The weight [O, I] in `layout.dtype`, bit for bit what bitsandbytes makes of these bytes."""
    size = layout.matrix[0] * layout.matrix[1]
    scale = statistics.absmax
    if statistics.nested_absmax is not None:
        scale = unnest(statistics, layout.nested_block)
    pairs = packed.reshape(-1)
    pairs = jnp.pad(pairs, (0, scale.shape[0] * layout.block // 2 - pairs.shape[0]))
    pairs = pairs.reshape(-1, layout.block // 2)
    # Scaled and cast before they are interleaved: the loops stay vectorised, without a wide copy.
    high, low = (
        (_look_up(CODES, code) * scale[:, None]).astype(layout.dtype)
        for code in (pairs >> 4, pairs & 15)
    )
    return jnp.stack([high, low], axis=-1).reshape(-1)[:size].reshape(layout.matrix)


def unnest(statistics: Statistics, nested_block: int = NESTED_BLOCK) -> Float[Array, " blocks"]:
    """float32 scales of blocks from their 8-bit codes."""
    codes, nested_absmax, nested_map, offset = statistics
    wide = jnp.broadcast_to(nested_absmax[:, None], (nested_absmax.shape[0], nested_block))
    product = _look_up(nested_map, codes) * wide.reshape(-1)[: codes.shape[0]]
    # The clamp never acts. Without it compilers contract product and sum into one rounding.
    return jnp.clip(product, -LARGEST, LARGEST) + offset


def _look_up(table, codes):
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(
    layout: Layout, x: Float[Array, "*B I"], packed: UInt8[Array, "..."], statistics: Statistics
) -> Float[Array, "*B O"]:
    """x @ w.T in x's dtype, summed in float32; only x has a gradient, dx = dy @ w.

    Backward dequantizes again: its residuals are the packed bytes and their statistics.
    """
    return _contract("...i,oi->...o", x, _whole(layout, packed, statistics))


def _whole(layout, packed, statistics):
    # XLA on CPUs would look each weight up while it packs the product's operand, twice as slow.
    return jax.lax.optimization_barrier(dequantize(layout, packed, statistics))


def _contract(axes, x, w):
    y = jnp.einsum(axes, x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _forward(layout, x, packed, statistics):
    return matmul(layout, x, packed, statistics), (packed, statistics)


def _backward(layout, saved, dy):
    # Tied to dy, else XLA may merge both dequantizations and keep the weight in between.
    (packed, statistics), dy = jax.lax.optimization_barrier((saved, dy))
    return _contract("...o,oi->...i", dy, _whole(layout, packed, statistics)), None, None


matmul.defvjp(_forward, _backward)


def quantize(
    w: Float[Array, "O I"], block: int = BLOCK
) -> tuple[UInt8[Array, " bytes"], Float[Array, " blocks"]]:
    """Packed codes [ceil(O I / 2)] and float32 scales [ceil(O I / block)] of a weight.

    Finite weights only; a block of none above 1.2e-38 counts as zeros. A short last block is
    multiplied like the others (bitsandbytes' CPU road divides there: a code on a threshold may
    differ), and a GPU's reciprocal may be an ulp off (some 2 in 1e8 codes of float32 weights).
    """
    size = w.shape[0] * w.shape[1]
    blocks = jnp.pad(w.reshape(-1), (0, -size % block)).reshape(-1, block)
    absmax = _largest(blocks)
    factor = (1 / jnp.where(absmax < SMALLEST, 1, absmax))[:, None]
    # Halves are taken before the codes are found, so that this loop is vectorised too.
    high, low = (_nearest(blocks[:, side::2].astype(jnp.float32) * factor) for side in (0, 1))
    return (high << 4 | low).reshape(-1)[: -(-size // 2)], absmax


def _largest(blocks):
    """float32 largest magnitude of each row, by halving: XLA on CPUs widens what it reduces."""
    top = jnp.abs(blocks.astype(jnp.float32))
    while top.shape[-1] > 1:
        half = top.shape[-1] // 2
        top = jnp.maximum(top[:, :half], top[:, half:])
    return top[:, 0]


def _nearest(unit):
    """Codes of values in [-1, 1]: the nearest in CODES, in a tie the lower."""
    return sum((unit > edge).astype(jnp.uint8) for edge in THRESHOLDS)


def nest(
    absmax: Float[Array, " blocks"],
    nested_block: int = NESTED_BLOCK,
    offset: Float[Array, ""] | None = None,
) -> Statistics:
    """8-bit statistics of float32 scales: their mean is taken off, the rest coded by nearest."""
    count = absmax.shape[0]
    fill = -count % nested_block
    if offset is None:
        offset = jnp.pad(absmax, (0, fill)).reshape(-1, nested_block).sum(-1).sum() / count
    rest = jnp.pad(absmax - offset, (0, fill)).reshape(-1, nested_block)
    nested_absmax = jnp.abs(rest).max(-1)
    factor = 1 / jnp.where(nested_absmax < SMALLEST, 1, nested_absmax)
    unit = jnp.clip(rest * factor[:, None], -1, 1).reshape(-1)[:count]
    table = jnp.asarray(dynamic_map())
    upper = jnp.clip(jnp.searchsorted(table, unit), 1, table.size - 1)
    lower_is_nearer = unit - table[upper - 1] < table[upper] - unit
    codes = (upper - lower_is_nearer).astype(jnp.uint8)
    return Statistics(codes, nested_absmax, table, offset)


def dynamic_map() -> Float[np.ndarray, "256"]:
    """The signed 8-bit dynamic code (arXiv:1511.04561): 7 decades of 2^i values each, 0 and 1."""
    values = [np.zeros(1), np.ones(1)]
    for i in range(7):
        edges = _linspace(2**i + 1)
        middle = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [middle, -middle]
    return np.sort(np.concatenate(values).astype(np.float32))


def _linspace(count):
    """0.1 to 1 as torch rounds it: each half is counted from its own end, multiply-add fused."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    up, down = np.float64(first) + step * i, np.float64(last) - step * i[::-1]
    return np.where(i < count // 2, up, down).astype(np.float32)
