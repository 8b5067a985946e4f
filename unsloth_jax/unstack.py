"""Single layers of a parameter tree, for a loop over tokens that can't afford to cut stacks.

`layer` leaves weights as they are stored: quantized stacks stay whole and are read by number.
`materialized` makes plain arrays of every layer's weights and joins projections that share their
input; adapters are merged, or beside the weights. The tree it is made from stays as it was.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _choice
from unsloth_jax import leaves, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Apart, Lora, Quantized

# Neighbours that `leaves.linears` gets together in every family.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@flax.struct.dataclass
class Unstacked:
    """`layers[i]` is what a family's `block` takes; `rest` is the tree without its layers."""

    layers: tuple[Params, ...]
    rest: Params


@flax.struct.dataclass
class Joined:
    """Rows of a matrix that holds the weights of projections with one input, one below another.

    Every projection's leaf names the same array, so that it is held once and multiplied once. The
    adapters' a stand below the weights, their b in `up`: one product more for all of them.
    """

    whole: Any  # [sum of heights + sum of ranks, I]
    up: Any  # [sum of heights, sum of ranks], scaled and 0 where one is not the other's; or None
    heights: tuple[int, ...] = flax.struct.field(pytree_node=False)
    part: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.heights[self.part], self.whole.shape[-1]

    def dequantize(self) -> Float[Array, "O I"]:
        """This projection's rows, its adapter in them."""
        base, up = self._own()
        if up is None:
            return base
        low = self.whole[sum(self.heights) :].astype(jnp.float32)
        return (base.astype(jnp.float32) + up.astype(jnp.float32) @ low).astype(base.dtype)

    def matmul(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """x @ w.T for this projection alone."""
        base, up = self._own()
        y = _product(x, base)
        return y if up is None else _added(y, _product(x, self.whole[sum(self.heights) :]), up)

    def _own(self):
        start = sum(self.heights[: self.part])
        rows = slice(start, start + self.heights[self.part])
        return self.whole[rows], None if self.up is None else self.up[rows]

    def at(self, i: int | Int[Array, ""]) -> "Joined":
        raise ValueError(f"joined weights are those of one layer, asked for layer {i}")

    @staticmethod
    def products(
        bases: Sequence["Joined"], pairs: Sequence[None], x: Float[Array, "*B I"]
    ) -> list[Array]:
        """One product for all projections where all are asked for, one for all their adapters."""
        assert not any(pairs), "joined weights hold their adapters"
        one = bases[0]
        if [base.part for base in bases] != list(range(len(one.heights))):
            return [base.matmul(x) for base in bases]
        y, rows = _product(x, one.whole), sum(one.heights)
        if one.up is not None:
            y = _added(y[..., :rows], y[..., rows:], one.up)
        ends = [sum(one.heights[:n]) for n in range(1, len(bases))]
        return jnp.split(y, ends, axis=-1)


def _product(x, w):
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype))


def _added(y, low, up):
    """y + low @ up.T, rounded once."""
    more = jnp.einsum("...r,or->...o", low, up.astype(y.dtype), preferred_element_type=jnp.float32)
    return (y.astype(jnp.float32) + more).astype(y.dtype)


def layer(family: ModuleType, params: Params, i: int, number: Any = None) -> Params:
    """Layer i's node, a quantized leaf as its stack with a number. Nothing is computed.

    `number` is i again, as `after` gives it: what the stacks of matrices are indexed with.
    """
    there = lambda leaf: not isinstance(leaf, leaves.Stacks) or any(i in n for n in leaf.layers)
    stacked = {p: leaf for p, leaf in _cut(family, params)[0].items() if there(leaf)}
    # A stack of some layers counts from its own first one.
    at = lambda j: j if number is None else number if j == i else number + (j - i)
    return tree.unflatten({path: _read(leaf, i, at) for path, leaf in stacked.items()})


def _read(leaf, i, at):
    if isinstance(leaf, leaves.Stacks):
        part, ids = next(x for x in zip(leaf.parts, leaf.layers, strict=True) if i in x[1])
        return _read(part, ids.index(i), at)
    if isinstance(leaf, leaves.View):
        return _read(leaf.stack, leaf.at[i], at)
    if isinstance(leaf, Lora):
        # Adapters are small: they may be read, and cast, before the loop.
        return Lora(_read(leaf.base, i, at), leaf.a[i], leaf.b[i], leaf.scale[i])
    return leaves.layer(leaf, at(i) if len(leaf.shape) > 2 else i)


