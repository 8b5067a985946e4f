"""LoRA as transforms of a parameter tree (arXiv:2106.09685). Model code never sees it.

adapters = init(key, params, rank=16, targets=("q_proj", "v_proj"))
attach(params, adapters, scaling(16, 16))     # train on it, sample from it, export it
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Lora, Stacks, View, stacks

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def uniform(key: jax.Array, shape: tuple[int, ...], rank: int) -> jax.Array:
    """PEFT's default: Kaiming-uniform with a = sqrt(5), which is U(-1, 1) / sqrt(inputs)."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int) -> jax.Array:
    """PEFT's "gaussian": N(0, 1 / rank^2)."""
    return jax.random.normal(key, shape) / rank


STARTS: dict[Any, Callable[[jax.Array, tuple[int, ...], int], jax.Array]] = {
    True: uniform,
    "gaussian": gaussian,
}


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def modules(params: Params, targets: Sequence[str] | str) -> list[str]:
    """Paths of the linear modules that `targets` names, in the tree's order.

    A sequence holds last names, a string is a regular expression over whole paths
    (`model.layers.*.self_attn.q_proj`, with any layer number for `*`), "all-linear" is every
    matrix but embedding and head. Raises ValueError for a target that matches nothing.
    """
    paths = [p.removesuffix(".weight") for p, w in tree.flatten(params).items() if _is_matrix(p, w)]
    inside = [p for p in paths if ".*." in p]
    if isinstance(targets, str):
        if targets == ALL_LINEAR:
            return inside
        match = tree.matcher(targets)
        chosen = [p for p in paths if match(p) or match(p.replace(".*.", ".0."))]
        wanted = [targets] if not chosen else []
    else:
        chosen = [p for p in paths if tree.matcher(tuple(targets))(p)]
        wanted = [t for t in targets if not any(tree.matcher((t,))(p) for p in chosen)]
    if wanted or not chosen:
        raise ValueError(f"target modules {wanted or targets} match nothing; there are {paths}")
    return chosen


def _is_matrix(path: str, leaf: Any) -> bool:
    part = leaf.parts[0] if isinstance(leaf, Stacks) else leaf
    return path.endswith(".weight") and len(part.shape) == 2 + (".*." in path)


def init(
    key: jax.Array,
    params: Params,
    rank: int,
    targets: Sequence[str] | str = TARGETS,
    layers: Sequence[int] | None = None,
    start: bool | str = True,
) -> Params:
    """A pair {a [*stack, r, I], b [*stack, O, r]} for every target, float32, `b` zero.

    `layers` limits stacked targets to these layer numbers: no pair exists for the others.
    Raises ValueError for an unknown start, rank, target or layer.
    """
    if start not in STARTS:
        raise ValueError(f"init_lora_weights={start!r} is not supported; supported: {list(STARTS)}")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA rank must be a positive integer, got {rank!r}")
    flat, out = tree.flatten(params), {}
    chosen = modules(params, targets)
    for at, path in zip(jax.random.split(key, len(chosen)), chosen, strict=True):
        stacked = ".*." in path
        count = sum(map(len, _parts(flat[f"{path}.weight"]))) if stacked else 0
        ids = _wanted(layers, count) if stacked else ()
        *_, height, width = _shape(flat[f"{path}.weight"])
        lead = (len(ids),) if stacked else ()
        a = STARTS[start](at, (*lead, rank, width), rank)
        b = jnp.zeros((*lead, height, rank))
        part = lambda x, ids=ids, all_=len(ids) == count: x if all_ else Stacks((x,), (tuple(ids),))
        out[f"{path}.a"], out[f"{path}.b"] = (part(a), part(b)) if stacked else (a, b)
    return tree.unflatten(out)


def _wanted(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    ids = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    outside = [i for i in ids if not 0 <= i < count]
    if outside or not ids:
        raise ValueError(f"layers_to_transform={layers} names {outside or 'no layer'}; there are 0 to {count - 1}")
    return ids


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.parts[0].shape if isinstance(leaf, Stacks) else leaf.shape


def _parts(leaf: Any) -> tuple[tuple[int, ...], ...]:
    return leaf.layers if isinstance(leaf, Stacks) else (tuple(range(leaf.shape[0])),)


def attach(params: Params, adapters: Params, scale: float) -> Params:
    """Wraps every adapted weight in a `Lora` leaf; `leaves.dense` of it is the merged weight.

    A path that is adapted in some layers only, or whose layers differ in kind, becomes `Stacks`.
    """
    flat, pairs = tree.flatten(params), tree.flatten(adapters)
    paths = [p.removesuffix(".a") for p in pairs if p.endswith(".a")]
    new = {f"{p}.weight": _wrap(flat[f"{p}.weight"], pairs[f"{p}.a"], pairs[f"{p}.b"], scale) for p in paths}
    return tree.unflatten(flat | new)


def _wrap(w: Any, a: Any, b: Any, scale: float) -> Any:
    lora = lambda base, a, b: Lora(base, a, b, jnp.full(a.shape[:-2], scale, jnp.float32))
    if not isinstance(w, Stacks) and not isinstance(a, Stacks):
        return lora(w, a, b)
    count = sum(map(len, _parts(w)))
    w, a, b = (stacks(x, count) for x in (w, a, b))
    parts: dict[tuple[int, ...], Any] = {}
    for base, ids in zip(w.parts, w.layers, strict=True):
        view = lambda some, base=base, ids=ids: View(base, tuple(ids.index(i) for i in some))
        for a_part, b_part, on in zip(a.parts, b.parts, a.layers, strict=True):
            some = tuple(i for i in ids if i in on)
            if some:
                pick = np.asarray([on.index(i) for i in some])
                parts[some] = lora(view(some), a_part[pick], b_part[pick])
        rest = tuple(i for i in ids if not any(i in on for on in a.layers))
        if rest:
            parts[rest] = view(rest)
    return Stacks(tuple(parts.values()), tuple(parts))
