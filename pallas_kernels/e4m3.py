"""Rows of numbers in e4m3, with one scale a row of all arrays that are summed together.

    x_j[m] ~ s[m] x8_j[m],  s[m] = 2^k with 128 <= max_j |x_j[m]| / 2^k < 256

e4m3 (arXiv:2209.05433) is a floating format of 4 bits' precision from 2^-6 to 448: a nearer scale
would gain nothing, and a power of two rounds nothing, wherever it is applied. Arrays may be
multiplied by a factor a column before. There is no gradient. The kernel (Pallas, Triton) holds a
row in registers, so that it is read once; XLA reads it for its maximum and again for the cast.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import _choice

Implementation = Literal["pallas", "xla"]
E4M3 = jnp.float8_e4m3fn
SMALLEST = 2.0**-100  # rows of less become zeros
WIDEST = 2**16  # numbers of all rows that a program holds in registers
Factors = Sequence[Float[Array, " _"] | None]
Cast = tuple[list[Array], Float[Array, "M 1"], Float[Array, "M 1"]]


def power_of_two(top: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(2^k, 2^-k) in float32 with 128 <= top / 2^k < 256."""
    exponent = bits(jnp.where(top > SMALLEST, top, 1.0), jnp.int32) >> 23
    return bits(exponent - 7 << 23, jnp.float32), bits(261 - exponent << 23, jnp.float32)


def bits(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """x's bits as numbers of another dtype."""
    return jax.lax.bitcast_convert_type(x, dtype)


def reference(xs: Sequence[Float[Array, "M _"]], factors: Factors | None = None) -> Cast:
    """See `cast_rows`."""
    wide = [x.astype(jnp.float32) for x in xs]
    if factors is not None:
        wide = [x if f is None else x * f[None] for x, f in zip(wide, factors, strict=True)]
    tops = (jnp.abs(x).max(-1, keepdims=True) for x in wide)
    scale, inverse = power_of_two(functools.reduce(jnp.maximum, tops))
    return [(x * inverse).astype(E4M3) for x in wide], scale, inverse


def supports(xs: Sequence[Float[Array, "M _"]]) -> str | None:
    """Why the kernel can't run on these, or None."""
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if old := _choice.older(8.9):
        return old
    widths = [x.shape[1] for x in xs]
    if any(width % 16 for width in widths) or sum(widths) > WIDEST:
        return f"it takes widths of 16 n, {WIDEST} in all at most, got {widths}"
    return None


def cast_rows(
    xs: Sequence[Float[Array, "M _"]],
    factors: Factors | None = None,
    implementation: Implementation | None = None,
) -> Cast:
    """(e4m3 of each array times its factors, the scale of a row, the scale's inverse).

    Rows below 2^-100 become zeros. Raises ValueError with the reason where the implementation
    asked for can't run.
    """
    reasons = {"pallas": supports(xs), "xla": None}
    if _choice.pick("rows in e4m3", implementation, reasons) == "xla":
        return reference(xs, factors)
    return _pallas(xs, factors or [None] * len(xs))


def _pallas(xs, factors, warps=None):
    rows, widths = xs[0].shape[0], [x.shape[1] for x in xs]
    one = jax.ShapeDtypeStruct((rows,), jnp.float32)
    there = tuple(f is not None for f in factors)
    outs = pl.pallas_call(
        functools.partial(_kernel, widths, there),
        out_shape=(*(jax.ShapeDtypeStruct(x.shape, jnp.uint8) for x in xs), one, one),
        grid=(rows,),
        compiler_params=plgpu.CompilerParams(num_warps=warps or _warps(sum(widths)), num_stages=1),
        interpret=_choice.interpreting(),
        name="e4m3_rows",
    )(*xs, *(f for f in factors if f is not None))
    *x8s, scale, inverse = outs
    return [bits(x8, E4M3) for x8 in x8s], scale[:, None], inverse[:, None]


def _warps(total):
    """Of one program: some 32 numbers a thread, as far as threads go."""
    return min(32, max(4, 1 << (total // 1024 - 1).bit_length()))


def _kernel(widths, there, *refs):
    count, row = len(widths), pl.program_id(0)
    xs, factors, outs = refs[:count], list(refs[count : -count - 2]), refs[-count - 2 : -2]
    tops, held = [], []
    for x_ref, width, multiplied in zip(xs, widths, there, strict=True):
        factor_ref = factors.pop(0) if multiplied else None
        # Parts of a power of two, whatever the width.
        part = width & -width
        parts = [pl.ds(at, part) for at in range(0, width, part)]
        values = [x_ref[row, at].astype(jnp.float32) for at in parts]
        if multiplied:
            values = [v * factor_ref[at] for v, at in zip(values, parts, strict=True)]
        tops.append(functools.reduce(jnp.maximum, map(jnp.abs, values)).max())
        held.append(zip(parts, values, strict=True))
    scale, inverse = power_of_two(functools.reduce(jnp.maximum, tops))
    refs[-2][row], refs[-1][row] = scale, inverse
    for out_ref, cut in zip(outs, held, strict=True):
        for at, values in cut:
            out_ref[row, at] = bits((values * inverse).astype(E4M3), jnp.uint8)
