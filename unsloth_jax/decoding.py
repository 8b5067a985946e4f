"""What a layer remembers of what was read, and the two ways to read on: a prompt, then by token.

A prompt goes through scanned layers like a training row. A token goes through unrolled layers,
each with a cache of its own, which is written in place where it is donated.
"""

from functools import partial
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import causal_conv, decode_attention, recurrence
from pallas_kernels.attention import Rule
from unsloth_jax import unstack
from unsloth_jax.decoder import scan_layers
from unsloth_jax.dims import Params
from unsloth_jax.layers import Mixers, no_state, self_attention
from unsloth_jax.models import holds
from unsloth_jax.unstack import Unstacked

NAMES = ("keys", "values", "tails", "states")


@flax.struct.dataclass
class Cache:
    """What each layer keeps, one entry a layer, None where it has no use for such an array.

    Slot s of a row's keys and values holds the token at position s, or s after its prefix' last.
    """

    keys: tuple[Any, ...]  # [B, K, S, h] each
    values: tuple[Any, ...]  # [B, K, S, u] each
    tails: tuple[Any, ...]  # [B, taps - 1, C] each: what a convolution looks back at
    states: tuple[Any, ...]  # float32 [B, H, K, V] each: of a recurrence
    used: Any  # int32 [B]: tokens that were read
    context: Any  # int32 [B]: the document length that rotary scaling saw at the start
    prefixes: Any = None  # `Prefixes` where keys and values of prompts are held once for several

    @property
    def slots(self) -> int:
        return next(keys for keys in self.keys if keys is not None).shape[2]


@flax.struct.dataclass
class Prefixes:
    """Keys and values that rows have before their own, one entry a layer as in `Cache`."""

    keys: tuple[Any, ...]  # [P, K, T, h] each
    values: tuple[Any, ...]  # [P, K, T, u] each
    source: Any  # int32 [B]: each row's prefix
    length: Any  # int32 [B]: its tokens


def _shapes(family: ModuleType, c: Any, batch: int, attended: tuple[int, ...], dtype: Any):
    """{name: shape and dtype of the array, or None, of each layer}."""
    every = holds(family, c)
    new = jax.ShapeDtypeStruct
    lead = lambda shape, dtype: None if shape is None else new((batch, *shape), dtype)
    keys, values = (
        [lead((*attended, width) if one.attends else None, dtype) for one in every]
        for width in (c.head_width, c.v_width)
    )
    tails = [lead(one.tail, dtype) for one in every]
    states = [lead(one.state, jnp.float32) for one in every]
    return dict(zip(NAMES, (keys, values, tails, states), strict=True))


