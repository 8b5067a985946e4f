"""Keys and values of what was read, and the two ways to read on: a prompt, then token by token.

A prompt goes through scanned layers like a training row. A token goes through unrolled layers,
each with a cache of its own, which is written in place where it is donated.
"""

from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import decode_attention
from pallas_kernels.attention import Rule
from unsloth_jax import unstack
from unsloth_jax.decoder import scan_layers
from unsloth_jax.dims import Params
from unsloth_jax.layers import self_attention
from unsloth_jax.unstack import Unstacked


@flax.struct.dataclass
class Cache:
    """Keys and values, a pair of arrays a layer; slot s of a row holds the token at position s."""

    keys: tuple[Any, ...]  # [B, K, S, h] each
    values: tuple[Any, ...]  # [B, K, S, u]
    used: Any  # int32 [B]: slots that hold tokens
    context: Any  # int32 [B]: the document length that rotary scaling saw at the start

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]


def empty(c: Any, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of `slots` tokens a row that holds none."""
    zeros = lambda width: jnp.zeros((batch, c.kv_heads, slots, width), dtype)
    none = lambda: jnp.zeros((batch,), jnp.int32)
    widths = c.head_width, c.value_width
    arrays = (tuple(zeros(width) for _ in range(c.layers)) for width in widths)
    return Cache(*arrays, none(), none())


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
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    by = family.angles(c, positions, jnp.broadcast_to(lengths[:, None], tokens.shape))
    widths = c.head_width, c.value_width
    kept = (jnp.zeros((c.layers, batch, length, c.kv_heads, width), dtype) for width in widths)

    def body(carry, kind, w, i):
        x, keys, values = carry

        def attend(q, k, v, *, scale, window, cap=None):
            rule = Rule(scale, window, cap, documents=1)
            put = lambda old, new: jax.lax.dynamic_update_index_in_dim(
                old, new.astype(dtype), i, axis=0
            )
            return self_attention(rule, q, k, v, segments, positions), (
                put(keys, k),
                put(values, v),
            )

        x, kept = family.block(c, kind, w, x, by, attend)
        return x, *kept

    x = family.embed(c, params, tokens)
    x, keys, values = scan_layers(family, c, params, (x, *kept), body)
    room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    apart = lambda stack: tuple(jnp.pad(one.swapaxes(1, 2), room) for one in stack)
    cache = Cache(apart(keys), apart(values), lengths, lengths)
    return family.norm(c, params, x), cache


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
    keys, values = list(cache.keys), list(cache.values)
    x, number = family.embed(c, rest, tokens[:, None]), None
    if not made:
        number, x = unstack.after(0, x)
    for i, kind in enumerate(family.kinds(c)):
        w = params.layers[i] if made else unstack.layer(family, params, i, number)

        def attend(q, k, v, *, scale, window, cap=None, i=i):
            nonlocal number
            new = (one[:, 0] for one in (q, k, v))
            y, keys[i], values[i] = decode_attention.attend(
                *new, keys[i], values[i], cache.used, scale=scale, window=window, cap=cap
            )
            if not made:
                # The next layer's weights wait for this: no more than two layers' are ever wide.
                number, y = unstack.after(i + 1, y)
            return y.reshape(y.shape[0], 1, -1), None

        x, _ = family.block(c, kind, w, x, by, attend)
    cache = Cache(tuple(keys), tuple(values), cache.used + grow, cache.context)
    return family.norm(c, rest, x)[:, 0], cache
