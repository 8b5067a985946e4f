"""NF4 bytes to a 16-bit matrix at the memory's speed, with a low-rank term added on the way.

    w[k] = CODES[code[k]] * absmax[k // 64] (+ scale * (b @ a)[k])     in float32, cast once

The kernel (Pallas, Triton) takes a whole stack and a layer number, so that no layer is copied
before it is read; it decodes nested statistics itself and writes two 16-bit weights as one word.
Adding the low-rank term here makes one product of what LoRA needs three for (`nf4_matmul`); there
it is summed in float32 from bfloat16 factors and rounded to bfloat16 before it is added.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import _choice
from pallas_kernels.nf4 import BLOCK, CODES, LARGEST, Layout, Statistics
from pallas_kernels.nf4 import dequantize as reference_one

Implementation = Literal["pallas", "xla"]
ROWS, ROWS_WITH_RANK = 4, 16  # a matrix unit's smallest side is 16


class LowRank(NamedTuple):
    """The term `scale * b @ a` of one matrix."""

    a: Any  # [r, I]
    b: Any  # [O, r]
    scale: Any  # float32 []


def one_layer(packed: Array, statistics: Statistics, layer: Any) -> tuple[Array, Statistics]:
    """Bytes and statistics of one layer; of a matrix without a stack, themselves."""
    if layer is None:
        return packed, statistics
    take = lambda x: jax.lax.dynamic_index_in_dim(jnp.asarray(x), layer, keepdims=False)
    return take(packed), jax.tree.map(take, statistics)


def reference(
    layout: Layout,
    packed: UInt8[Array, "..."],
    statistics: Statistics,
    layer: Int[Array, ""] | int | None = None,
    low_rank: LowRank | None = None,
    dtype: Any = None,
) -> Float[Array, "O I"]:
    """The weight in `dtype` (the layout's by default)."""
    packed, statistics = one_layer(packed, statistics, layer)
    dtype = jnp.dtype(dtype or layout.dtype)
    if low_rank is None:
        return reference_one(layout, packed, statistics).astype(dtype)
    w = reference_one(layout._replace(dtype="float32"), packed, statistics)
    return (w + low_rank.scale * (low_rank.b @ low_rank.a).astype(jnp.float32)).astype(dtype)


def supports(
    layout: Layout, packed: Any, statistics: Statistics, low_rank: Any = None, dtype: Any = None
) -> str | None:
    """Why the kernel can't run on these, or None."""
    height, width = layout.matrix
    dtype = jnp.dtype(dtype or layout.dtype)
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if _choice.capability() < 8.0:
        return f"it needs compute capability 8.0, this GPU has {_choice.capability()}"
    if layout.block != BLOCK or width % 128 or height % ROWS_WITH_RANK:
        return f"it takes blocks of 64, widths of 128 n, heights of 16 n, got {layout}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it writes bfloat16 or float16, not {dtype}"
    if low_rank is None and dtype != layout.dtype:
        return f"the weight is {layout.dtype}: rounding to {dtype} would be a second one"
    if 2**31 <= packed.size < 2**32:
        return "the stack's bytes pass 2^31 and are still indexed in 32 bits"
    return None


def dequantize(
    layout: Layout,
    packed: UInt8[Array, "..."],
    statistics: Statistics,
    layer: Int[Array, ""] | int | None = None,
    low_rank: LowRank | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "O I"]:
    """One weight [O, I] of a stack [L, O, I/2] (or of bytes without a stack, `layer` None).

    Without a low-rank term the result is bitsandbytes' bit for bit. It has no gradient. Raises
    ValueError with the reason where the implementation asked for can't run.
    """
    reason = supports(layout, packed, statistics, low_rank, dtype)
    chosen = _choice.pick("NF4 dequantize", implementation, {"pallas": reason, "xla": None})
    if chosen == "xla":
        return reference(layout, packed, statistics, layer, low_rank, dtype)
    return _pallas(layout, packed, statistics, layer, low_rank, jnp.dtype(dtype or layout.dtype))


def _pallas(layout, packed, statistics, layer, low_rank, dtype, tile=None):
    height, half = layout.matrix[0], layout.matrix[1] // 2
    packed = packed.reshape(-1, height, half)
    absmax = statistics.absmax.reshape(-1, height, half // 32)
    operands = [jnp.asarray([0 if layer is None else layer], jnp.int32), packed, absmax]
    nested = statistics.nested_absmax is not None
    if nested:
        rest = (statistics.nested_absmax, statistics.nested_map, statistics.offset)
        operands += [jnp.asarray(x).reshape(-1) for x in rest]
    operands.append(jnp.asarray(CODES))
    rank = 0
    if low_rank is not None:
        pairs, b = _operands(low_rank)
        operands += [*pairs, b]
        rank = b.shape[1]
    rows, cols = tile or _tile(rank, half)
    per_layer = -(-height * half // 32 // layout.nested_block)
    body = functools.partial(_kernel, (rows, cols), (half, layout.nested_block, per_layer), nested)
    words = pl.pallas_call(
        functools.partial(body, rank > 0, dtype),
        out_shape=jax.ShapeDtypeStruct((height, half), jnp.uint32),
        grid=(height // rows, half // cols),
        out_specs=pl.BlockSpec((rows, cols), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=_choice.interpreting(),
        name="nf4_dequantize",
    )(*operands)
    return jax.lax.bitcast_convert_type(words, dtype).reshape(layout.matrix)


def _tile(rank, half):
    """(rows, words) of one program; both powers of two."""
    rows = ROWS_WITH_RANK if rank else ROWS
    cols = 256 if not rank else 128
    while half % cols:
        cols //= 2
    return rows, cols


def _operands(low_rank):
    """((a of even inputs, a of odd ones) [r', I/2] each, scale * b [O, r']), r' a power of two."""
    a = low_rank.a.astype(jnp.bfloat16)
    b = (low_rank.b.astype(jnp.float32) * low_rank.scale).astype(jnp.bfloat16)
    rank = max(16, 1 << (a.shape[0] - 1).bit_length())
    a = jnp.pad(a, ((0, rank - a.shape[0]), (0, 0)))
    b = jnp.pad(b, ((0, 0), (0, rank - b.shape[1])))
    return (a[:, 0::2], a[:, 1::2]), b


def _kernel(tile, sizes, nested, low_rank, dtype, layer_ref, packed_ref, absmax_ref, *refs):
    rows, cols = tile
    half, nested_block, per_layer = sizes
    *refs, out_ref = refs
    layer = layer_ref[0]
    row, col = pl.program_id(0) * rows, pl.program_id(1) * cols
    here = pl.ds(row, rows)
    scale = absmax_ref[layer, here, pl.ds(col // 32, cols // 32)]
    if nested:
        nested_ref, map_ref, offset_ref, *refs = refs
        block = (row + jnp.arange(rows))[:, None] * (half // 32)
        block = block + (col // 32 + jnp.arange(cols // 32))[None]
        outer = nested_ref[layer * per_layer + block // nested_block]
        product = map_ref[layer * 256 + scale.astype(jnp.int32)] * outer
        # As in the reference: without it product and sum would be contracted into one rounding.
        scale = jnp.clip(product, -LARGEST, LARGEST) + offset_ref[layer]
    scale = jnp.broadcast_to(scale[:, :, None], (rows, cols // 32, 32)).reshape(rows, cols)
    codes_ref, *refs = refs
    p = packed_ref[layer, here, pl.ds(col, cols)].astype(jnp.int32)
    high, low = codes_ref[p >> 4] * scale, codes_ref[p & 15] * scale
    if low_rank:
        even_ref, odd_ref, b_ref = refs
        b, at = b_ref[here, :], pl.ds(col, cols)
        dot = lambda a: jnp.dot(b, a, preferred_element_type=jnp.float32)
        # One word, since it changes its layout between the matrix unit and the table look-ups.
        delta = _word(dot(even_ref[:, at]), dot(odd_ref[:, at]), jnp.bfloat16)
        wide = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
        high, low = high + wide(delta << 16), low + wide(delta & jnp.uint32(0xFFFF0000))
    out_ref[...] = _word(high, low, dtype)


def _word(first, second, dtype):
    """Two numbers in 16 bits each, the first in the lower half."""
    bits = lambda x: jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16).astype(jnp.uint32)
    return bits(first) | (bits(second) << 16)
