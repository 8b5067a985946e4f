"""Kinds of weight and the few functions that look at a weight's kind.

A weight [*stack, O, I] in a parameter tree is a plain array, a `Quantized`, or a `Lora` around
either, with an `Apart` between them where the adapter is more than a sum. A path whose layers
differ in kind or shape, or of which only some exist, holds `Stacks`; a part that uses some layers
of a stack is a `View` of it, so that no stack is ever cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import grouped_matmul
from unsloth_jax.dims import PLAIN, Params, Scores


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

    base: Any  # dense or quantized [*stack, O, I], or an `Apart`
    a: Any  # float32 [*stack, r, I]
    b: Any  # float32 [*stack, O, r]
    scale: Any  # float32 [*stack]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


@flax.struct.dataclass
class Apart:
    """A base whose adapter is more than a sum: dropout on its input, DoRA's magnitude.

    Alone it is the base. As such it stays outside the scan over layers, which carries a and b.
    """

    base: Any  # dense or quantized [*stack, O, I]
    magnitude: Any = None  # float32 [*stack, O]: norms of the rows of what the adapter makes of W
    key: Any = None  # a key [*stack]
    rate: float = flax.struct.field(pytree_node=False, default=0.0)  # the share dropped

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def dequantize(self) -> Array:
        return dense(self.base)

    def matmul(self, x: Array) -> Array:
        return products([self.base], x)[0]


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


@jax.tree_util.register_static
@dataclass(frozen=True)
class Vacant:
    """The place of a weight that is trained as it is and stands in the trainable tree."""

    shape: tuple[int, ...]
    dtype: str


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
        at = leaf.at[i] if isinstance(i, int) else jnp.asarray(leaf.at, jnp.int32)[i]
        return layer(leaf.stack, at)
    if isinstance(leaf, Lora):
        return Lora(layer(leaf.base, i), leaf.a[i], leaf.b[i], leaf.scale[i])
    if isinstance(leaf, Apart):
        own = jax.tree.map(lambda x: _pick(x, i), (leaf.magnitude, leaf.key))
        return Apart(layer(leaf.base, i), *own, leaf.rate)
    if isinstance(leaf, Fused):
        return leaf.at(i)
    return jax.tree.map(lambda x: _pick(x, i), leaf)


def _pick(x, i):
    return x[i] if isinstance(i, int) else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def linear(node: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """x @ weight.T + bias for a `{weight, bias}` node, in x's dtype."""
    return linears([node], x)[0]


def linears(nodes: Sequence[Params], x: Float[Array, "*B I"]) -> list[Array]:
    """`linear` for projections that share their input."""
    ys = products([node["weight"] for node in nodes], x)
    bias = lambda y, b: y + _across(b.astype(y.dtype), y)
    return [
        bias(y, node["bias"]) if "bias" in node else y for y, node in zip(ys, nodes, strict=True)
    ]


def _across(row, y):
    """A vector of outputs with the axes of y."""
    return row.reshape((1,) * (y.ndim - 1) + (-1,))


def products(weights: Sequence[Any], x: Float[Array, "*B I"]) -> list[Array]:
    """x @ w.T for weights of any kinds, accumulated in float32, in x's dtype.

    Under a dropout key that is W x + s B A d(x), where d drops and rescales (arXiv:2106.09685);
    a magnitude m multiplies W + s B A by m / its rows' norms, which count as constants
    (arXiv:2402.09353). With both, PEFT's W x + (g - 1) W d(x) + g s B A d(x).
    """
    dropped = [j for j, w in enumerate(weights) if _apart(w) and w.base.key is not None]
    ys = _sums([w.base.base if j in dropped else _summed(w) for j, w in enumerate(weights)], x)
    for j, w in enumerate(weights):
        if j in dropped:
            ys[j] = ys[j] + _beside(w, _dropout(x, w.base.key, w.base.rate))
        elif _apart(w) and w.base.magnitude is not None:
            ys[j] = (_across(gain(w), x) * ys[j].astype(jnp.float32)).astype(x.dtype)
    return ys


class Groups(NamedTuple):
    """Which of several matrices each row belongs to: rows come sorted by group."""

    ids: Int[Array, " N"]  # ascending
    sizes: Int[Array, " E"]


def grouped(node: Params, x: Float[Array, "N I"], groups: Groups) -> Float[Array, "N O"]:
    """`linear` of each row with the matrix of its group, of a `{weight, bias}` node [E, O, I]."""
    y = _grouped(node["weight"], x, groups)
    return y + node["bias"].astype(y.dtype)[groups.ids] if "bias" in node else y


def _grouped(w, x, groups):
    if isinstance(w, Lora):
        up = grouped_matmul(grouped_matmul(x, w.a, groups.sizes), w.b, groups.sizes)
        return _grouped(w.base, x, groups) + w.scale.astype(x.dtype)[groups.ids, None] * up
    if x.shape[0] < groups.sizes.shape[0]:
        # Few rows: only the matrices that they use are made.
        used = dense(jax.tree.map(lambda field: jnp.asarray(field)[groups.ids], w))
        return jnp.einsum("ni,noi->no", x, used.astype(x.dtype))
    return grouped_matmul(x, dense(w), groups.sizes)


