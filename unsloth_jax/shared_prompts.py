"""Rows in which several completions follow their one prompt, whose tokens are computed once.

    prompt, completion 0, completion 1, ...        the row
    prompt, completion 0 | prompt, completion 1    what attention, convolution, recurrence see

A row's prompt is padded in front, up to a number of tokens that is one for all rows; completions
follow each other without gaps. All that sees a token by itself works on the row. What sees several
works on the completions' own rows: gathered from the row, and gathered back, in both directions of
the gradient too, so that nothing scatters.
"""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Shared
from unsloth_jax.layers import Mixers, row_mixers


class Maps(NamedTuple):
    """Which token is where: numbers of tokens of the flattened other side, and where there are any.

    P prompt tokens, R of a whole row, k completions with own rows of S.
    """

    apart: Int[Array, "B k S"]  # in all rows
    there: Array  # bool [B, k, S]
    own: Array  # bool [B, k, S]: what is not a prompt's second copy
    joined: Int[Array, "B R"]  # in all own rows, a prompt's first
    copies: Int[Array, "B k P"]  # in all own rows
    real: Array  # bool [B, R]


def maps(shared: Shared, positions: Int[Array, "B R"], segments: Int[Array, "B R"]) -> Maps:
    """The maps of rows with these positions; padding is segment 0."""
    (rows, count, width), prompt = shared.places.shape, _prompt(shared, positions)
    row = jnp.arange(rows)
    there = shared.places >= 0
    first = (jnp.arange(count) == 0)[None, :, None]
    copy = jnp.pad(jnp.maximum(shared.owners, 0), ((0, 0), (prompt, 0)))
    numbers = (row[:, None] * count + jnp.arange(count)[None])[..., None]
    return Maps(
        row[:, None, None] * positions.shape[1] + jnp.maximum(shared.places, 0),
        there,
        there & (first | (shared.places >= prompt)),
        (row[:, None] * count + copy) * width + positions,
        numbers * width + positions[:, None, :prompt],
        segments > 0,
    )


def _prompt(shared: Shared, row: Array) -> int:
    """The tokens that a row has for its prompt, padding included."""
    return row.shape[1] - shared.owners.shape[1]


def lengths(shared: Shared, positions: Int[Array, "B R"]) -> Int[Array, "B R"]:
    """Tokens of each one's prompt and completion; of a prompt's token those of the first."""
    each = (shared.places >= 0).sum(-1, dtype=jnp.int32)
    prompt = jnp.broadcast_to(each[:, :1], (len(each), _prompt(shared, positions)))
    own = jnp.take_along_axis(each, jnp.maximum(shared.owners, 0), axis=1)
    return jnp.concatenate([prompt, own], axis=1)


def mixers(shared: Shared, positions: Int[Array, "B R"], segments: Int[Array, "B R"]) -> Mixers:
    """Mixers of rows whose completions don't see each other; no cache keeps anything."""
    m = maps(shared, positions, segments)
    whole = m.there.reshape(-1, m.there.shape[-1])
    places = jnp.broadcast_to(jnp.arange(whole.shape[1], dtype=jnp.int32)[None], whole.shape)
    inner = row_mixers(whole.astype(jnp.int32), places, documents=1)

    def of(mix, *inputs, **how):
        y, kept = mix(*(None if x is None else apart(x, m) for x in inputs), **how)
        return joined(y, m), kept

    def convolve(x, w, bias):
        return of(lambda x: inner.convolve(x, w, bias), x)

    return Mixers(partial(of, inner.attend), convolve, partial(of, inner.recur))


def _taken(x: Array, at: Array) -> Array:
    """Tokens of x [B, T, ...] by their numbers."""
    rows = x.reshape(-1, *x.shape[2:]).at[at]
    return rows.get(mode="promise_in_bounds", wrap_negative_indices=False)


def _where(real: Array, x: Array) -> Array:
    return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - real.ndim)), x, 0)


@jax.custom_vjp
def apart(x: Float[Array, "B R ..."], m: Maps) -> Float[Array, "N S ..."]:
    """The completions' own rows, [B k, S, ...]; behind a row's last token stands any other."""
    return _taken(x, m.apart.reshape(-1, m.apart.shape[-1]))


def _apart_backward(m: Maps, d: Array) -> tuple[Array, None]:
    """A prompt's tokens get the sum over their copies, in float32."""
    prompt = m.copies.shape[-1]
    whole = _taken(d, m.joined[:, prompt:])
    first = _taken(d, m.copies).sum(1, dtype=jnp.float32).astype(d.dtype)
    return _where(m.real, jnp.concatenate([first, whole], axis=1)), None


apart.defvjp(lambda x, m: (apart(x, m), m), _apart_backward)


@jax.custom_vjp
def joined(y: Float[Array, "N S ..."], m: Maps) -> Float[Array, "B R ..."]:
    """The rows of own rows; padding gets any token's."""
    return _taken(y, m.joined)


def _joined_backward(m: Maps, d: Array) -> tuple[Array, None]:
    out = _where(m.own, _taken(d, m.apart))
    return out.reshape(-1, *out.shape[2:]), None


joined.defvjp(lambda y, m: (joined(y, m), m), _joined_backward)


def predicting(hidden: Float[Array, "B R D"], shared: Shared) -> Float[Array, "B C D"]:
    """The states that predict the tokens behind the prompts: of the token before each.

    Before a completion's first token that is the prompt's last.
    """
    start = _prompt(shared, hidden)
    before = jnp.pad(shared.owners[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = (shared.owners != before)[..., None]
    return jnp.where(begins, hidden[:, start - 1 : start], hidden[:, start - 1 : -1])


def alike(family: ModuleType, c: Any, longest: int) -> bool:
    """Whether a token is turned alike in all documents of up to `longest` tokens.

    Else ("dynamic", "longrope") two completions have no prompt in common but for its ids.
    """
    every = jnp.arange(1, longest + 1, dtype=jnp.int32)[None]
    by = family.angles(c, jnp.full_like(every, longest), every)
    return all(bool((x == x[:, :1]).all()) for x in jax.tree.leaves(by))
