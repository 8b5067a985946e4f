"""Rollouts: completions in a fixed number of slots, each refilled while the others go on.

A prompt is read once for all its completions. A completion has settings, stop tokens and a key of
its own; the key and the number of a token decide each draw, so that neither the slot nor the
neighbours matter.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax import decoder, decoding, sample
from unsloth_jax.dims import Params
from unsloth_jax.sample import Sampling
from unsloth_jax.unstack import Unstacked


class Requests(NamedTuple):
    """Completions that are asked for, [B] each. Fields are Any since trees may hold shapes."""

    sampling: Sampling
    keys: Any  # uint32 [B, 2]: data of random keys
    limit: Any  # int32: tokens at most, at least 1
    stop: Any  # int32 [B, n]: tokens that end it; -1 where there are fewer


@flax.struct.dataclass
class Slots:
    """Completions under way: what one dispatch hands to the next."""

    cache: decoding.Cache
    requests: Requests
    token: Any  # int32 [B]: drawn, not yet in the cache
    logprob: Any  # float32 [B]
    sampled_logprob: Any  # float32 [B]
    seen: Any  # bool [B, V]: tokens of prompt and completion
    made: Any  # int32 [B]: tokens before `token`
    live: Any  # bool [B]: whether `token` is one of a completion


class Prompts(NamedTuple):
    """Prompts that were read: what their completions begin with."""

    scores: Float[Array, "P V"]
    seen: Bool[Array, "P V"]
    cache: decoding.Cache


class Burst(NamedTuple):
    """Tokens of one dispatch; where a slot had none, -1 with log-probabilities 0."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    sampled_logprobs: Float[Array, "B steps"]


def empty(
    family: ModuleType,
    c: Any,
    count: int,
    room: int,
    stops: int,
    dtype: Any,
    prompts: tuple[int, int] | None = None,
) -> Slots:
    """`count` free slots with caches for `room` tokens; `stops` is the width of `Requests.stop`.

    With `prompts`, so many of so many tokens each, caches hold completions alone: those of a prompt
    share its keys and values.
    """
    none = lambda dtype, *more: jnp.zeros((count, *more), dtype)
    settings = Sampling(*(jnp.full((count,), x, jnp.float32) for x in Sampling()))
    stop = jnp.full((count, stops), -1, jnp.int32)
    requests = Requests(settings, none(jnp.uint32, 2), none(jnp.int32), stop)
    cache = decoding.empty(family, c, count, room, dtype)
    if prompts is not None:
        cache = cache.replace(prefixes=decoding.prefixes(family, c, count, *prompts, dtype))
    return Slots(
        cache, requests, none(jnp.int32), none(jnp.float32), none(jnp.float32),
        none(bool, c.vocab), none(jnp.int32), none(bool),
    )  # fmt: skip


