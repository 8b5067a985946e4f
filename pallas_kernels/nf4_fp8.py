"""Products with frozen NF4 weights where both operands have 8 bits; low-rank terms keep 16.

    w_j[o] ~ sw_j[o] w8_j[o],  x[m] ~ sx[m] x8[m]                               all 8: e4m3
    y_j = sx sw_j (x8 @ w8_j.T) + x @ (s_j b_j a_j).T
    dx = sd sum_j d8_j @ w8_j + sum_j (dy_j @ s_j b_j) @ a_j,          sd[m] d8_j[m] ~ dy_j[m] sw_j
    da_j = (dy_j @ s_j b_j).T @ x,  db_j = s_j dy_j.T @ (x @ a_j.T)

Scales stand for a row (of weights, of tokens) and are powers of two (`e4m3`). They lie outside what
is summed; all cotangents of a token share one, so that XLA chains the products of dx through
cuBLASLt's addend. That takes the contracted side innermost only: dx's weight is decoded transposed.
Rows that are no multiple of 16 are padded by XLA.
Backward decodes again: residuals are x, the packed bytes and the pairs, never a weight.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int, UInt8

from pallas_kernels import _choice, nf4_dequantize, nf4_matmul
from pallas_kernels.e4m3 import E4M3, bits, cast_rows, power_of_two
from pallas_kernels.nf4 import BLOCK, CODES, LARGEST, Layout, Statistics
from pallas_kernels.nf4_dequantize import LowRank, one_layer
from pallas_kernels.nf4_matmul import Packed, first_products, pair_gradients, second_products

Implementation = Literal["pallas", "xla"]


class How(NamedTuple):
    """What stands still while a product is differentiated."""

    implementation: Implementation
    backward_only: bool


def row_tops(layout: Layout, statistics: Statistics) -> Float[Array, " O"]:
    """What no weight of a row exceeds in magnitude, from one layer's statistics."""
    height, blocks = layout.matrix[0], layout.matrix[1] // layout.block
    if statistics.nested_absmax is None:
        return statistics.absmax.reshape(height, blocks).max(-1)
    look = lambda group: statistics.nested_absmax[group]
    return _nested_tops(look, jnp.arange(height), blocks, layout) + jnp.abs(statistics.offset)


