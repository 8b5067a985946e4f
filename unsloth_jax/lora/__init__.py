"""LoRA as transforms of a parameter tree (arXiv:2106.09685). Model code never sees it.

adapters = init(key, params, rank=16, targets=("q_proj", "v_proj"))
attach(params, adapters, scaling(16, 16))     # train on it, sample from it, export it
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Apart, Lora, Stacks, Vacant, View, layer, map_stacks, norms, stacks
from unsloth_jax.lora.targets import TARGETS, Site, called, layer_count, named, sites

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
    or "all-linear": every linear module in a layer, no experts. Last names are taken as
    `targets.named` has them. `layers` limits the stacked ones to these layers.
    Raises ValueError for an unknown target or layer, or where they have no module in common,
    TypeError for a layer that is no integer.
    """
    known = sites(params)
    if targets == ALL_LINEAR:
        found = {p: site.layers for p, site in known.items() if site.layers and not site.experts}
    else:
        every = targets if isinstance(targets, str) else named(params, targets).targets
        found = _found(known, every)
    if layers is None:
        return found
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ValueError(
            f"layers_to_transform={layers} goes with a list of names, but target_modules is the "
            f"regular expression {targets!r}: name the layers in it"
        )
    wanted = _wanted(layers, layer_count(params))
    kept = {p: tuple(i for i in ids if i in wanted) for p, ids in found.items()}
    left = {p: ids for p, ids in kept.items() if ids or not known[p].layers}
    if not left:
        raise ValueError(
            f"layers_to_transform={layers} leaves nothing to adapt of target_modules={targets}; "
            f"these are in {found}"
        )
    return left


def _found(known: dict[str, Site], targets: Sequence[str] | str) -> dict[str, tuple[int, ...]]:
    single = [targets] if isinstance(targets, str) else [(t,) for t in targets]
    tests = [tree.matcher(t) for t in single]
    hit = lambda alike: any(test(name) for test in tests for name in alike)
    names = {p: [[x.replace("*", i, 1) for x in called(p)] for i in site.names]
             for p, site in known.items()}  # fmt: skip
    hits = {p: [n for n, alike in enumerate(xs) if hit(alike)] for p, xs in names.items()}
    if not any(hits.values()):
        raise ValueError(f"target modules {targets!r} match nothing; there are {[*known]}")
    return {p: tuple(known[p].layers[n] for n in ids if known[p].layers)
            for p, ids in hits.items() if ids}  # fmt: skip


def init(
    key: jax.Array,
    params: Params,
    rank: int,
    targets: Sequence[str] | str = TARGETS,
    layers: Sequence[int] | None = None,
    start: bool | str = True,
) -> Params:
    """A pair {a [*stack, r, I], b [*stack, O, r]} for every target, float32, `b` zero.

    Experts have an axis of their own after the layers', and gate and up one pair together.

    A stacked target that only some layers have gets a pair for these: no pair exists for others.
    Raises ValueError for an unknown start, rank, target or layer.
    """
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} does not leave the base as it is; supported: "
            f"{list(STARTS)}, see `starts.begin` for others"
        )
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA rank must be a positive integer, got {rank!r}")
    chosen, known, out = modules(params, targets, layers), sites(params), {}
    every = tuple(range(layer_count(params)))
    for at, (path, ids) in zip(jax.random.split(key, len(chosen)), chosen.items(), strict=True):
        site = known[path]
        lead = (*([len(ids)] if ids else []), *([site.experts] if site.experts else []))
        a = STARTS[start](at, (*lead, rank, site.width), rank)
        b = jnp.zeros((*lead, sum(site.heights), rank))
        whole = ids in ((), every)
        out[f"{path}.a"], out[f"{path}.b"] = (x if whole else Stacks((x,), (ids,)) for x in (a, b))
    return tree.unflatten(out)


def magnitudes(params: Params, adapters: Params, scale: float) -> Params:
    """The adapters with a `magnitude` [*stack, O] beside each pair: DoRA's (arXiv:2402.09353).

    Each is the norm of a row of base plus adapter, so that at first it changes nothing.
    """
    own = parts(adapters)[0]
    attached = tree.flatten(attach(params, adapters, scale))
    for path in [p.removesuffix(".a") for p in own if p.endswith(".a")]:
        leaf, a = attached[f"{path}.weight"], own[f"{path}.a"]
        rows = lambda ids, leaf=leaf: jnp.stack([_norms(layer(leaf, i)) for i in ids])
        if isinstance(a, Stacks):
            own[f"{path}.magnitude"] = Stacks(tuple(map(rows, a.layers)), a.layers)
        else:
            own[f"{path}.magnitude"] = rows(range(a.shape[0])) if a.ndim == 3 else _norms(leaf)
    return tree.unflatten(tree.flatten(adapters) | own)


_norms = jax.jit(norms)


def difference(adapters: Params, initial: Params) -> Params:
    """Pairs of twice the rank that add what training changed: b a - b0 a0, at the same scale.

    For starts that took the initial pair out of the base. Raises ValueError with magnitudes,
    whose effect is no difference of products.
    """
    (now, whole), was = parts(adapters), parts(initial)[0]
    if any(path.endswith(".magnitude") for path in now) or now.keys() != was.keys():
        raise ValueError(
            "only plain pairs can be written as a difference to the base, with the pairs that "
            "training began from; DoRA's magnitudes can't: merge with base='dequant4'"
        )

    def both(path, new):
        old = was[path] if path.endswith(".a") else jax.tree.map(jnp.negative, was[path])
        axis = -2 if path.endswith(".a") else -1
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis), new, old)

    return tree.unflatten({path: both(path, x) for path, x in now.items()} | whole)


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


