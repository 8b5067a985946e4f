"""One step of Adam on one array, whose two moments are kept in 8 bits.

    m' = b1 m + (1 - b1) g        v' = b2 v + (1 - b2) g^2
    out = m' / (1 - b1^n) / (sqrt(v' / (1 - b2^n)) + eps)

m and v are codes of a 256-entry map and one float32 maximum for every 256 elements of the
flattened array. The map is dynamic (arXiv:2110.02861): seven decades below 1, each in twice as
many equal cells as the decade below it, and the exact values 0 and 1. It has no gradient.

The kernel (Pallas, Triton) reads and writes everything once. What codes stand for is looked up.
New codes need no search: count levels so that decades begin at powers of two (from 1 on in the
signed map, from 2 in the other). Then levels begin on seven lines of falling slope over |x|, and
the least of the seven, y, rounded down is x's level. Only a decade's first level begins later,
0.2 past its power of two p, halfway between two values with different steps around them; up to
there 2 y - p - 0.4 is less than y.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import _choice

Implementation = Literal["pallas", "xla"]
BLOCK = 256
ROWS, WARPS = 8, 4  # blocks of one program
LATE = 0.2  # of a level: how far past its power of two a decade's first level begins
EXPONENT = 0x7F800000  # float32's, alone: the power of two below a number
NORMAL = float(np.finfo(np.float32).tiny)  # maxima below have no reciprocal


class Moment(NamedTuple):
    """8 bits an element; each 256 elements of the flattened array share a maximum."""

    codes: Any  # uint8, the array's shape
    absmax: Any  # float32 [N], N = elements / 256, rounded up


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


class Rates(NamedTuple):
    """What is static in a step."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


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


def quantize(x: Float[Array, "*any"], table: Map) -> Moment:
    """The nearest code of every x / absmax; in a signed map a negative x has a negative code."""
    rows = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(rows), axis=1)
    scaled = jnp.abs(x) * _spread(_reciprocal(absmax), x.shape)
    level = jnp.zeros_like(x)
    for d in table.decades:
        # A decade's last level reaches up to the next edge, past its own half step.
        on_line = jnp.minimum(scaled * (1 / d.step) + (0.5 - d.shift), d.last + 0.5)
        level = jnp.where(scaled > d.edge, on_line, level)
    level = jnp.floor(level)
    below = table.zero - jnp.clip(level, 1, table.zero) if table.zero else level
    codes = jnp.where(x < 0, below, table.zero + level)
    return Moment(codes.astype(jnp.uint8), absmax)


def dequantize(moment: Moment, table: Map) -> Float[Array, "*any"]:
    """What the codes stand for (to float32's rounding), times their block's maximum.

    Lines, not a table of 256 values: XLA would write what it looks up to memory, in float32.
    """
    signed = moment.codes.astype(jnp.float32) - table.zero
    level, size = jnp.abs(signed), jnp.zeros_like(signed)
    for d in table.decades:
        size = jnp.where(level >= d.first, (level + d.shift) * d.step, size)
    return jnp.sign(signed) * size * _spread(moment.absmax, signed.shape)


def reference(
    rates: Rates, g: Float[Array, "*any"], mu: Moment, nu: Moment, unbias: Float[Array, "2"]
) -> tuple[Float[Array, "*any"], Moment, Moment]:
    """`update` in plain jax.numpy."""
    out, m, v = adam(rates, g, dequantize(mu, SIGNED), dequantize(nu, UNSIGNED), *unbias)
    return out, quantize(m, SIGNED), quantize(v, UNSIGNED)


def adam(rates: Rates, g: Array, m: Array, v: Array, first: Array, second: Array) -> tuple:
    """(out, new m, new v) from float32 moments; `first` and `second` are those of `unbias`."""
    m = rates.b1 * m + (1 - rates.b1) * g
    v = rates.b2 * v + (1 - rates.b2) * g * g
    return m * first / (jnp.sqrt(v) * second + rates.eps), m, v


def supports(g: Any) -> str | None:
    """Why the kernel can't run on a gradient like this, or None."""
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if old := _choice.older(8.0):
        return old
    if g.dtype != jnp.float32:
        return f"it takes a float32 gradient, not {g.dtype}"
    if g.size >= 2**31:
        return f"a gradient {g.shape} passes 2^31 elements and is indexed in 32 bits"
    return None


