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
    if isinstance(i, int):
        return jax.tree.map(lambda x: x[i], leaf)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), leaf)


def linear(node: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """x @ weight.T + bias for a `{weight, bias}` node, in x's dtype."""
    y = matmul(node["weight"], x)
    return (
        y + node["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if "bias" in node
        else y
    )


def linears(nodes: Sequence[Params], x: Float[Array, "*B I"]) -> list[Array]:
    """`linear` for projections that share their input."""
    return [linear(node, x) for node in nodes]


def matmul(w: Any, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """x @ w.T for one weight of any kind, accumulated in float32, in x's dtype."""
    if isinstance(w, Lora):
        low = jnp.einsum("...i,ri->...r", x, w.a.astype(x.dtype))
        up = jnp.einsum("...r,or->...o", low, w.b.astype(x.dtype))
        return matmul(w.base, x) + w.scale.astype(x.dtype) * up
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
