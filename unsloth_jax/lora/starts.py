"""Adapters that start from the weights they belong to, which changes these weights.

PiSSA (arXiv:2404.02948) moves the largest singular directions of W into the pair. LoftQ
(arXiv:2310.08659) puts NF4 in the place of W and starts the pair at what that loses. Numbers as
peft 0.21 has them: `pissa_init`, `loftq_init`.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unsloth_jax import lora, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks, stacks
from unsloth_jax.lora.targets import sites
from unsloth_jax.quant import nf4

PISSA = re.compile(r"pissa(?:_niter_([1-9]\d*))?")
LOFTQ = "loftq"
KNOWN = (*lora.STARTS, "pissa", "pissa_niter_<steps>", LOFTQ)


class Start(NamedTuple):
    """The trees to train with; `initial` is None where the base is as it was."""

    params: Params
    adapters: Params
    initial: Params | None


def changes_base(start: bool | str) -> bool:
    """Whether `init_lora_weights=start` gives other weights to train on than those loaded."""
    return isinstance(start, str) and (start == LOFTQ or PISSA.fullmatch(start) is not None)


def begin(
    key: jax.Array,
    params: Params,
    rank: int,
    targets: Sequence[str] | str = lora.TARGETS,
    layers: Sequence[int] | None = None,
    start: bool | str = True,
    *,
    scale: float = 1.0,
    dora: bool = False,
    iterations: int = 1,
) -> Start:
    """Adapters by any start, and the weights to train them on.

    After PiSSA base plus adapter is what the base was. LoftQ's pair is written for a `scale` of
    1, as in PEFT; its `iterations` go between NF4 and the pair. Layers without an adapter keep
    their weight. Raises ValueError for an unknown start, and for one that needs numbers where
    the weights are quantized.
    """
    if not changes_base(start):
        if start not in lora.STARTS:
            raise ValueError(f"init_lora_weights={start!r} is not supported; supported: {KNOWN}")
        adapters = lora.init(key, params, rank, targets, layers, start)
        return Start(params, lora.magnitudes(params, adapters, scale) if dora else adapters, None)
    if iterations < 1:
        raise ValueError(f"LoftQ takes one iteration or more, got {iterations}")
    plain = lora.init(key, params, rank, targets, layers)
    flat, own = tree.flatten(params), tree.flatten(plain)
    paths = [p.removesuffix(".a") for p in own if p.endswith(".a")]
    known = sites(params)
    experts = [p for p in paths if known[p].experts]
    if experts:
        raise ValueError(f"init_lora_weights={start!r} is not supported for experts: {experts}")
    for path, at in zip(paths, jax.random.split(key, len(paths)), strict=True):
        w = flat[f"{path}.weight"]
        _check(path, w, rank, start)
        split = partial(_split, start, rank, scale, iterations, at)
        flat[f"{path}.weight"], *pair = _in_layers(w, own[f"{path}.a"], split)
        own[f"{path}.a"], own[f"{path}.b"] = pair
    changed, adapters = tree.unflatten(flat), tree.unflatten(own)
    adapters = lora.magnitudes(changed, adapters, scale) if dora else adapters
    return Start(changed, adapters, adapters)


def _check(path: str, w: Any, rank: int, start: str) -> None:
    parts = w.parts if isinstance(w, Stacks) else (w,)
    kinds = sorted({type(part).__name__ for part in parts if not isinstance(part, jax.Array)})
    if kinds:
        raise ValueError(
            f"init_lora_weights={start!r} starts from weights in 16 or 32 bits, but {path} is "
            f"{', '.join(kinds)}: load with load_in_16bit=True"
        )
    if rank > min(parts[0].shape[-2:]):
        raise ValueError(
            f"init_lora_weights={start!r} takes ranks up to the smaller side of a weight, but "
            f"{path} is {parts[0].shape[-2:]} and the rank {rank}"
        )


def _in_layers(w: Any, a: Any, split: Callable[[Array, Any], tuple]) -> tuple[Any, Any, Any]:
    """(weight, a, b) of `split(matrix, layer)` for each layer that `a` has."""
    if not isinstance(a, Stacks) and a.ndim == 2:
        return split(w, 0)
    count = w.shape[0] if not isinstance(w, Stacks) else sum(map(len, w.layers))
    whole, on = stacks(w, count), stacks(a, count).layers
    adapted = {i for ids in on for i in ids}
    of = {i: part[ids.index(i)] for part, ids in zip(whole.parts, whole.layers, strict=True)
          for i in ids}  # fmt: skip
    made = {i: split(of[i], i) if i in adapted else (of[i],) for i in sorted(of)}
    stack = lambda ids, n: jax.tree.map(lambda *xs: jnp.stack(xs), *(made[i][n] for i in ids))
    pair = (tuple(stack(ids, n) for ids in on) for n in (1, 2))
    a, b = (Stacks(x, on) if isinstance(a, Stacks) else x[0] for x in pair)
    kinds: dict[Any, list[int]] = {}
    for i, (weight, *_) in made.items():
        leaves = jax.tree.leaves(weight)
        kind = jax.tree.structure(weight), *((x.shape, x.dtype) for x in leaves)
        kinds.setdefault(kind, []).append(i)
    parts = tuple(stack(ids, 0) for ids in kinds.values())
    every = len(parts) == 1 and sorted(of) == list(range(count))
    return parts[0] if every else Stacks(parts, tuple(map(tuple, kinds.values()))), a, b


def _split(start, rank, scale, iterations, key, w, i):
    if start == LOFTQ:
        return _loftq(w, rank, iterations)
    steps = PISSA.fullmatch(start)[1]
    return _pissa(jax.random.fold_in(key, i), w, rank, scale, steps and int(steps))


@partial(jax.jit, static_argnames=("rank", "steps"))
def _pissa(key, w, rank, scale, steps):
    """(W - scale b a in W's dtype, a, b): b a is W's best approximation of this rank / scale."""
    wide = w.astype(jnp.float32)
    u, s, v = jnp.linalg.svd(wide, full_matrices=False) if steps is None else lowrank(
        key, wide, rank, steps
    )  # fmt: skip
    root = jnp.sqrt(s[:rank] / scale)
    a, b = root[:, None] * v[:rank], u[:, :rank] * root[None]
    return (wide - scale * (b @ a)).astype(w.dtype), a, b


def lowrank(
    key: jax.Array, w: Float[Array, "O I"], rank: int, steps: int
) -> tuple[Float[Array, "O r"], Float[Array, " r"], Float[Array, "r I"]]:
    """The largest singular triples by a random basis and `steps` subspace iterations.

    Halko, Martinsson, Tropp (arXiv:0909.4061), algorithms 4.4 and 5.1.
    """
    basis = lambda x: jnp.linalg.qr(x)[0]
    q = basis(w @ jax.random.normal(key, (w.shape[1], rank)))
    for _ in range(steps):
        q = basis(w @ basis(w.T @ q))
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, v


@partial(jax.jit, static_argnames=("rank", "iterations"))
def _loftq(w, rank, iterations):
    """(NF4 that dequantizes to W's dtype, a, b): b a approximates what NF4 loses of W."""
    wide = w.astype(jnp.float32)
    rest = wide
    for _ in range(iterations):
        packed = nf4.quantize(rest, double=False)
        u, s, v = jnp.linalg.svd(wide - packed.dequantize(), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = root[:, None] * v[:rank], u[:, :rank] * root[None]
        rest = wide - b @ a
    return packed.replace(dtype=jnp.dtype(w.dtype).name), a, b
