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
from unsloth_jax.leaves import Apart, Lora, Stacks, Vacant, View, layer, norms, stacks

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
        matrix = path.endswith(".weight") and not tree.of_norm(path)
        if matrix and len(_shape(leaf)) == 2 + stacked:
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
        raise ValueError(
            f"init_lora_weights={start!r} does not leave the base as it is; supported: "
            f"{list(STARTS)}, see `starts.begin` for others"
        )
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


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.parts[0].shape if isinstance(leaf, Stacks) else leaf.shape


def _parts(leaf: Any) -> tuple[tuple[int, ...], ...]:
    return leaf.layers if isinstance(leaf, Stacks) else (tuple(range(leaf.shape[0])),)


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
    flat, new = tree.flatten(overlay(params, whole)), {}
    for path in (p.removesuffix(".a") for p in own if p.endswith(".a")):
        w, pair = flat[f"{path}.weight"], Pair(own[f"{path}.a"], own[f"{path}.b"])
        pair = pair._replace(magnitude=own.get(f"{path}.magnitude"))
        if dropout:
            pair = pair._replace(key=_keys(key, path, pair.a))
        new[f"{path}.weight"] = _wrap(w, pair, lambda base, pair: _lora(base, pair, scale, dropout))
    return tree.unflatten(flat | new)


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
    count = sum(map(len, _parts(w)))
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
