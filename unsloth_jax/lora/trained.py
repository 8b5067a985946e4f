"""Weights that are trained as they are: embeddings, heads, norms, or all of them.

They stand in the trainable tree by their own paths, beside pairs or alone, in float32 however few
bits the model computes in; `lora.attach` puts them in their places.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from unsloth_jax import lora, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Vacant, map_stacks

EVERYTHING = "all"
EMBEDDING, HEAD = "embed_tokens", "lm_head"


def init(
    params: Params, modules: Sequence[str] | Literal["all"], dtype: Any = jnp.float32
) -> Params:
    """Copies of the weights and biases of `modules`, named as in `modules_to_save`; "all" of all.

    What balances experts is no parameter, in transformers neither, and stays as it is.
    A tied head is the embedding: there "lm_head" beside "embed_tokens" adds nothing, and both uses
    are trained. Raises ValueError for a name that is not there, for "lm_head" alone where it is
    tied, and for quantized weights.
    """
    flat = tree.flatten(params)
    paths = [*flat] if modules == EVERYTHING else _named(flat, modules)
    found = {path: flat[path] for path in paths if not tree.of_correction(path)}
    broken = {p: _kinds(leaf) for p, leaf in found.items() if set(_kinds(leaf)) != {"float array"}}
    if broken:
        raise ValueError(
            f"only float arrays on the device can be trained as they are, but there are {broken}: "
            "load with load_in_16bit=True, or train adapters"
        )
    copy = lambda leaf: map_stacks(lambda x: jnp.array(x, dtype, copy=True), leaf)
    return tree.unflatten({path: copy(leaf) for path, leaf in found.items()})


def _named(flat: dict[str, Any], modules: Sequence[str]) -> list[str]:
    if isinstance(modules, str) or not modules:
        raise ValueError(f"modules to train are a list of names or {EVERYTHING!r}, got {modules!r}")
    owners = {path: path.rpartition(".")[0] for path in flat}
    hits = {name: [p for p in flat if tree.matcher((name,))(owners[p])] for name in modules}
    absent = [name for name, paths in hits.items() if not paths]
    if absent == [HEAD] and EMBEDDING in modules:
        absent = []
    if absent:
        tied = f"; {HEAD!r} is tied: name {EMBEDDING!r} too" if HEAD in absent else ""
        known = sorted({owner.rpartition(".")[2] for owner in owners.values()})
        raise ValueError(f"there are no modules {absent}{tied}; there are {known}")
    wanted = {p for paths in hits.values() for p in paths}
    return [p for p in flat if p in wanted]


def _kinds(leaf: Any) -> list[str]:
    kinds: list[str] = []

    def note(x):
        plain = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        kinds.append("float array" if plain else type(x).__name__)
        return x

    map_stacks(note, leaf)
    return kinds


def vacated(params: Params, trained: Params) -> Params:
    """The frozen tree with `Vacant` in the place of what `trained` holds, so that it can be freed.

    Pairs in `trained` leave their weights where they are.
    """
    flat, own = tree.flatten(params), lora.parts(trained)[1]
    gone = lambda x: Vacant(x.shape, jnp.dtype(x.dtype).name)
    return tree.unflatten({p: map_stacks(gone, x) if p in own else x for p, x in flat.items()})


def resize(
    params: Params,
    count: int,
    key: jax.Array,
    how: str = "mean",
    deviation: float = 0.02,
) -> Params:
    """The tree with a vocabulary of `count`: embedding, head and its bias get or lose last rows.

    "mean" draws new rows from N(mean, 1e-9 covariance) of the old ones, each table from its own,
    as transformers' `mean_resizing=True`; where it finds that covariance singular it takes the
    mean itself. "normal" is N(0, deviation^2), its `mean_resizing=False`. A tied head stays tied.
    Raises ValueError for a count under 1, an unknown `how`, or tables that are no arrays.
    """
    if count < 1 or how not in ("mean", "normal"):
        raise ValueError(
            f"resize takes 1 row or more and how='mean' or 'normal', got {count}, {how!r}"
        )
    flat = tree.flatten(params)
    ends = (f"{EMBEDDING}.weight", f"{HEAD}.weight", f"{HEAD}.bias")
    tables = [p for p in flat if p.endswith(ends)]
    wrong = [p for p in tables if not isinstance(flat[p], jax.Array)]
    if wrong or not tables:
        raise ValueError(f"no arrays to resize in {wrong or [*flat]}")
    for path, at in zip(tables, jax.random.split(key, len(tables)), strict=True):
        flat[path] = _resized(flat[path], count, at, how, deviation)
    return tree.unflatten(flat)


def _resized(old: Array, count: int, key: jax.Array, how: str, deviation: float) -> Array:
    added = count - old.shape[0]
    if added <= 0:
        return old[:count]
    if old.ndim == 1 and how == "normal":
        new = jnp.zeros((added,))
    elif how == "normal":
        new = deviation * jax.random.normal(key, (added, *old.shape[1:]))
    else:
        new = _like(key, old, added)
    return jnp.concatenate([old, new.astype(old.dtype)])


def _like(key: jax.Array, old: Array, added: int) -> Array:
    """Draws of N(mean, 1e-9 covariance): random sums of centred rows have that covariance."""
    wide = old.astype(jnp.float32)
    mean = wide.mean(0, keepdims=True)
    if old.ndim == 1:
        return mean + 1e-9 * wide.std(ddof=1) * jax.random.normal(key, (added,))
    weights = jax.random.normal(key, (added, old.shape[0])) * (1e-9 / old.shape[0]) ** 0.5
    return mean + weights @ (wide - mean)
