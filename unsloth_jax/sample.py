"""Generation with a key/value cache: prefill, then many tokens a dispatch.

Every knob is an array, so changing a temperature compiles nothing. Filters act in the order of
transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax import decoder, decoding
from unsloth_jax.dims import Params
from unsloth_jax.unstack import Unstacked

OUT = -1e30  # the score of a token that can't be drawn


class Sampling(NamedTuple):
    """How tokens are drawn, one value for the whole batch; the defaults change nothing."""

    temperature: Any = 1.0  # 0 takes the likeliest token
    top_k: Any = 0  # 0 keeps all
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0


@flax.struct.dataclass
class Draft:
    """A generation under way: what one dispatch hands to the next."""

    cache: decoding.Cache
    token: Any  # int32 [B]: drawn, not yet in the cache
    logprob: Any  # float32 [B]
    seen: Any  # bool [B, V]: tokens of prompt and answer
    done: Any  # bool [B]
    key: Any


def penalize(
    scores: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Any
) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative scores of seen tokens (arXiv:1909.05858)."""
    worse = jnp.where(scores > 0, scores / penalty, scores * penalty)
    return jnp.where(seen, worse, scores)


def filtered(scores: Float[Array, "B V"], s: Sampling) -> Float[Array, "B V"]:
    """Tempered scores with the tokens that may not be drawn at -1e30; `temperature` is over 0."""
    scores = scores / s.temperature
    order = jnp.sort(scores, axis=-1, descending=True)
    count = scores.shape[-1]
    k = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, count), count).astype(jnp.int32)
    least = jnp.take_along_axis(order, jnp.broadcast_to(k - 1, (scores.shape[0], 1)), axis=-1)
    scores = jnp.where(scores < least, OUT, scores)
    order = jnp.where(order < least, OUT, order)
    chance = jax.nn.softmax(order, axis=-1)
    # A rounded sum reaches 1 before the last token, which top_p = 1 must not drop.
    kept = (jnp.cumsum(chance, axis=-1) - chance < s.top_p) | (jnp.asarray(s.top_p) >= 1)
    least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(scores < least, OUT, scores)
    chance = jax.nn.softmax(scores, axis=-1)
    return jnp.where(chance < s.min_p * chance.max(-1, keepdims=True), OUT, scores)