def read(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    dtype: Any,
) -> Prompts:
    """Prompts, padded on the right, with caches as long as the padded rows."""
    count, length = tokens.shape
    hidden, cache = decoding.prefill(family, c, params, tokens, lengths, length, dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    inside = jnp.arange(length)[None] < lengths[:, None]
    rows = jnp.broadcast_to(jnp.arange(count)[:, None], (count, length))
    seen = jnp.zeros((count, c.vocab), bool).at[rows, tokens].max(inside)
    return Prompts(decoder.logits(family, c, params, last), seen, cache)


def place(
    slots: Slots,
    prompts: Prompts,
    requests: Requests,
    source: Int[Array, " R"],
    into: Int[Array, " R"],
    places: Int[Array, " P"],
) -> Slots:
    """Request r begins in slot into[r] with prompt source[r]; a slot beyond the last drops it.

    Its first token is drawn. The caches of `slots` must be at least as long as the prompts'. Where
    prompts are shared, prompt p is held in place places[p].
    """
    put = lambda old, new: old.at[into].set(new.astype(old.dtype), mode="drop")
    from_prompts = lambda old, new: put(old, new[source])
    old, new = slots.cache, prompts.cache
    pairs = {"keys": (old.keys, new.keys), "values": (old.values, new.values)}
    if old.prefixes is None:
        long = partial(_long, into, source)
        held = {name: jax.tree.map(long, *pair) for name, pair in pairs.items()}
    else:
        rest = dict(source=put(old.prefixes.source, places[source]),
                    length=put(old.prefixes.length, new.used[source]))  # fmt: skip
        first = partial(_long, places, slice(None))
        own = {n: jax.tree.map(first, getattr(old.prefixes, n), x) for n, (_, x) in pairs.items()}
        held = {"prefixes": decoding.Prefixes(**own, **rest)}
    cache = old.replace(
        **held,
        tails=jax.tree.map(from_prompts, old.tails, new.tails),
        states=jax.tree.map(from_prompts, old.states, new.states),
        used=from_prompts(old.used, new.used),
        context=from_prompts(old.context, new.context),
    )
    seen, none = prompts.seen[source], jnp.zeros(source.shape, jnp.int32)
    drawn = sample.draw(_keys(requests, none), prompts.scores[source], seen, requests.sampling)
    return Slots(
        cache,
        jax.tree.map(put, slots.requests, requests),
        put(slots.token, drawn.token),
        put(slots.logprob, drawn.logprob),
        put(slots.sampled_logprob, drawn.sampled_logprob),
        put(slots.seen, seen),
        put(slots.made, none),
        put(slots.live, requests.limit > 0),
    )


def _long(into, source, old, new):
    """Rows `source` of new keys or values in the rows `into` of longer ones."""
    return old.at[into, :, : new.shape[2]].set(new[source].astype(old.dtype), mode="drop")


def _keys(requests: Requests, made: Int[Array, " B"]) -> jax.Array:
    """The key of each slot's token number `made`."""
    one = lambda data, n: jax.random.fold_in(jax.random.wrap_key_data(data), n)
    return jax.vmap(one)(requests.keys, made)


def decode(
    family: ModuleType,
    c: Any,
    params: Params | Unstacked,
    slots: Slots,
    steps: int,
    limit: Int[Array, ""],
    enough: Int[Array, ""],
) -> tuple[Slots, Burst]:
    """At most `limit` of `steps` tokens a slot; fewer when `enough` completions have ended.

    The caches must have room for `limit` tokens more.
    """
    count = slots.token.shape[0]
    rest = params.rest if isinstance(params, Unstacked) else params
    numbers = lambda: jnp.zeros((count, steps), jnp.float32)
    burst = Burst(jnp.full((count, steps), -1, jnp.int32), numbers(), numbers())
    begun = slots.live.sum()

    def going(carry):
        n, s, _ = carry
        left = s.live.sum()
        return (n < jnp.minimum(limit, steps)) & (left > 0) & (begun - left < enough)

    def one(carry):
        n, s, burst = carry
        now = (s.token, s.logprob, s.sampled_logprob)
        new = (jnp.where(s.live, x, -1 if i == 0 else 0.0) for i, x in enumerate(now))
        burst = Burst(*(xs.at[:, n].set(x) for xs, x in zip(burst, new, strict=True)))
        seen = s.seen.at[jnp.arange(count), s.token].max(s.live)
        made = s.made + s.live
        ended = (s.token[:, None] == s.requests.stop).any(-1) | (made >= s.requests.limit)
        live = s.live & ~ended
        cache = _without(s.cache, live)
        hidden, cache = decoding.step(family, c, params, cache, s.token, live.astype(jnp.int32))
        scores = decoder.logits(family, c, rest, hidden)
        # What ended asks for nothing: neither a filter nor a draw.
        wanted = s.requests.sampling
        wanted = wanted._replace(temperature=jnp.where(live, wanted.temperature, 0.0))
        drawn = sample.draw(_keys(s.requests, made), scores, seen, wanted)
        return n + 1, Slots(cache, s.requests, *drawn, seen, made, live), burst

    _, slots, burst = jax.lax.while_loop(going, one, (0, slots, burst))
    return slots, burst


def _without(cache: decoding.Cache, live: Bool[Array, " B"]) -> decoding.Cache:
    """The cache where what ended has no tokens: it reads none, and writes to its first slot."""
    own = lambda x: jnp.where(live, x, 0)
    before = cache.prefixes
    if before is not None:
        before = before.replace(length=own(before.length))
    return cache.replace(used=own(cache.used), prefixes=before)


def kept(slots: Slots, rows: Int[Array, " R"]) -> Slots:
    """The slots `rows` alone; the arrays of the given ones are deleted. Not for use inside jit.

    Those that share prompts are not cut.
    """
    assert slots.cache.prefixes is None, "prompts that are shared are no rows of slots"

    def some(x):
        new = _taken(x, rows)
        x.delete()
        return new

    return jax.tree.map(some, slots)


_taken = jax.jit(lambda x, rows: x[rows])


class Programs(NamedTuple):
    """The jitted parts of a rollout for one family and config."""

    read: Callable[..., Prompts]
    place: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Burst]]


def programs(family: ModuleType, c: Any) -> Programs:
    """Compiled once a shape; `place` and `decode` donate the slots they are given."""

    def first(params, tokens, lengths, dtype):
        return read(family, c, params, tokens, lengths, dtype)

    def more(params, slots, limit, enough, steps):
        return decode(family, c, params, slots, steps, limit, enough)

    return Programs(
        jax.jit(first, static_argnames=("dtype",)),
        jax.jit(place, donate_argnums=0),
        jax.jit(more, static_argnames=("steps",), donate_argnums=1),
    )
