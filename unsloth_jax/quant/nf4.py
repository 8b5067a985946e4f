"""NF4 weights: 4-bit NormalFloat in blocks of 64, as bitsandbytes has them (arXiv:2305.14314)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import nf4, nf4_dequantize, nf4_fp8, nf4_matmul

DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PRODUCTS = {
    "bf16": nf4_matmul.products,
    "fp8": nf4_fp8.products,
    "fp8_backward": partial(nf4_fp8.products, backward_only=True),
}


@flax.struct.dataclass
class NF4:
    """A weight [*stack, O, I]. Fields are Any since trees may hold shapes or specs.

    Plain statistics are float32 `absmax` alone; nested ones are 8-bit codes and the other three.
    """

    packed: Any  # uint8 [*stack, O, I/2] if 64 divides I, else [*stack, ceil(O I / 2)]
    absmax: Any  # uint8 codes or float32 [*stack, ceil(O I / block)]
    nested_absmax: Any = None  # float32 [*stack, ceil(blocks / nested_block)]
    nested_map: Any = None  # float32 [*stack, 256]
    offset: Any = None  # float32 [*stack]
    number: Any = None  # int32 []: which layer of the stack this is, where it is one
    matrix: tuple[int, int] = flax.struct.field(pytree_node=False, kw_only=True)
    block: int = flax.struct.field(pytree_node=False, default=nf4.BLOCK)
    nested_block: int = flax.struct.field(pytree_node=False, default=nf4.NESTED_BLOCK)
    dtype: str = flax.struct.field(pytree_node=False, default="bfloat16")
    matmul_dtype: str = flax.struct.field(pytree_node=False, default="bf16")  # of PRODUCTS

    @property
    def shape(self) -> tuple[int, ...]:
        if self.number is not None:
            return self.matrix
        return (*self.packed.shape[: -1 - in_rows(self.matrix)], *self.matrix)

    @property
    def layout(self) -> nf4.Layout:
        return nf4.Layout(self.matrix, self.block, self.nested_block, self.dtype)

    @property
    def statistics(self) -> nf4.Statistics:
        return nf4.Statistics(self.absmax, self.nested_absmax, self.nested_map, self.offset)

    def at(self, i: int | Int[Array, ""]) -> "NF4":
        """Layer `i` of a stack. Where the stack has one axis, its bytes stay where they are."""
        if self.number is not None:
            raise ValueError(f"this is one layer of a stack already, asked for its layer {i}")
        if len(self.shape) == 3:
            return self.replace(number=i)
        take = lambda x: jax.lax.dynamic_index_in_dim(jnp.asarray(x), i, keepdims=False)
        return jax.tree.map(take, self)

    def dequantize(self) -> Float[Array, "*stack O I"]:
        """The weight in `dtype`, bit for bit as bitsandbytes dequantizes it."""
        packed, statistics = jax.tree.map(jnp.asarray, (self.packed, self.statistics))
        if self.number is not None or len(self.shape) == 2:
            return nf4_dequantize.dequantize(self.layout, packed, statistics, self.number)
        if len(self.shape) == 3 and not nf4_dequantize.supports(self.layout, packed, statistics):
            # One launch for all, with a number each: nothing is copied.
            one = lambda i: nf4_dequantize.dequantize(self.layout, packed, statistics, i)
            return jax.vmap(one)(jnp.arange(self.shape[0]))
        one = lambda packed, statistics: nf4.dequantize(self.layout, packed, statistics)
        for _ in self.shape[:-2]:
            one = jax.vmap(one)
        return one(packed, statistics)

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """x @ w.T in x's dtype, for a single matrix. Raises on a stack: index it first."""
        return self.products([self], [None], x)[0]

    @staticmethod
    def products(
        bases: Sequence["NF4"], pairs: Sequence[tuple | None], x: Float[Array, "*B I"]
    ) -> list[Array]:
        """x @ (w + scale * b @ a).T for several matrices; a pair is (a, b, scale) or None."""
        stack = next((base for base in bases if base.shape != base.matrix), None)
        if stack is not None:
            raise ValueError(
                f"matmul takes one matrix, got the stack {stack.shape}: index it first"
            )
        arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
        ys = {}
        for kind in sorted({w.matmul_dtype for w in bases}):
            ids = [j for j, w in enumerate(bases) if w.matmul_dtype == kind]
            some = [bases[j] for j in ids]
            weights = [nf4_matmul.Packed(*arrays((w.packed, w.statistics)), w.number) for w in some]
            terms = [pairs[j] and nf4_matmul.LowRank(*pairs[j]) for j in ids]
            ys |= zip(ids, PRODUCTS[kind]([w.layout for w in some], x, weights, terms), strict=True)
        return [ys[j] for j in range(len(bases))]


def in_rows(matrix: tuple[int, int]) -> bool:
    """Whether packed bytes have the weight's rows: the width divides by 64, else they lie flat."""
    return matrix[1] % 64 == 0


def quantize(
    w: Float[Array, "*stack O I"],
    dtype: str | np.dtype | type | None = None,
    double: bool = True,
    block: int = nf4.BLOCK,
) -> NF4:
    """NF4 of float weights, nested statistics if `double`; `dtype` is what dequantizing gives.

    Written for jit. Does not look at values: NaN and infinities must be refused before. Raises on
    vectors, on dtypes other than float32, bfloat16 and float16, and on unknown block lengths.
    """
    name = jnp.dtype(w.dtype if dtype is None else dtype).name
    if w.ndim < 2 or jnp.dtype(w.dtype).name not in DTYPES:
        raise ValueError(f"NF4 takes matrices in {DTYPES}, got {w.dtype} of shape {w.shape}")
    if name not in DTYPES or block not in BLOCKS:
        raise ValueError(
            f"NF4 knows dtypes {DTYPES} and blocks of {BLOCKS}, got dtype {name}, block {block}"
        )
    one = lambda matrix: _fields(matrix, double, block)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    packed, statistics = one(jnp.asarray(w))
    return NF4(packed, *statistics, matrix=w.shape[-2:], block=block, dtype=name)


def _fields(w, double, block):
    packed, absmax = nf4.quantize(w, block)
    if in_rows(w.shape):
        packed = packed.reshape(w.shape[0], -1)
    return packed, nf4.nest(absmax) if double else nf4.Statistics(absmax)
