"""The loop over layers, shared by every family: training forward, prefill and decoding.

Layers are scanned in groups: runs of a repeating pattern of layers alike in kind, leaves and
adapters. Quantized stacks stay whole and are read by layer number, so they are never cut or
copied; arrays and adapters travel through the scan, so their gradients don't accumulate.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.layers import attention, causal_mask
from unsloth_jax.leaves import Lora, Quantized, View, layer, scores, stacks

LONGEST_PATTERN = 8


class Group(NamedTuple):
    """Layers `start`, ... in `repeats` rounds of `period` layers each."""

    start: int
    period: int
    repeats: int


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer; slot s of a row holds the token at position s."""

    k: Any  # [L, B, S, K, h]
    v: Any  # [L, B, S, K, h]
    used: Any  # int32 [B]: slots that hold tokens
    context: Any  # int32 [B]: the document length that rotary scaling saw at the start


def groups(kinds: tuple, flat: dict[str, Any]) -> list[Group]:
    """Cuts the layers, from the first on, each time into the longest run of a repeated pattern."""
    count = len(kinds)
    parts = {path: stacks(leaf, count).layers for path, leaf in flat.items()}
    owner = {p: {i: n for n, ids in enumerate(layers) for i in ids} for p, layers in parts.items()}
    signs = [(kinds[i], *(owner[p].get(i) for p in flat)) for i in range(count)]
    out, at = [], 0
    while at < count:
        best = Group(at, 1, 1)
        for period in range(1, min(LONGEST_PATTERN, count - at) + 1):
            repeats = 1
            while signs[at + repeats * period :][:period] == signs[at : at + period]:
                repeats += 1
            if (repeats > 1 or period == 1) and repeats * period > best.period * best.repeats:
                best = Group(at, period, repeats)
        out.append(best)
        at += best.period * best.repeats
    return out


def take(x: Array, at: list[int]) -> Array:
    """Layers `at` of a stack, without a copy where they are the whole of it."""
    if at == list(range(x.shape[0])):
        return x
    step = at[1] - at[0] if len(at) > 1 else 1
    if step > 0 and at == list(range(at[0], at[-1] + 1, step)):
        return x[at[0] : at[-1] + 1 : step]
    return x[np.asarray(at)]


def split(leaf: Any, at: list[int]) -> tuple[Any, Callable[[Any], Any]]:
    """(what the scan carries along for layers `at`, how a slice of it becomes the layer's leaf)."""
    if isinstance(leaf, Lora):
        base, rebuild = split(leaf.base, at)
        own = tuple(take(x, at) for x in (leaf.a, leaf.b, leaf.scale))
        return (base, own), lambda xs: Lora(rebuild(xs[0]), *xs[1])
    if isinstance(leaf, View):
        return split(leaf.stack, [leaf.at[i] for i in at])
    if isinstance(leaf, Quantized):
        return jnp.asarray(at, jnp.int32), lambda i: layer(leaf, i)
    return take(leaf, at), lambda x: x


def not_read(primitive: Any, *_, **__) -> bool:
    """A remat policy that saves everything but what was read from a stack by layer number."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def scan_layers(
    family: ModuleType,
    c: Any,
    params: Params,
    carry: Any,
    body: Callable,
    wrap: Callable = lambda layer: layer,
) -> Any:
    """Folds `body(carry, kind, weights, layer number) -> carry` over all layers.

    `wrap` goes around a layer and the reading of its weights.
    """
    node = params
    for key in family.LAYERS.split("."):
        node = node[key]
    flat, kinds = tree.flatten(node["*"]), family.kinds(c)
    for g in groups(kinds, flat):
        rounds = [
            range(g.start + j, g.start + g.period * g.repeats, g.period) for j in range(g.period)
        ]
        xs, rebuilds = [], []
        for ids in rounds:
            here = {}
            for path, leaf in flat.items():
                s = stacks(leaf, len(kinds))
                n = next((n for n, layers in enumerate(s.layers) if ids[0] in layers), None)
                if n is not None:
                    here[path] = split(s.parts[n], [s.layers[n].index(i) for i in ids])
            xs.append(({p: x for p, (x, _) in here.items()}, jnp.asarray(list(ids), jnp.int32)))
            rebuilds.append({p: build for p, (_, build) in here.items()})

        def step(carry, xs, g=g, rebuilds=rebuilds):
            for j, (flat_xs, i) in enumerate(xs):
                one = lambda carry, flat_xs, i, j=j: body(
                    carry,
                    kinds[g.start + j],
                    tree.unflatten({p: rebuilds[j][p](x) for p, x in flat_xs.items()}),
                    i,
                )
                carry = wrap(one)(carry, flat_xs, i)
            return carry, None

        carry, _ = jax.lax.scan(step, carry, xs)
    return carry


def document_lengths(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its row share each token's segment."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.sum(-1, dtype=jnp.int32)


def forward(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Tokens to final hidden states; `logits` turns those into scores.

    `remat` recomputes each layer in the backward pass, so that only its input is kept.
    """
    by = family.angles(c, positions, document_lengths(segments))

    def body(x, kind, w, i):
        def attend(q, k, v, *, scale, window):
            mask = causal_mask(positions, segments, positions, segments, window)
            return attention(q, k, v, mask, scale), None

        return family.block(c, kind, w, x, by, attend)[0]

    # Quantized bytes read outside would be saved layer by layer: a second copy of the base.
    policy = None if remat else not_read
    wrap = partial(jax.checkpoint, prevent_cse=False, policy=policy)
    x = family.embed(c, params, tokens)
    return family.norm(c, params, scan_layers(family, c, params, x, body, wrap))


def logits(
    family: ModuleType, c: Any, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Scores of every token of the vocabulary, float32."""
    return scores(family.head(c, params), hidden)


def empty_cache(c: Any, batch: int, slots: int, dtype=jnp.bfloat16) -> Cache:
    """A cache of `slots` tokens a row."""
    kv = jnp.zeros((c.layers, batch, slots, c.kv_heads, c.head_width), dtype)
    none = jnp.zeros((batch,), jnp.int32)
    return Cache(kv, kv, none, none)


def extend(
    family: ModuleType,
    c: Any,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Cache]:
    """`forward` for tokens that continue a cache: prefill with many, decode with one.

    Row b adds its first `lengths[b]` tokens; what follows is padding, whose hidden states mean
    nothing and whose slots the next call overwrites.
    """
    batch, new = tokens.shape
    fresh = jnp.where(cache.used == 0, lengths, cache.context)
    positions = cache.used[:, None] + jnp.arange(new, dtype=jnp.int32)[None]
    slots = jnp.broadcast_to(
        jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None], (batch, cache.k.shape[2])
    )
    rows = jnp.arange(batch)[:, None]
    by = family.angles(c, positions, jnp.broadcast_to(fresh[:, None], (batch, new)))
    one = lambda x: jnp.ones_like(x)

    def body(carry, kind, w, i):
        x, k_all, v_all = carry

        def attend(q, k, v, *, scale, window):
            put = lambda old, x: old.at[i, rows, positions].set(x.astype(old.dtype), mode="drop")
            kept = put(k_all, k), put(v_all, v)
            keys, values = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in kept)
            mask = causal_mask(positions, one(positions), slots, one(slots), window)
            return attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask, scale), kept

        x, kept = family.block(c, kind, w, x, by, attend)
        return x, *kept

    x = family.embed(c, params, tokens)
    x, k, v = scan_layers(family, c, params, (x, cache.k, cache.v), body)
    return family.norm(c, params, x), Cache(k, v, cache.used + lengths, fresh)