def after(i: int, x: Float[Array, "..."]) -> tuple[Int[Array, ""], Float[Array, "..."]]:
    """(i, x), and nothing can be read from a stack by that number before x is there.

    Without it compilers move what depends on weights alone, such as dequantizing them, out of a
    loop over tokens or before its first layer, and hold the model in 16 bits.
    """
    if _choice.platform() == "gpu":
        return jax.lax.optimization_barrier((jnp.asarray(i, jnp.int32), x))
    # CPUs drop barriers before they order operations. A float times 0 is not known to be 0.
    return i + (x.reshape(-1)[0] * 0).astype(jnp.int32), x


def _cut(family, params):
    """({path within a layer: stacked leaf}, the tree of everything else)."""
    prefix, flat = f"{family.LAYERS}.*.", tree.flatten(params)
    stacked = {p.removeprefix(prefix): x for p, x in flat.items() if p.startswith(prefix)}
    return stacked, tree.unflatten({p: x for p, x in flat.items() if not p.startswith(prefix)})


def materialized(family: ModuleType, c: Any, params: Params, merged: bool = True) -> Unstacked:
    """Plain arrays of their own, one layer made at a time: no more than one is held twice.

    Adapters are added in float32 and the sum cast once (`leaves.dense`). Unless `merged` those of
    matrices stay apart, which is what a learner computes. Not for use inside jit, which would be
    free to make all layers before it joins the first.
    """
    nodes = (layer(family, params, i) for i in range(len(family.kinds(c))))
    plain = lambda _, x: _rest(x, merged) if _is_kind(x) else x
    rest = tree.map_paths(plain, _cut(family, params)[1])
    return Unstacked(tuple(_plain(node, merged) for node in nodes), rest)


def _rest(leaf, merged):
    if merged or not _separable(leaf):
        return _dense(leaf)
    return leaf.replace(base=_dense(leaf.base))


def _is_kind(leaf):
    return isinstance(leaf, Lora | Quantized)


def _separable(leaf):
    """Whether a weight is a matrix whose adapter is a sum."""
    return isinstance(leaf, Lora) and len(leaf.shape) == 2 and not isinstance(leaf.base, Apart)


_dense = jax.jit(leaves.dense)
_all_dense = jax.jit(lambda flat: {path: leaves.dense(leaf) for path, leaf in flat.items()})


def plain_bytes(family: ModuleType, params: Params) -> int:
    """What the layers of `materialized` take."""
    flat = {}
    for path, leaf in _cut(family, params)[0].items():
        parts = leaf.parts if isinstance(leaf, leaves.Stacks) else (leaf,)
        flat |= {f"{path}.{n}": part for n, part in enumerate(parts)}
    return sum(x.size * x.dtype.itemsize for x in _all_dense.eval_shape(flat).values())


def _plain(node, merged):
    flat = tree.flatten(node)
    apart = {} if merged else {path: x for path, x in flat.items() if _separable(x)}
    flat |= {path: x.base for path, x in apart.items()}
    # Of a jitted function, so that layers alike are traced once.
    shapes = _all_dense.eval_shape(flat)
    groups = tuple(_groups(shapes))
    joined = {path for paths in groups for path in paths}
    groups += tuple((path,) for path in apart if path not in joined)
    made, wholes = _made(flat, apart, groups)
    for paths, (whole, up) in zip(groups, wholes, strict=True):
        heights = tuple(shapes[path].shape[0] for path in paths)
        made |= {path: Joined(whole, up, heights, n) for n, path in enumerate(paths)}
    return tree.unflatten(made)


def _groups(shapes):
    """Paths of the weights that are multiplied together and can be one array: no experts'."""
    shapes = {path: x for path, x in shapes.items() if len(x.shape) == 2}
    for parent in sorted({path.rpartition(".")[0].rpartition(".")[0] for path in shapes}):
        for names in SHARED_INPUT:
            paths = tuple(f"{parent}.{name}.weight" for name in names)
            if all(p in shapes for p in paths) and len({shapes[p].dtype for p in paths}) == 1:
                yield paths


@partial(jax.jit, static_argnums=2)
def _made(flat, apart, groups):
    """({path: plain array}, each group's matrix and what its adapters add)."""
    plain = _all_dense(flat)
    return plain, [_joined([plain.pop(p) for p in ps], [apart.get(p) for p in ps]) for ps in groups]


def _joined(bases, pairs):
    dtype, there = bases[0].dtype, [pair for pair in pairs if pair is not None]
    whole = jnp.concatenate([*bases, *(pair.a.astype(dtype) for pair in there)])
    if not there:
        return whole, None
    columns = []
    for pair in there:
        own = (pair.scale * pair.b).astype(dtype)
        rows = (own if p is pair else jnp.zeros((w.shape[0], own.shape[1]), dtype)
                for p, w in zip(pairs, bases, strict=True))  # fmt: skip
        columns.append(jnp.concatenate(list(rows)))
    return whole, jnp.concatenate(columns, axis=1)