def _nested_tops(look, row, blocks, layout):
    """The largest of the groups of block scales that a row lies in."""
    first, last = ((row * blocks + at) // layout.nested_block for at in (0, blocks - 1))
    top = look(first)
    for n in range(1, (blocks - 1) // layout.nested_block + 2):
        top = jnp.maximum(top, look(jnp.minimum(first + n, last)))
    return top


def reference(
    layout: Layout,
    packed: UInt8[Array, "..."],
    statistics: Statistics,
    layer: Int[Array, ""] | int | None = None,
    transposed: bool = False,
) -> tuple[Float8e4m3fn[Array, "_ _"], Float[Array, " O"]]:
    """See `decode`."""
    wide = layout._replace(dtype="float32")
    w = nf4_dequantize.reference(wide, packed, statistics, layer)
    scale, inverse = power_of_two(row_tops(layout, one_layer(packed, statistics, layer)[1]))
    w8 = (w * inverse[:, None]).astype(E4M3)
    return w8.T if transposed else w8, scale


def uneven(layout: Layout) -> str | None:
    """Why a weight of this layout has no product in e4m3 anywhere, or None."""
    height, width = layout.matrix
    if layout.block != BLOCK or width % BLOCK or height % 16:
        return f"it takes blocks of 64, widths of 64 n, heights of 16 n, got {layout}"
    return None


def supports(layout: Layout, packed: Any) -> str | None:
    """Why the kernel, and products in e4m3, can't run here; or None."""
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if old := _choice.older(8.9):
        return old
    if 2**31 <= packed.size < 2**32:
        return "the stack's bytes pass 2^31 and are still indexed in 32 bits"
    return uneven(layout)


def decode(
    layout: Layout,
    packed: UInt8[Array, "..."],
    statistics: Statistics,
    layer: Int[Array, ""] | int | None = None,
    transposed: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float8e4m3fn[Array, "_ _"], Float[Array, " O"]]:
    """(e4m3 [O, I], or [I, O] if `transposed`; the scale of each O) of one weight of a stack.

    Each weight is float32's, scaled and rounded once. It has no gradient. Raises ValueError with
    the reason where the implementation asked for can't run.
    """
    reasons = {"pallas": supports(layout, packed), "xla": uneven(layout)}
    if _choice.pick("NF4 to e4m3", implementation, reasons) == "xla":
        return reference(layout, packed, statistics, layer, transposed)
    return _pallas(layout, packed, statistics, layer, transposed)


def _pallas(layout, packed, statistics, layer, transposed, tile=None, warps=None):
    height, half = layout.matrix[0], layout.matrix[1] // 2
    operands = [jnp.asarray([0 if layer is None else layer], jnp.int32)]
    operands += [packed.reshape(-1, height, half)]
    operands += [statistics.absmax.reshape(-1, height, half // 32)]
    nested = statistics.nested_absmax is not None
    if nested:
        operands += [jnp.asarray(x).reshape(-1) for x in statistics[1:]]
    else:
        operands += [row_tops(layout, one_layer(packed, statistics, layer)[1])]
    rows, cols = tile or _tile(height, half, transposed)
    words = jax.ShapeDtypeStruct((height, half), jnp.uint16)
    spec = pl.BlockSpec((rows, cols), lambda i, j: (i, j))
    if transposed:
        words = jax.ShapeDtypeStruct((half, 2, height), jnp.uint8)
        spec = pl.BlockSpec((cols, 2, rows), lambda i, j: (j, 0, i))
    out, scale = pl.pallas_call(
        functools.partial(_kernel, (rows, cols), layout, nested, transposed),
        out_shape=(words, jax.ShapeDtypeStruct((height,), jnp.float32)),
        grid=(height // rows, half // cols),
        out_specs=(spec, pl.BlockSpec((rows,), lambda i, j: (i,))),
        compiler_params=plgpu.CompilerParams(num_warps=warps or _warps(rows, cols), num_stages=2),
        interpret=_choice.interpreting(),
        name="nf4_fp8",
    )(*operands, jnp.asarray(CODES))
    shape = layout.matrix[::-1] if transposed else layout.matrix
    return bits(out, E4M3).reshape(shape), scale


def _tile(height, half, transposed):
    """(rows, packed columns) of one program, powers of two; transposed tiles are a block wide."""
    rows, cols = (height & -height, half & -half)
    if transposed:
        return min(rows, 128), 32
    cols = min(cols, 256)
    return min(rows, 1024 // cols), cols


def _warps(rows, cols):
    """Of one program: 16 packed bytes a thread, where there are as many."""
    return 8 if rows * cols > 2048 else 4


def _kernel(tile, layout, nested, transposed, layer_ref, packed_ref, absmax_ref, *refs):
    *refs, codes_ref, out_ref, scale_ref = refs
    rows, cols = tile
    height, blocks = layout.matrix[0], layout.matrix[1] // layout.block
    layer, row, col = layer_ref[0], pl.program_id(0) * rows, pl.program_id(1) * cols
    here, number = pl.ds(row, rows), row + jnp.arange(rows)
    # A transposed tile is a block wide: one factor a row, which needs no other layout.
    wide = (lambda v: v) if transposed else (lambda v: v[:, None])
    at = col // 32 if transposed else pl.ds(col // 32, cols // 32)
    absmax = absmax_ref[layer, here, at]
    if nested:
        nested_ref, map_ref, offset_ref = refs
        first = layer * -(-height * blocks // layout.nested_block)
        look = lambda group: nested_ref[first + group]
        at = at if transposed else (col // 32 + jnp.arange(cols // 32))[None]
        group = (wide(number) * blocks + at) // layout.nested_block
        product = map_ref[layer * 256 + absmax.astype(jnp.int32)] * look(group)
        # As in the reference: without it product and sum would be contracted into one rounding.
        absmax = jnp.clip(product, -LARGEST, LARGEST) + offset_ref[layer]
        top = _nested_tops(look, number, blocks, layout) + jnp.abs(offset_ref[layer])
    else:
        top = refs[0][here]
    scale, inverse = power_of_two(top)

    @pl.when(pl.program_id(1) == 0)
    def _():
        scale_ref[...] = scale

    factor = absmax * wide(inverse)
    if transposed:
        factor = factor[:, None]
    else:
        factor = jnp.broadcast_to(factor[:, :, None], (rows, cols // 32, 32)).reshape(rows, cols)
    p = packed_ref[layer, here, pl.ds(col, cols)].astype(jnp.int32)
    cast = lambda code: bits((codes_ref[code] * factor).astype(E4M3), jnp.uint8)
    word = cast(p >> 4).astype(jnp.uint16) | (cast(p & 15).astype(jnp.uint16) << 8)
    if transposed:
        # One word of both, since each change of layout passes through shared memory.
        word = word.T
        out_ref[:, 0, :], out_ref[:, 1, :] = word.astype(jnp.uint8), (word >> 8).astype(jnp.uint8)
    else:
        out_ref[...] = word


def supports_products(layouts: Sequence[Layout], weights: Sequence[Packed]) -> str | None:
    """Why these weights can't be multiplied in e4m3 here, or None."""
    reasons = (supports(layout, w.bytes) for layout, w in zip(layouts, weights, strict=True))
    return next((r for r in reasons if r), None)


def products(
    layouts: Sequence[Layout],
    x: Float[Array, "*B I"],
    weights: Sequence[Packed],
    pairs: Sequence[LowRank | None],
    implementation: Implementation | None = None,
    backward_only: bool = False,
) -> list[Array]:
    """[y_j [*B, O_j]] in x's dtype; differentiable by x and the pairs.

    `backward_only` takes y from `nf4_matmul`, so that only dx is rounded. "xla" decodes by the
    reference; the products are XLA's either way. Raises ValueError with the reason where the
    implementation asked for can't run.
    """
    reasons = {"pallas": supports_products(layouts, weights)}
    reasons["xla"] = next((r for r in map(uneven, layouts) if r), None)
    chosen = _choice.pick("NF4 products in e4m3", implementation, reasons)
    numbered = [w._replace(layer=jnp.int32(0 if w.layer is None else w.layer)) for w in weights]
    how = How(chosen, backward_only)
    ys = _products(tuple(layouts), how, x.reshape(-1, x.shape[-1]), numbered, list(pairs))
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(layouts, how, x, weights, pairs):
    if how.backward_only:
        return nf4_matmul.products(layouts, x, _as_given(weights), pairs)
    wide = _sum_dtype(x)
    (x8,), sx, inverse = _cast([x], None, how)
    ys, lows = [], first_products(x, pairs)
    for layout, w, pair, low in zip(layouts, weights, pairs, lows, strict=True):
        w8, sw = _decoded(layout, w, False, how)
        y = _dot(x8, w8, wide)
        if pair is not None:
            b = _scaled((pair.b * pair.scale).astype(x.dtype), 1 / sw[:, None], wide)
            y += jnp.einsum("mr,or->mo", _scaled(low, inverse, wide), b)
        ys.append((y.astype(jnp.float32) * sx * sw[None]).astype(x.dtype))
    return ys


def _sum_dtype(x):
    """What a product puts out: float16 could not hold sums that are still to be scaled."""
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32


def _as_given(weights):
    """A matrix without a stack has no layer number."""
    return [w if w.bytes.ndim == 3 else w._replace(layer=None) for w in weights]


def _scaled(x, power, dtype):
    """Exact: a power of two only moves the exponent."""
    return (x.astype(jnp.float32) * power).astype(dtype)


def _decoded(layout, w, transposed, how):
    (w,) = _as_given([w])
    return decode(layout, w.bytes, w.statistics, w.layer, transposed, how.implementation)


def _cast(xs, factors, how):
    return cast_rows(xs, factors, "xla" if how.implementation == "xla" else None)


def _dot(x8, w8, dtype):
    """x8 @ w8.T; both have what is summed innermost, as cuBLASLt takes it."""
    dims = (((1,), (1,)), ((), ()))
    # Apart, else XLA may put weights that share x one below another first, which copies them.
    x8, w8 = jax.lax.optimization_barrier((x8, w8))
    return jax.lax.dot_general(x8, w8, dims, preferred_element_type=dtype)


def _forward(layouts, how, x, weights, pairs):
    return _products(layouts, how, x, weights, pairs), (x, weights, pairs)


def _backward(layouts, how, saved, dys):
    x, weights, pairs = saved
    # Tied to dy, else XLA may decode long before it is needed. The layer number is enough.
    numbers, dys = jax.lax.optimization_barrier(([w.layer for w in weights], dys))
    now = (w._replace(layer=i) for w, i in zip(weights, numbers, strict=True))
    decoded = [_decoded(layout, w, True, how) for layout, w in zip(layouts, now, strict=True)]
    d8s, sd, inverse = _cast(dys, [sw for _, sw in decoded], how)
    total = _low_rank_sum(x, pairs, dys, inverse)
    for d8, (w8, _) in zip(d8s, decoded, strict=True):
        part = _dot(d8, w8, _sum_dtype(x))
        # The sum so far stands second: as the addend of the product.
        total = part if total is None else part + total
    dx = (total.astype(jnp.float32) * sd).astype(x.dtype)
    return dx, None, pair_gradients(x, pairs, dys)


def _low_rank_sum(x, pairs, dys, inverse):
    """What the pairs add to dx, in its scaled units; None without pairs."""
    there = [j for j, pair in enumerate(pairs) if pair is not None]
    if not there:
        return None
    backs = second_products(dys, pairs)
    back = jnp.concatenate([backs[j] for j in there], axis=1)
    a = jnp.concatenate([pairs[j].a * pairs[j].scale for j in there]).astype(x.dtype)
    wide = _sum_dtype(x)
    return jnp.einsum("mr,ri->mi", _scaled(back, inverse, wide), a.astype(wide))


_products.defvjp(_forward, _backward)