def update(
    rates: Rates,
    g: Float[Array, "*any"],
    mu: Moment,
    nu: Moment,
    unbias: Float[Array, "2"],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*any"], Moment, Moment]:
    """(Adam's direction, new first moment, new second one) of one array.

    `unbias` holds 1 / (1 - b1^n) and 1 / sqrt(1 - b2^n). The direction is made of the moments
    before they are rounded. Raises ValueError with the reason where the implementation asked for
    can't run.
    """
    reasons = {"pallas": supports(g), "xla": None}
    if _choice.pick("8-bit Adam", implementation, reasons) == "xla":
        return reference(rates, g, mu, nu, unbias)
    return _pallas(rates, g, mu, nu, unbias)


def _spread(absmax: Float[Array, " N"], shape: tuple[int, ...]) -> Array:
    """Every element's own maximum, in the array's shape."""
    rows = jnp.broadcast_to(absmax[:, None], (absmax.size, BLOCK))
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def _reciprocal(absmax: Array) -> Array:
    """Of what is too small to have one, 0: such a block's codes are those of zeros."""
    there = absmax >= NORMAL
    return jnp.where(there, 1 / jnp.where(there, absmax, 1.0), 0.0)


def _pallas(rates, g, mu, nu, unbias, rows=ROWS, warps=WARPS):
    size, blocks = g.size, mu.absmax.size
    codes = jax.ShapeDtypeStruct((size,), jnp.uint8)
    maxima = jax.ShapeDtypeStruct((blocks,), jnp.float32)
    values = [jnp.asarray(_values(table)) for table in (SIGNED, UNSIGNED)]
    # Not in place: a step that isn't finite goes back to the old codes, which would be copied.
    out, *new = pl.pallas_call(
        partial(_kernel, rates, rows, size),
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.float32), codes, maxima, codes, maxima],
        grid=(pl.cdiv(blocks, rows),),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=_choice.interpreting(),
        name="adam8_update",
    )(*(x.reshape(-1) for x in (unbias, *values, g, *mu, *nu)))
    mu, nu = (Moment(new[i].reshape(g.shape), new[i + 1]) for i in (0, 2))
    return out.reshape(g.shape), mu, nu


def _values(table):
    """What the codes stand for where the maximum is 1, rounded as `dequantize` rounds it."""
    signed = np.arange(256, dtype=np.float32) - np.float32(table.zero)
    level, size = np.abs(signed), np.zeros(256, np.float32)
    for d in table.decades:
        on_line = (level + np.float32(d.shift)) * np.float32(d.step)
        size = np.where(level >= d.first, on_line, size)
    return np.sign(signed) * size


def _kernel(rates, rows, size, unbias_ref, signed_ref, unsigned_ref, g_ref, *refs):
    *old, out_ref, m_ref, m_max_ref, v_ref, v_max_ref = refs
    block = pl.program_id(0) * rows + jnp.arange(rows)
    at = block[:, None] * BLOCK + jnp.arange(BLOCK)[None]
    whole = size % (rows * BLOCK) == 0
    inside, there = (None, None) if whole else (at < size, block * BLOCK < size)
    load = lambda ref, at, mask: plgpu.load(ref.at[at], mask=mask, other=None if whole else 0)

    def moment(codes_ref, absmax_ref, values_ref):
        values = values_ref[load(codes_ref, at, inside).astype(jnp.int32)]
        return values * load(absmax_ref, block, there)[:, None]

    m, v = moment(*old[:2], signed_ref), moment(*old[2:], unsigned_ref)
    out, m, v = adam(rates, load(g_ref, at, inside), m, v, unbias_ref[0], unbias_ref[1])
    plgpu.store(out_ref.at[at], out, mask=inside)
    for x, table, codes_ref, absmax_ref in (
        (m, SIGNED, m_ref, m_max_ref),
        (v, UNSIGNED, v_ref, v_max_ref),
    ):
        x = x if whole else jnp.where(inside, x, 0.0)
        absmax = jnp.max(jnp.abs(x), axis=1)
        codes = _codes(x * _reciprocal(absmax)[:, None], table)
        plgpu.store(codes_ref.at[at], codes, mask=inside)
        plgpu.store(absmax_ref.at[block], absmax, mask=there)


def _codes(x, table):
    """`quantize`'s codes of x in [-1, 1], by the curve that the file's docstring describes."""
    first, top = table.decades[0], table.decades[-1]
    lift = first.last - first.first  # the curve counts from a power of two
    # The first cell is cut at half its value, so its line is one of its own.
    slope = (1 - LATE) / (first.step * (first.first + first.shift + 0.5) - first.edge)
    lines = [(slope, first.last + LATE - slope * first.edge)]
    lines += [(1 / d.step, lift + 0.5 - d.shift) for d in table.decades[1:-1]]
    size = jnp.abs(x)
    level = size * lines[0][0] + lines[0][1]
    for slope, offset in lines[1:]:
        level = jnp.minimum(level, size * slope + offset)
    bits = jax.lax.bitcast_convert_type(level, jnp.int32) & EXPONENT
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    level = jnp.minimum(level, 2 * level - (power + 2 * LATE))
    # 1 alone begins a quarter of a cell early. A steep line; only the signed map's 1 has no twin.
    steep = 0.5 / (1 - top.edge)
    level = jnp.maximum(level, x * steep + (lift + top.first - steep * top.edge))
    if table.zero:
        level = jnp.where(x < 0, -jnp.maximum(level, 1.0), level)
    return (level.astype(jnp.int32) + (table.zero - lift)).astype(jnp.uint8)