def empty(family: ModuleType, c: Any, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of `slots` tokens a row that holds none."""
    shapes = _shapes(family, c, batch, (c.kv_heads, slots), dtype)
    arrays = {
        name: tuple(x if x is None else jnp.zeros(x.shape, x.dtype) for x in layers)
        for name, layers in shapes.items()
    }
    none = lambda: jnp.zeros((batch,), jnp.int32)
    return Cache(**arrays, used=none(), context=none())


def prefixes(
    family: ModuleType, c: Any, batch: int, count: int, slots: int, dtype: Any
) -> Prefixes:
    """`count` empty prefixes of `slots` tokens for `batch` rows."""
    whole = empty(family, c, count, slots, dtype)
    none = lambda: jnp.zeros((batch,), jnp.int32)
    return Prefixes(whole.keys, whole.values, none(), none())


def roomier(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens a row; the given one's keys and values are deleted.

    One array at a time, so that no more than one is held twice. Not for use inside jit.
    """

    def wider(x):
        new = _padded(x, slots)
        x.delete()
        return new

    keys, values = (jax.tree.map(wider, xs) for xs in (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


@partial(jax.jit, static_argnums=1)
def _padded(x, slots):
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))


def prefill(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    slots: int,
    dtype: Any,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Final hidden states of prompts padded on the right, and a cache with room for `slots`.

    Hidden states of padding mean nothing; its slots are overwritten by the tokens that follow.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    by = family.angles(c, positions, jnp.broadcast_to(lengths[:, None], tokens.shape))
    mixers = _prompt_mixers(positions, lengths)
    shapes = _shapes(family, c, batch, (length, c.kv_heads), dtype)
    having = {name: [x is not None for x in layers] for name, layers in shapes.items()}

    def body(carry, kind, w, i):
        x, stacks = carry
        x, kept = family.block(c, kind, w, x, by, mixers)
        return x, stacks | {n: _put(stacks[n], new, having[n], i) for n, new in kept.items()}

    stacks = {name: _stack(layers) for name, layers in shapes.items()}
    x = family.embed(c, params, tokens)
    x, stacks = scan_layers(family, c, params, (x, stacks), body)
    room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    by_heads = lambda x: jnp.pad(x.swapaxes(1, 2), room)
    apart = lambda n, turn=lambda x: x: _apart(having[n], map(turn, stacks[n]))
    pairs = (apart(name, by_heads) for name in ("keys", "values"))
    cache = Cache(*pairs, apart("tails"), apart("states"), lengths, lengths)
    return family.norm(c, params, x), cache


def _prompt_mixers(positions: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Mixers:
    """Mixers of one document a row, which keep what its last token leaves behind."""
    inside = positions < lengths[:, None]
    segments, going_on = inside.astype(jnp.int32), jnp.zeros_like(inside)

    def attend(q, k, v, *, scale, window, cap=None, chunk=None, sinks=None):
        rule = Rule(scale, window, cap, 1, chunk)
        y = self_attention(rule, q, k, v, segments, positions, sinks)
        return y, {"keys": k, "values": v}

    def convolve(x, w, bias):
        past = w.shape[-1] - 1
        before = jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
        last = lengths[:, None] + jnp.arange(past, dtype=jnp.int32)[None]
        tail = jnp.take_along_axis(before, last[..., None], axis=1)
        return causal_conv.convolve(x, w, bias, going_on), {"tails": tail}

    def recur(q, k, v, decay, beta=None):
        # Padding without keys and decay leaves the state as it is.
        k = jnp.where(inside[..., None, None], k, 0)
        decay = jnp.where(inside[..., None], decay, 0)
        y, state = recurrence.recur(q, k, v, decay, beta, going_on, no_state(k, v))
        return y, {"states": state}

    return Mixers(attend, convolve, recur)


def _stack(layers):
    """Zeros for all layers that have an array, () where none has one."""
    there = [x for x in layers if x is not None]
    return jnp.zeros((len(there), *there[0].shape), there[0].dtype) if there else ()


def _put(stack, new, having, i):
    """The stack of those layers that have such an array with layer i's in its place."""
    at = i if all(having) else jnp.cumsum(jnp.asarray(having, jnp.int32))[i] - 1
    return jax.lax.dynamic_update_index_in_dim(stack, new.astype(stack.dtype), at, axis=0)


def _apart(having, arrays):
    """One array a layer, None for those that have none."""
    return tuple(next(arrays) if one else None for one in having)


def step(
    family: ModuleType,
    c: Any,
    params: Params | Unstacked,
    cache: Cache,
    tokens: Int[Array, " B"],
    grow: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Cache]:
    """Hidden states of one token a row, and the cache with it: S must be beyond `used`.

    Row b's token stays in the cache if grow[b] is 1; if 0, the next call overwrites it.
    """
    made = isinstance(params, Unstacked)
    rest = params.rest if made else params
    by = family.angles(c, cache.used[:, None], cache.context[:, None])
    arrays = {name: list(getattr(cache, name)) for name in NAMES}
    x, number = family.embed(c, rest, tokens[:, None]), None
    used = cache.used - (0 if cache.prefixes is None else cache.prefixes.length)
    if not made:
        number, x = unstack.after(0, x)
    for i, kind in enumerate(family.kinds(c)):
        w = params.layers[i] if made else unstack.layer(family, params, i, number)

        def mixed(y, i=i):
            nonlocal number
            if not made:
                # The next layer's weights wait for this: no more than two layers' are ever wide.
                number, y = unstack.after(i + 1, y)
            return y

        own = {name: layers[i] for name, layers in arrays.items()}
        mixers = _token_mixers(own, used, _shared(cache.prefixes, i), grow, mixed)
        x, kept = family.block(c, kind, w, x, by, mixers)
        for name, new in kept.items():
            arrays[name][i] = new
    layers = {name: tuple(xs) for name, xs in arrays.items()}
    cache = cache.replace(**layers, used=cache.used + grow)
    return family.norm(c, rest, x)[:, 0], cache


def _shared(prefixes: Prefixes | None, i: int) -> decode_attention.Shared | None:
    if prefixes is None or prefixes.keys[i] is None:
        return None
    layer = prefixes.keys[i], prefixes.values[i]
    return decode_attention.Shared(*layer, prefixes.source, prefixes.length)


def _token_mixers(own: dict[str, Any], used: Array, shared: Any, grow: Array, mixed: Any) -> Mixers:
    """Mixers of one token a row with what a layer's cache holds; `mixed` takes their values."""

    def stays(new, old):
        return jnp.where(grow.reshape(-1, *[1] * (new.ndim - 1)) > 0, new, old)

    def attend(q, k, v, *, scale, window, **rule):
        new = (one[:, 0] for one in (q, k, v))
        y, keys, values = decode_attention.attend(
            *new, own["keys"], own["values"], used, scale=scale, window=window, shared=shared,
            **rule,
        )  # fmt: skip
        return mixed(y).reshape(y.shape[0], 1, -1), {"keys": keys, "values": values}

    def convolve(x, w, bias):
        y, tail = causal_conv.step(x[:, 0], w, bias, own["tails"])
        return y[:, None], {"tails": stays(tail, own["tails"])}

    def recur(q, k, v, decay, beta=None):
        token = [x if x is None else x[:, 0] for x in (q, k, v, decay, beta)]
        y, state = recurrence.step(*token, own["states"])
        return mixed(y)[:, None], {"states": stays(state, own["states"])}

    return Mixers(attend, convolve, recur)