def _apart(w):
    return isinstance(w, Lora) and isinstance(w.base, Apart)


def _summed(w):
    """The weight with its adapter in it and nothing else."""
    return w.replace(base=w.base.base) if _apart(w) else w


def _beside(w, z):
    """What the adapter adds to W x, from the dropped input z."""
    up = w.scale.astype(z.dtype) * _low_rank(w, z)
    if w.base.magnitude is None:
        return up
    g, (y,) = _across(gain(w), z), _sums([w.base.base], z)
    return ((g - 1) * y.astype(jnp.float32) + g * up.astype(jnp.float32)).astype(z.dtype)


def _low_rank(w, x):
    low = jnp.einsum("...i,ri->...r", x, w.a.astype(x.dtype))
    return jnp.einsum("...r,or->...o", low, w.b.astype(x.dtype))


def _dropout(x, key, rate):
    """Zeros where a draw says so, the rest divided by its chance, so that the mean stays."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def folded(node: Params, n: int | Int[Array, ""] | None) -> Params:
    """The node with other dropout masks: for part `n` of an input whose parts share their node.

    None leaves it as it is.
    """
    if n is None:
        return node
    new = lambda leaf: leaf.replace(key=jax.random.fold_in(leaf.key, n)) if _drawn(leaf) else leaf
    return jax.tree.map(new, node, is_leaf=lambda leaf: isinstance(leaf, Apart))


def draws(node: Params) -> bool:
    """Whether a weight of the node drops what its adapter is given."""
    return any(map(_drawn, jax.tree.leaves(node, is_leaf=lambda leaf: isinstance(leaf, Apart))))


def _drawn(leaf):
    return isinstance(leaf, Apart) and leaf.key is not None


def gain(w: Lora) -> Float[Array, "*stack O"]:
    """DoRA's magnitude over norm, float32; no gradient reaches the norm."""
    return w.base.magnitude / jax.lax.stop_gradient(norms(w))


def norms(w: Lora) -> Float[Array, "*stack O"]:
    """The length of each row of base plus adapter, float32, whatever its magnitude."""
    merged = _merged(w, dense(w.base))
    return jnp.sqrt((merged * merged).sum(-1))


def _merged(w, base):
    """base + scale * b @ a, float32 [*stack, O, I]."""
    return base.astype(jnp.float32) + w.scale[..., None, None] * (w.b @ w.a)


def _sums(weights, x):
    """`products` of weights without magnitudes and dropout."""
    bases = [w.base if isinstance(w, Lora) else w for w in weights]
    kind = type(bases[0])
    if isinstance(bases[0], Fused) and all(type(base) is kind for base in bases):
        pairs = [(w.a, w.b, w.scale) if isinstance(w, Lora) else None for w in weights]
        return list(kind.products(bases, pairs, x))
    return [_product(w, x) for w in weights]


def _product(w, x):
    if isinstance(w, Lora):
        up = _low_rank(w, x)
        return _product(w.base, x) + w.scale.astype(x.dtype) * up
    if isinstance(w, Quantized):
        return w.matmul(x)
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype))


def scores(node: Params, x: Float[Array, "*B I"], how: Scores = PLAIN) -> Float[Array, "*B O"]:
    """`linear` in float32 whatever x's dtype: for a head, whose 16-bit rounding would show."""
    w = node["weight"]
    if isinstance(w, Lora | Quantized):
        y = linear(node, x).astype(jnp.float32)
    else:
        y = _wide(w, x)
        y = y + _across(node["bias"], y) if "bias" in node else y
    y = y if how.scale == 1 else y * how.scale
    return y if how.cap is None else how.cap * jnp.tanh(y / how.cap)


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
        rows = base.astype(jnp.float32) + w.scale * low
        if _apart(w) and w.base.magnitude is not None:
            rows = gain(w)[ids][..., None] * rows
        return rows.astype(base.dtype)
    return _rows(dense(w), ids)


@jax.custom_vjp
def _rows(table: Array, ids: Array) -> Array:
    return table[ids]


def _rows_backward(saved, dy):
    table, ids = saved
    # In float32 and rounded once: a frequent token adds up as many rows as it has places.
    dtable = jnp.zeros(table.shape, jnp.float32).at[ids].add(dy.astype(jnp.float32))
    return dtable.astype(table.dtype), None


_rows.defvjp(lambda table, ids: (_rows(table, ids), (table, ids)), _rows_backward)


def dense(w: Any) -> Array:
    """The weight as one plain array: dequantized, with its adapter added in float32."""
    if isinstance(w, Lora):
        base = dense(w.base)
        merged = _merged(w, base)
        if _apart(w) and w.base.magnitude is not None:
            merged = gain(w)[..., None] * merged
        return merged.astype(base.dtype)
    if isinstance(w, View):
        return jnp.stack([dense(layer(w, i)) for i in range(len(w.at))])
    return w.dequantize() if isinstance(w, Quantized) else w
