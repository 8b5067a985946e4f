"""Generation with a key/value cache: prefill, then many tokens a dispatch.

Every knob is an array, so changing a temperature compiles nothing. Filters act in the order of
transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Callable
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
    """How tokens are drawn, one value for all rows or one a row; the defaults change nothing."""

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


def columns(s: Sampling, rows: int) -> Sampling:
    """Each setting as [B, 1], whether it was one value or one a row."""
    return Sampling(*(jnp.broadcast_to(jnp.asarray(x).reshape(-1, 1), (rows, 1)) for x in s))


def filtered(scores: Float[Array, "B V"], s: Sampling) -> Float[Array, "B V"]:
    """Tempered scores with the tokens that may not be drawn at -1e30; `temperature` is over 0."""
    s = columns(s, scores.shape[0])
    scores = scores / s.temperature
    order = jnp.sort(scores, axis=-1, descending=True)
    count = scores.shape[-1]
    k = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, count), count).astype(jnp.int32)
    least = jnp.take_along_axis(order, k - 1, axis=-1)
    scores = jnp.where(scores < least, OUT, scores)
    order = jnp.where(order < least, OUT, order)
    chance = jax.nn.softmax(order, axis=-1)
    # A rounded sum reaches 1 before the last token, which top_p = 1 must not drop.
    kept = (jnp.cumsum(chance, axis=-1) - chance < s.top_p) | (s.top_p >= 1)
    least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(scores < least, OUT, scores)
    chance = jax.nn.softmax(scores, axis=-1)
    return jnp.where(chance < s.min_p * chance.max(-1, keepdims=True), OUT, scores)


class Drawn(NamedTuple):
    """A token a row, and how likely it was."""

    token: Any  # int32 [B]
    logprob: Any  # float32 [B]: tempered, before penalty and filters, which is the policy's own
    sampled_logprob: Any  # float32 [B]: after them, under what it was drawn from; 0 if greedy


def draw(
    keys: jax.Array, scores: Float[Array, "B V"], seen: Bool[Array, "B V"], s: Sampling
) -> Drawn:
    """A token a row, by the row's own key [B] and settings.

    A greedy row's `logprob` is that of temperature 1. The vocabulary is sorted only where a
    filter is on.
    """
    s = columns(s, scores.shape[0])
    greedy = s.temperature == 0
    s = s._replace(temperature=jnp.where(greedy, 1.0, s.temperature))
    penalized = penalize(scores, seen, s.repetition_penalty)
    likeliest = jnp.argmax(penalized, axis=-1).astype(jnp.int32)
    filters = ((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)) & ~greedy
    penalties = (s.repetition_penalty != 1) & ~greedy
    # A row's draw must not depend on what other rows ask for: the same scores, the same key.
    one = jax.vmap(lambda key, scores: jax.random.categorical(key, scores).astype(jnp.int32))

    def of(scores):
        token = one(keys, scores)
        return token, _logprob(scores, token)

    plainly = lambda: (one(keys, scores / s.temperature), jnp.zeros(likeliest.shape, jnp.float32))
    choice = jnp.where(filters.any(), 3, jnp.where(penalties.any(), 2, 1))
    token, sampled = jax.lax.switch(
        jnp.where(greedy.all(), 0, choice),
        [
            lambda: (likeliest, jnp.zeros(likeliest.shape, jnp.float32)),
            plainly,
            lambda: of(penalized / s.temperature),
            lambda: of(filtered(penalized, s)),
        ],
    )
    token = jnp.where(greedy[:, 0], likeliest, token)
    logprob = _logprob(scores / s.temperature, token)
    changed = (filters | penalties)[:, 0]
    return Drawn(token, logprob, jnp.where(greedy[:, 0], 0.0, jnp.where(changed, sampled, logprob)))


def _logprob(scores: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    """log_softmax at one token a row."""
    picked = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(scores, axis=-1)


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
    scores = decoder.logits(family, c, params, last)
    drawn = draw(jax.random.split(now, batch), scores, seen, sampling)
    return Draft(cache, drawn.token, drawn.logprob, seen, jnp.zeros((batch,), bool), key)


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
        drawn = draw(jax.random.split(now, batch), scores, seen, sampling)
        draft = Draft(cache, drawn.token, drawn.logprob, seen, done, key)
        return n + 1, draft, tokens, logprobs

    _, draft, tokens, logprobs = jax.lax.while_loop(going, one, (0, draft, tokens, logprobs))
    return draft, tokens, logprobs


def roomier(draft: Draft, slots: int) -> Draft:
    """The draft with a cache of `slots`; the given one's keys and values are deleted."""
    return draft.replace(cache=decoding.roomier(draft.cache, slots))


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