def draw(
    key: jax.Array, scores: Float[Array, "B V"], seen: Bool[Array, "B V"], s: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token a row and its log-probability under the unfiltered, tempered distribution.

    The vocabulary is sorted only where a filter is on.
    """
    scores = penalize(scores, seen, s.repetition_penalty)
    greedy = jnp.asarray(s.temperature) == 0
    s = s._replace(temperature=jnp.where(greedy, 1.0, s.temperature))
    tempered = scores / s.temperature
    likeliest = jnp.argmax(scores, axis=-1)
    filters = (jnp.asarray(s.top_k) > 0) | (jnp.asarray(s.top_p) < 1) | (jnp.asarray(s.min_p) > 0)
    token = jax.lax.switch(
        jnp.where(greedy, 0, jnp.where(filters, 2, 1)),
        [
            lambda: likeliest,
            lambda: jax.random.categorical(key, tempered, axis=-1),
            lambda: jax.random.categorical(key, filtered(scores, s), axis=-1),
        ],
    ).astype(jnp.int32)
    # By hand: log_softmax would look for the largest score, which is known, in another pass.
    of = lambda ids: jnp.take_along_axis(tempered, ids[:, None], axis=-1)
    most = of(likeliest)
    logprob = of(token) - most - jnp.log(jnp.exp(tempered - most).sum(-1, keepdims=True))
    return token, logprob[:, 0]


def prefill(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    slots: int,
    sampling: Sampling,
    key: jax.Array,
    dtype: Any,
) -> Draft:
    """Reads the prompts (padded on the right) and draws the first token of each answer.

    Raises ValueError where the cache has fewer slots than the prompts.
    """
    batch, length = tokens.shape
    if slots < length:
        raise ValueError(f"prompts of {length} tokens do not fit in a cache of {slots} slots")
    hidden, cache = decoding.prefill(family, c, params, tokens, lengths, slots, dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    inside = jnp.arange(length)[None] < lengths[:, None]
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], (batch, length))
    seen = jnp.zeros((batch, c.vocab), bool).at[rows, tokens].max(inside)
    now, key = jax.random.split(key)
    token, logprob = draw(now, decoder.logits(family, c, params, last), seen, sampling)
    return Draft(cache, token, logprob, seen, jnp.zeros((batch,), bool), key)


def decode(
    family: ModuleType,
    c: Any,
    params: Params | Unstacked,
    draft: Draft,
    stop: Int[Array, " stops"],
    sampling: Sampling,
    steps: int,
    limit: Any,
) -> tuple[Draft, Int[Array, "B steps"], Float[Array, "B steps"]]:
    """`limit` of at most `steps` tokens a row, fewer when every row has drawn a stop token.

    What a row does not fill is -1 with log-probability 0. Weights that are not `Unstacked` are
    read as they are stored, a layer at a time, for every token.
    """
    batch = draft.token.shape[0]
    rest = params.rest if isinstance(params, Unstacked) else params
    tokens = jnp.full((batch, steps), -1, jnp.int32)
    logprobs = jnp.zeros((batch, steps), jnp.float32)

    def going(carry):
        n, d, _, _ = carry
        return (n < jnp.minimum(limit, steps)) & ~d.done.all()

    def one(carry):
        n, d, tokens, logprobs = carry
        tokens = tokens.at[:, n].set(jnp.where(d.done, -1, d.token))
        logprobs = logprobs.at[:, n].set(jnp.where(d.done, 0.0, d.logprob))
        seen = d.seen.at[jnp.arange(batch), d.token].set(True)
        done = d.done | (d.token[:, None] == stop[None]).any(-1)
        grow = jnp.where(done, 0, 1).astype(jnp.int32)
        hidden, cache = decoding.step(family, c, params, d.cache, d.token, grow)
        now, key = jax.random.split(d.key)
        scores = decoder.logits(family, c, rest, hidden)
        token, logprob = draw(now, scores, seen, sampling)
        return n + 1, Draft(cache, token, logprob, seen, done, key), tokens, logprobs

    _, draft, tokens, logprobs = jax.lax.while_loop(going, one, (0, draft, tokens, logprobs))
    return draft, tokens, logprobs


def roomier(draft: Draft, slots: int) -> Draft:
    """The draft with a cache of `slots`; the given one's keys and values are deleted.

    One array at a time, so that no more than one is held twice. Not for use inside jit.
    """

    def wider(x):
        new = _padded(x, slots)
        x.delete()
        return new

    keys, values = (jax.tree.map(wider, xs) for xs in (draft.cache.keys, draft.cache.values))
    return draft.replace(cache=draft.cache.replace(keys=keys, values=values))


@partial(jax.jit, static_argnums=1)
def _padded(x, slots):
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))


class Programs(NamedTuple):
    """The two jitted halves of a generation for one family and config."""

    prefill: Callable[..., Draft]
    decode: Callable[..., tuple]


def programs(family: ModuleType, c: Any) -> Programs:
    """Compiled once a shape; `decode` donates the draft it is given."""

    def first(params, tokens, lengths, sampling, key, slots, dtype):
        return prefill(family, c, params, tokens, lengths, slots, sampling, key, dtype)

    def more(params, draft, stop, sampling, limit, steps):
        return decode(family, c, params, draft, stop, sampling, steps, limit)

    return Programs(
        jax.jit(first, static_argnames=("slots", "dtype")),
        jax.jit(more, static_argnames=("steps",), donate_argnums=1),
    )
