"""NF4 bytes to a 16-bit matrix at the memory's speed, with a low-rank term added on the way.

    w[k] = CODES[code[k]] * absmax[k // 64] (+ scale * (b @ a)[k])     in float32, cast once

The kernel (Pallas, Triton) takes a whole stack and a layer number, so that no layer is copied
before it is read; it decodes nested statistics itself and writes two 16-bit weights as one word.
Adding the low-rank term here makes one product of what LoRA needs three for (`nf4_matmul`); there
it is summed in float32 from bfloat16 factors and rounded to bfloat16 before it is added.
"""

import math
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
WORDS = 8, 4  # a block of 64 weights: 4 words of two are what a thread stores at once
BLOCKS = 128  # of one program
ROWS, ACROSS = 16, 4  # of one program's blocks with a low-rank term; a matrix unit takes 16 rows


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
    if old := _choice.older(8.0):
        return old
    if layout.block != BLOCK or width % 128 or height % ROWS:
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


def _pallas(layout, packed, statistics, layer, low_rank, dtype):
    per_row = layout.matrix[1] // layout.block
    blocks = layout.matrix[0] * per_row
    per_layer = -(-blocks // layout.nested_block)
    if low_rank is None:
        tile = (math.gcd(BLOCKS, blocks, layout.nested_block),)
        shape = (blocks,)
    else:
        tile = ROWS, math.gcd(ACROSS, per_row, layout.nested_block)
        shape = layout.matrix[0], per_row
    operands = [jnp.asarray([0 if layer is None else layer], jnp.int32)]
    operands += [packed.reshape(-1, *shape, *WORDS), statistics.absmax.reshape(-1, *shape)]
    nested = statistics.nested_absmax is not None
    if nested:
        rest = (statistics.nested_absmax, statistics.nested_map, statistics.offset)
        operands += [jnp.asarray(x).reshape(-1) for x in rest]
    operands.append(jnp.asarray(CODES))
    operands += [] if low_rank is None else _factors(low_rank)

    def kernel(layer_ref, packed_ref, absmax_ref, *refs):
        *refs, out_ref = refs
        layer, first = layer_ref[0], [pl.program_id(axis) * n for axis, n in enumerate(tile)]
        here = tuple(map(pl.ds, first, tile))
        scale = absmax_ref[(layer, *here)]
        if nested:
            # Blocks that lie next to each other in a tile share their outer scale.
            at = first[0]
            if low_rank is not None:
                at = (at + jnp.arange(ROWS)) * per_row + first[1]
            scale = _denested(scale, layer, per_layer, at // layout.nested_block, *refs[:3])
        codes_ref, *factors = refs[3 * nested :]
        scale, p = scale[..., None, None], packed_ref[(layer, *here)].astype(jnp.int32)
        if factors:
            # Before the look-ups: Triton then moves it from layout to layout once.
            by_rank = _by_rank(*factors, here).reshape(p.shape)
            even = codes_ref[p >> 4] * scale + _wide(by_rank << 16)
            odd = codes_ref[p & 15] * scale + _wide(by_rank & jnp.uint32(0xFFFF0000))
        else:
            even, odd = codes_ref[p >> 4] * scale, codes_ref[p & 15] * scale
        out_ref[...] = _word(even, odd, dtype)

    words = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((*shape, *WORDS), jnp.uint32),
        grid=tuple(n // part for n, part in zip(shape, tile, strict=True)),
        out_specs=pl.BlockSpec((*tile, *WORDS), lambda *at: (*at, 0, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=_choice.interpreting(),
        name="nf4_dequantize",
    )(*operands)
    return jax.lax.bitcast_convert_type(words, dtype).reshape(layout.matrix)


def _factors(low_rank):
    """(a of even inputs, a of odd ones [r', I/2], scale * b [O, r']), r' a power of two."""
    a = low_rank.a.astype(jnp.bfloat16)
    b = (low_rank.b.astype(jnp.float32) * low_rank.scale).astype(jnp.bfloat16)
    rank = max(16, 1 << (a.shape[0] - 1).bit_length())
    a = jnp.pad(a, ((0, rank - a.shape[0]), (0, 0)))
    b = jnp.pad(b, ((0, 0), (0, rank - b.shape[1])))
    return a[:, 0::2], a[:, 1::2], b


def _denested(codes, layer, per_layer, at, nested_ref, map_ref, offset_ref):
    """Blocks' scales from their 8-bit codes; `at` numbers the outer scales of the leading axis."""
    outer = nested_ref[layer * per_layer + at]
    outer = outer if codes.ndim == 1 else outer[:, None]
    product = map_ref[layer * 256 + codes.astype(jnp.int32)] * outer
    # As in the reference: without it product and sum would be contracted into one rounding.
    return jnp.clip(product, -LARGEST, LARGEST) + offset_ref[layer]


def _by_rank(even_ref, odd_ref, b_ref, here):
    """The low-rank term of a tile, two bfloat16 a word.

    One word, since it changes its layout between the matrix unit and the table look-ups.
    """
    rows, across = here
    words = math.prod(WORDS)
    at = pl.ds(across.start * words, across.size * words)
    dot = lambda a: jnp.dot(b_ref[rows, :], a[:, at], preferred_element_type=jnp.float32)
    return _word(dot(even_ref), dot(odd_ref), jnp.bfloat16)


def _wide(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _word(first, second, dtype):
    """Two float32 rounded to 16 bits each in one word, the first in the lower half."""
    if _choice.interpreting():
        bits = lambda x: jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)
        wide = lambda x: bits(x).astype(jnp.uint32)
        return wide(first) | (wide(second) << 16)
    # One instruction for both; XLA's and Triton's casts take four.
    name = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    (words,) = plgpu.elementwise_inline_asm(
        f"cvt.rn.{name}.f32 $0, $2, $1;",
        args=[first, second],
        constraints="=r,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, jnp.int32)],
    )
    return jax.lax.bitcast_convert_type(words, jnp.uint32)