def attach(
    params: Params,
    adapters: Params,
    scale: float,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Params:
    """Wraps every adapted weight in a `Lora` leaf; `leaves.dense` of it is the merged weight.

    Weights that are trained as they are (`lora.trained`) take the place of those in `params`.
    A path that is adapted in some layers only, or whose layers differ in kind, becomes `Stacks`.
    `dropout` is the share of an adapter's input that is dropped, by a draw of `key` for each
    module and layer: give another key each step, and none to evaluate. Raises ValueError for a
    share that is none, or without its key.
    """
    if not 0 <= dropout < 1 or (dropout and key is None):
        raise ValueError(f"dropout is a share from 0 below 1, with a key; got {dropout}, key {key}")
    own, whole = parts(adapters)
    flat, new, known = tree.flatten(overlay(params, whole)), {}, sites(params)
    for path in (p.removesuffix(".a") for p in own if p.endswith(".a")):
        pair = Pair(own[f"{path}.a"], own[f"{path}.b"], own.get(f"{path}.magnitude"))
        if known[path].experts and (dropout or pair.magnitude is not None):
            raise ValueError(f"{path}: adapters of experts know neither dropout nor DoRA")
        if dropout:
            pair = pair._replace(key=_keys(key, path, pair.a))
        at = 0
        for name, height in zip(known[path].weights, known[path].heights, strict=True):
            rows = slice(at, at := at + height)
            part = pair if len(known[path].weights) == 1 else pair._replace(b=_rows(pair.b, rows))
            new[name] = _wrap(flat[name], part, lambda base, p: _lora(base, p, scale, dropout))
    return tree.unflatten(flat | new)


def _rows(b: Any, rows: slice) -> Any:
    return map_stacks(lambda x: x[..., rows, :], b)


def parts(trainable: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what belongs to pairs, weights that are trained as they are) of a trainable tree, flat."""
    flat = tree.flatten(trainable)
    own = {p: x for p, x in flat.items() if p.rpartition(".")[2] in Pair._fields}
    whole = {p: x for p, x in flat.items() if p not in own}
    twice = sorted(p for p in whole if f"{p.rpartition('.')[0]}.a" in own)
    if twice:
        raise ValueError(f"{twice} are trained as they are and have adapters: choose one")
    return own, whole


def overlay(params: Params, trained: Mapping[str, Any]) -> Params:
    """The tree with trained weights (by path) in their places, in the dtypes of those there.

    Raises ValueError for a path that is not there, another shape or kind of leaf.
    """
    flat = tree.flatten(params)
    return tree.unflatten(flat | {p: _placed(p, x, flat.get(p)) for p, x in trained.items()})


def _placed(path: str, new: Any, old: Any) -> Any:
    if isinstance(new, Stacks) and isinstance(old, Stacks) and new.layers == old.layers:
        both = zip(new.parts, old.parts, strict=True)
        return old.replace(parts=tuple(_placed(path, x, y) for x, y in both))
    says = lambda x: f"{type(x).__name__} {getattr(x, 'shape', '')}"
    fits = isinstance(old, Vacant | jax.Array | np.ndarray) and not isinstance(new, Stacks)
    if not fits or old.shape != new.shape:
        raise ValueError(
            f"{path} is trained as {says(new)}, but its place holds {says(old)}; expected a float "
            "array of the same shape on the device"
        )
    return new.astype(old.dtype)


class Pair(NamedTuple):
    """What belongs to one weight, of leaves alike: arrays or `Stacks` of the same layers."""

    a: Any
    b: Any
    magnitude: Any = None
    key: Any = None


def _lora(base: Any, pair: Pair, scale: float, dropout: float) -> Lora:
    if pair.magnitude is not None or pair.key is not None:
        base = Apart(base, pair.magnitude, pair.key, dropout)
    return Lora(base, pair.a, pair.b, jnp.full(pair.a.shape[:-2], scale, jnp.float32))


def _keys(key: jax.Array, path: str, a: Any) -> Any:
    """A key of its own for the module, or for each of its layers, by name and layer number."""
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    fold = lambda ids: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(ids, jnp.uint32))
    if isinstance(a, Stacks):
        return Stacks(tuple(map(fold, a.layers)), a.layers)
    return fold(range(a.shape[0])) if a.ndim == 3 else key


def _wrap(w: Any, pair: Pair, lora: Callable[[Any, Pair], Any]) -> Any:
    if not isinstance(w, Stacks) and not isinstance(pair.a, Stacks):
        return lora(w, pair)
    count = w.shape[0] if not isinstance(w, Stacks) else sum(map(len, w.layers))
    w, *own = (stacks(x, count) for x in (w, *(x for x in pair if x is not None)))
    on = own[0].layers
    parts: dict[tuple[int, ...], Any] = {}
    for base, ids in zip(w.parts, w.layers, strict=True):
        view = lambda some, base=base, ids=ids: View(base, tuple(ids.index(i) for i in some))
        for n, adapted in enumerate(on):
            some = tuple(i for i in ids if i in adapted)
            if some:
                pick = np.asarray([adapted.index(i) for i in some])
                here = iter([x.parts[n][pick] for x in own])
                parts[some] = lora(
                    view(some), Pair(*(x if x is None else next(here) for x in pair))
                )
        rest = tuple(i for i in ids if not any(i in adapted for adapted in on))
        if rest:
            parts[rest] = view(rest)
    return Stacks(tuple(parts.values()), tuple(parts))
