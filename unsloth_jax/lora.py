"""LoRA as transforms of a parameter tree (arXiv:2106.09685). Model code never sees it.

adapters = init(key, params, rank=16, targets=("q_proj", "v_proj"))
attach(params, adapters, scaling(16, 16))     # train on it, sample from it, export it
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
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


def scaling(alpha: float | int, rank: int, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def modules(
    params: Params, targets: Sequence[str] | str, layers: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Path of each module to adapt -> its layers, () where it isn't stacked, in the tree's order.

    `targets` are last names, a regular expression over full names (`model.layers.0.mlp.up_proj`)
    or "all-linear": every matrix in a layer. `layers` limits the stacked ones to these layers.
    Raises ValueError for a target or layer that is not there, or where they have no module in
    common, TypeError for a layer that is no integer.
    """
    counts = _matrices(params)
    if targets == ALL_LINEAR:
        found = {p: tuple(range(n)) for p, n in counts.items() if n}
    else:
        found = _found(counts, targets)
    if layers is None:
        return found
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ValueError(
            f"layers_to_transform={layers} goes with a list of names, but target_modules is the "
            f"regular expression {targets!r}: name the layers in it"
        )
    wanted = _wanted(layers, max(counts.values()))
    kept = {p: tuple(i for i in ids if i in wanted) for p, ids in found.items()}
    left = {p: ids for p, ids in kept.items() if ids or not counts[p]}
    if not left:
        raise ValueError(
            f"layers_to_transform={layers} leaves nothing to adapt of target_modules={targets}; "
            f"these are in {found}"
        )
    return left


def _matrices(params: Params) -> dict[str, int]:
    """Path of each module with a matrix -> how many layers it has, 0 where it isn't stacked."""
    out = {}
    for path, leaf in tree.flatten(params).items():
        stacked = ".*." in path
        if path.endswith(".weight") and len(_shape(leaf)) == 2 + stacked:
            out[path.removesuffix(".weight")] = sum(map(len, _parts(leaf))) if stacked else 0
    return out


def _found(counts: dict[str, int], targets: Sequence[str] | str) -> dict[str, tuple[int, ...]]:
    single = [targets] if isinstance(targets, str) else [(t,) for t in targets]
    tests = {t: tree.matcher(t) for t in single}
    names = {p: [p.replace("*", str(i), 1) for i in range(n or 1)] for p, n in counts.items()}
    every = [name for xs in names.values() for name in xs]
    absent = [t for t, test in tests.items() if not any(map(test, every))]
    if absent or not tests:
        raise ValueError(f"target modules {absent or targets} match nothing; there are {[*counts]}")
    hits = {
        p: [i for i, name in enumerate(xs) if any(test(name) for test in tests.values())]
        for p, xs in names.items()
    }
    return {p: tuple(ids) if counts[p] else () for p, ids in hits.items() if ids}


def init(
    key: jax.Array,
    params: Params,
    rank: int,
    targets: Sequence[str] | str = TARGETS,
    layers: Sequence[int] | None = None,
    start: bool | str = True,
) -> Params:
    """A pair {a [*stack, r, I], b [*stack, O, r]} for every target, float32, `b` zero.

    A stacked target that only some layers have gets a pair for these: no pair exists for others.
    Raises ValueError for an unknown start, rank, target or layer.
    """
    if start not in STARTS:
        raise ValueError(f"init_lora_weights={start!r} is not supported; supported: {list(STARTS)}")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA rank must be a positive integer, got {rank!r}")
    flat, out = tree.flatten(params), {}
    chosen, counts = modules(params, targets, layers), _matrices(params)
    for at, (path, ids) in zip(jax.random.split(key, len(chosen)), chosen.items(), strict=True):
        *_, height, width = _shape(flat[f"{path}.weight"])
        lead = (len(ids),) if ids else ()
        a = STARTS[start](at, (*lead, rank, width), rank)
        b = jnp.zeros((*lead, height, rank))
        whole = len(ids) == counts[path]
        out[f"{path}.a"], out[f"{path}.b"] = (x if whole else Stacks((x,), (ids,)) for x in (a, b))
    return tree.unflatten(out)


def _wanted(layers: Sequence[int], count: int) -> tuple[int, ...]:
    wrong = [i for i in layers if not isinstance(i, Integral) or isinstance(i, bool)]
    if wrong:
        raise TypeError(f"layers_to_transform={layers} must be integers, got {wrong}")
    outside = [i for i in layers if not 0 <= i < count]
    if outside or not layers:
        raise ValueError(
            f"layers_to_transform={layers} names {outside or 'no layer'}; "
            f"there are 0 to {count - 1}"
        )
    return tuple(sorted(set(layers)))


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
    new = {
        f"{p}.weight": _wrap(flat[f"{p}.weight"], pairs[f"{p}.a"], pairs[f"{p}.b"], scale)
        for p in paths
    }
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
