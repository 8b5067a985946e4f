"""Kinds of weight and the few functions that look at a weight's kind.

A weight [*stack, O, I] in a parameter tree is a plain array, a `Quantized`, or a `Lora` around
either. A path whose layers differ in kind or shape, or of which only some exist, holds `Stacks`;
a part that uses some layers of a stack is a `View` of it, so that no stack is ever cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params


@runtime_checkable
class Quantized(Protocol):
    """What the code may ask of a quantized weight; one class a format, in `quant/`.

    Every array field carries the stack's axes, so that indexing each field indexes the stack.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    def dequantize(self) -> Array: ...
    def matmul(self, x: Array) -> Array: ...


@runtime_checkable
class Fused(Quantized, Protocol):
    """A format whose kernels read a stack by layer number and take several weights at once."""

    def at(self, i: int | Int[Array, ""]) -> Any: ...
    @staticmethod
    def products(bases: Sequence[Any], pairs: Sequence[Any], x: Array) -> list[Array]: ...


@flax.struct.dataclass
class Lora:
    """`base + scale * b @ a`, not summed. Fields are Any since trees may hold shapes or specs."""

    base: Any  # dense or quantized [*stack, O, I]
    a: Any  # float32 [*stack, r, I]
    b: Any  # float32 [*stack, O, r]
    scale: Any  # float32 [*stack]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


@flax.struct.dataclass
class Stacks:
    """A stacked path in parts: `parts[i]` holds the layers `layers[i]`, in that order."""

    parts: tuple[Any, ...]
    layers: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class View:
    """Layers `at` of a stack, not copied."""

    stack: Any
    at: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.at), *self.stack.shape[1:])


@jax.tree_util.register_static
class Hosted:
    """An embedding table [V, D] that stays in host memory; no part of it reaches a program."""

    def __init__(self, table: np.ndarray):
        self.table = table

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """[*ids, D] in the table's dtype."""
        return self.table[ids]


def stacks(leaf: Any, layers: int) -> Stacks:
    """`leaf` as `Stacks`: a leaf that holds every layer is one part."""
    return leaf if isinstance(leaf, Stacks) else Stacks((leaf,), (tuple(range(layers)),))


def map_stacks(fn: Callable[..., Any], leaf: Any) -> Any:
    """`fn` of each part of a `Stacks`, or of the leaf itself."""
    if isinstance(leaf, Stacks):
        return leaf.replace(parts=tuple(fn(part) for part in leaf.parts))
    return fn(leaf)


def layer(leaf: Any, i: int | Int[Array, ""]) -> Any:
    """Layer `i` of a stacked leaf; only arrays and quantized stacks take a traced `i`."""
    if isinstance(leaf, Stacks):
        for part, ids in zip(leaf.parts, leaf.layers, strict=True):
            if i in ids:
                return layer(part, ids.index(i))
        raise IndexError(f"layer {i} is in none of the parts, which hold {leaf.layers}")
    if isinstance(leaf, View):
        return layer(leaf.stack, leaf.at[i])
    if isinstance(leaf, Lora):
        return Lora(layer(leaf.base, i), leaf.a[i], leaf.b[i], leaf.scale[i])
    if isinstance(leaf, Fused):
        return leaf.at(i)
    if isinstance(i, int):
        return jax.tree.map(lambda x: x[i], leaf)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), leaf)


def linear(node: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """x @ weight.T + bias for a `{weight, bias}` node, in x's dtype."""
    return linears([node], x)[0]


def linears(nodes: Sequence[Params], x: Float[Array, "*B I"]) -> list[Array]:
    """`linear` for projections that share their input."""
    ys = products([node["weight"] for node in nodes], x)
    bias = lambda y, b: y + b.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return [
        bias(y, node["bias"]) if "bias" in node else y for y, node in zip(ys, nodes, strict=True)
    ]


def products(weights: Sequence[Any], x: Float[Array, "*B I"]) -> list[Array]:
    """x @ w.T for weights of any kinds, accumulated in float32, in x's dtype."""
    bases = [w.base if isinstance(w, Lora) else w for w in weights]
    kind = type(bases[0])
    if isinstance(bases[0], Fused) and all(type(base) is kind for base in bases):
        pairs = [(w.a, w.b, w.scale) if isinstance(w, Lora) else None for w in weights]
        return kind.products(bases, pairs, x)
    return [_product(w, x) for w in weights]


def _product(w, x):
    if isinstance(w, Lora):
        low = jnp.einsum("...i,ri->...r", x, w.a.astype(x.dtype))
        up = jnp.einsum("...r,or->...o", low, w.b.astype(x.dtype))
        return _product(w.base, x) + w.scale.astype(x.dtype) * up
    if isinstance(w, Quantized):
        return w.matmul(x)
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype))


def scores(node: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """`linear` in float32 whatever x's dtype: for a head, whose 16-bit rounding would show."""
    w = node["weight"]
    if isinstance(w, Lora | Quantized):
        return linear(node, x).astype(jnp.float32)
    y = _wide(w, x)
    return y + node["bias"].reshape((1,) * (y.ndim - 1) + (-1,)) if "bias" in node else y


@jax.custom_vjp
def _wide(w: Array, x: Array) -> Array:
    w = w.astype(x.dtype)
    return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=jnp.float32)


def _wide_backward(saved, dy):
    w, x = saved
    # In x's dtype, else the whole head would be widened to meet a float32 cotangent.
    dy = dy.astype(x.dtype)
    dw = jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32)
    return dw.astype(w.dtype), jnp.einsum("...o,oi->...i", dy, w.astype(x.dtype))


_wide.defvjp(lambda w, x: (_wide(w, x), (w, x)), _wide_backward)


def embed(node: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of an embedding table; an adapter's rows are gathered before its product."""
    w = node["weight"]
    if isinstance(w, Hosted):
        raise TypeError("the embedding table is in host memory: look its rows up there")
    if isinstance(w, Lora):
        base = dense(w.base)[ids]
        low = jnp.einsum("btr,rd->btd", w.b[ids], w.a)
        return (base.astype(jnp.float32) + w.scale * low).astype(base.dtype)
    return dense(w)[ids]


def dense(w: Any) -> Array:
    """The weight as one plain array: dequantized, with its adapter added in float32."""
    if isinstance(w, Lora):
        base = dense(w.base)
        scale = w.scale[..., None, None]
        return (base.astype(jnp.float32) + scale * (w.b @ w.a)).astype(base.dtype)
    if isinstance(w, View):
        return jnp.stack([dense(layer(w, i)) for i in range(len(w.at))])
    return w.dequantize() if isinstance(w, Quantized) else w
