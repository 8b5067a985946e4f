"""int8 weights: the rows of LLM.int8 (arXiv:2208.07339), byte for byte as bitsandbytes stores them.

Only weights are in 8 bits. Inputs stay in their own dtype and are not split by outliers.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 127  # the code of a row's largest absolute value
UNIT = np.float32(7.874015718698502e-3)  # bitsandbytes multiplies by it where it says / 127


@flax.struct.dataclass
class Int8:
    """A weight [*stack, O, I] = codes * absmax / 127. Fields are Any: trees may hold shapes."""

    codes: Any  # int8 [*stack, O, I], bitsandbytes' CB
    absmax: Any  # float32 [*stack, O], its SCB
    dtype: str = flax.struct.field(pytree_node=False, default="bfloat16")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantize(self) -> Float[Array, "*stack O I"]:
        """bitsandbytes' float32 values, rounded once to `dtype`."""
        return _values(*map(jnp.asarray, (self.codes, self.absmax))).astype(self.dtype)

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """x @ w.T in x's dtype, the scales in float32 after the sum. Raises on a stack.

        No gradient reaches codes and scales.
        """
        if len(self.shape) != 2:
            raise ValueError(f"matmul takes one matrix, got the stack {self.shape}: index it first")
        return _product(jnp.asarray(self.codes), jnp.asarray(self.absmax), x)


def _values(codes, absmax):
    return codes.astype(jnp.float32) * absmax[..., None] * UNIT


@jax.custom_vjp
def _product(codes: Array, absmax: Array, x: Array) -> Array:
    # Codes are exact in 16 bits, the weight is not.
    y = jnp.einsum("...i,oi->...o", x, codes.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * (absmax * UNIT).reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def _backward(saved, dy):
    # Of the scaled weight: cotangents times scales would fall out of float16's range.
    w = _values(*saved).astype(dy.dtype)
    return None, None, jnp.einsum("...o,oi->...i", dy, w)


_product.defvjp(lambda *primals: (_product(*primals), primals[:2]), _backward)


def quantize(w: Float[Array, "*stack O I"], dtype: str | np.dtype | type | None = None) -> Int8:
    """int8 rows of float weights; `dtype` is what dequantizing gives, by default the weight's.

    Written for jit. As in bitsandbytes the weight goes through float16: where a value passes
    65504, its row's absmax is infinite. Raises on vectors and on dtypes that are not floats.
    """
    name = jnp.dtype(w.dtype if dtype is None else dtype).name
    if w.ndim < 2 or jnp.dtype(w.dtype).name not in DTYPES or name not in DTYPES:
        raise ValueError(
            f"int8 takes matrices in {DTYPES}, got {w.dtype} of shape {w.shape} to dequantize to "
            f"{name}"
        )
    # Else XLA leaves two conversions out that it takes for one there and back.
    half = jax.lax.optimization_barrier(jnp.asarray(w).astype(jnp.float16)).astype(jnp.float32)
    absmax = jnp.abs(half).max(-1)
    # As PyTorch divides a number by a tensor: rounded twice, which moves one code in 20,000.
    scale = jnp.where(absmax > 0, jax.lax.reciprocal(absmax) * LARGEST, 0)
    return Int8(jnp.round(half * scale[..., None]).astype(jnp.int8), absmax, dtype=name)
