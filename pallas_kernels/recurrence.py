"""Linear recurrences with a matrix for a state: Mamba-2's and the gated delta rule's.

    S_t = e^(g_t) S_(t-1) + k_t v_t^T                                      without beta
    S_t = e^(g_t) S_(t-1) + beta_t k_t (v_t - e^(g_t) S_(t-1)^T k_t)^T     with beta
    y_t = S_t^T q_t

S is 0 where a document starts. Mamba-2 (arXiv:2405.21060), gated delta rule (arXiv:2412.06464).
`recur` takes CHUNK tokens at a time: what they write to each other is a product of triangular
matrices (the WY form, arXiv:2406.06484), what they read from before goes through S. Everything is
float32; the gradient is JAX's, of chunks that are computed again. Heads of v share the keys and
queries of their group, as in grouped-query attention.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64
State = Float[Array, "B H K V"]


def step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    decay: Float[Array, "B H"],
    beta: Float[Array, "B H"] | None,
    state: State,
) -> tuple[Float[Array, "B H V"], State]:
    """One token a row: what it reads, in v's dtype, and the state after it. `decay` is g."""
    repeat = v.shape[1] // k.shape[1]
    queries, keys = (jnp.repeat(x.astype(jnp.float32), repeat, axis=1) for x in (q, k))
    state, new = state * jnp.exp(decay)[..., None, None], v.astype(jnp.float32)
    if beta is not None:
        new = (new - jnp.einsum("bhkv,bhk->bhv", state, keys)) * beta[..., None]
    state = state + keys[..., None] * new[..., None, :]
    return jnp.einsum("bhkv,bhk->bhv", state, queries).astype(v.dtype), state


def reference(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"] | None,
    starts: Bool[Array, "B T"],
    state: State,
) -> tuple[Float[Array, "B T H V"], State]:
    """`recur`, token by token."""

    def one(state, xs):
        *token, start = xs
        y, state = step(*token, jnp.where(start[:, None, None, None], 0.0, state))
        return state, y

    state, y = jax.lax.scan(one, state, jax.tree.map(_first, (q, k, v, decay, beta, starts)))
    return _first(y), state


def recur(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"] | None,
    starts: Bool[Array, "B T"],
    state: State,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T H V"], State]:
    """(what each token reads, in v's dtype, the state after the last one); `decay` is g, <= 0.

    `state` is what stands before the first token, unless a document starts there.
    """
    batch, length, group, _ = k.shape
    chunk = min(chunk, length)
    short = -length % chunk
    by_group = lambda x: x.reshape(*x.shape[:2], group, -1, *x.shape[3:])

    def chunked(x):
        # Tokens of zeros leave the state as it is.
        x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))
        return _first(x.reshape(batch, -1, chunk, *x.shape[2:]))

    f32 = lambda x: x.astype(jnp.float32)
    heads = jax.tree.map(lambda x: by_group(f32(x)), (v, decay, beta))
    xs = jax.tree.map(chunked, (f32(q), f32(k), *heads, starts.astype(jnp.int32)))
    state, y = jax.lax.scan(
        partial(jax.checkpoint, prevent_cse=False)(_one_chunk), _by_group(state, group), xs
    )
    y = _first(y).reshape(batch, length + short, *v.shape[2:])[:, :length]
    return y.astype(v.dtype), state.reshape(batch, -1, *state.shape[3:])


def _first(x):
    """The first two axes, exchanged."""
    return x.swapaxes(0, 1)


def _by_group(state, group):
    return state.reshape(state.shape[0], group, -1, *state.shape[2:])


def _one_chunk(state, xs):
    """(state [B, G, R, K, V] after a chunk, what its tokens read [B, c, G, R, V])."""
    q, k, v, decay, beta, starts = xs
    document = jnp.cumsum(starts, axis=1)
    here = (document == 0)[..., None, None]  # in the document of the state
    before = jnp.where(here, jnp.exp(jnp.cumsum(decay, axis=1)), 0.0)
    fade = jnp.exp(_between(decay, document))
    after = fade[:, -1]
    if beta is not None:
        v = _corrected(state, k, v, beta, before, fade)
    scores = jnp.einsum("bigk,bjgk->bijg", q, k)[..., None] * fade
    y = jnp.einsum("bigk,bgrkv->bigrv", q, state) * before[..., None]
    y = y + jnp.einsum("bijgr,bjgrv->bigrv", scores, v)
    new = jnp.einsum("bjgk,bjgrv->bgrkv", k, v * after[..., None])
    return state * before[:, -1, ..., None, None] + new, y


def _between(decay, document):
    """The decay from token j to i [B, i, j, G, R], -inf where i does not see j.

    Sums of what lies between: differences of running sums would keep the rounding of all before.
    """
    below = lambda k: jnp.tri(decay.shape[1], k=k, dtype=bool)[None]
    later = jnp.where(below(-1)[..., None, None], decay[:, :, None], 0.0)
    seen = below(0) & (document[:, :, None] == document[:, None])
    return jnp.where(seen[..., None, None], jnp.cumsum(later, axis=1), -jnp.inf)


def _corrected(state, k, v, beta, before, fade):
    """What each token writes: beta times its value less what stands under its key by then."""
    overlap = jnp.einsum("bigk,bjgk->bijg", k, k)[..., None] * fade * beta[:, :, None]
    below = jnp.tri(k.shape[1], k=-1, dtype=bool)[None, ..., None, None]
    inverse = _inverse(jnp.where(below, overlap, 0.0).transpose(0, 3, 4, 1, 2))
    known = jnp.einsum("bigk,bgrkv->bigrv", k, state) * before[..., None]
    return jnp.einsum("bgrij,bjgrv->bigrv", inverse, (v - known) * beta[..., None])


@jax.custom_vjp
def _inverse(under):
    """(1 + under)^-1 of matrices [..., c, c] that are 0 on and above the diagonal.

    Blocks are joined, [[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']]: matrix products alone, none
    of which grows as powers of `under` would. LAPACK's solver hung in compiled training steps.
    """
    count, size = under.shape[-1], 1
    row = jnp.arange(count)
    axes = (1,) * (under.ndim - 2)
    out = jnp.broadcast_to(jnp.eye(count).reshape(*axes, count, count), under.shape)
    while size < count:
        pair, half = row // (2 * size), row // size
        joined = (pair[:, None] == pair[None]) & (half[:, None] > half[None])
        out = out - out @ jnp.where(joined.reshape(*axes, count, count), under, 0.0) @ out
        size *= 2
    return out


def _inverse_backward(out, d):
    turned = out.swapaxes(-1, -2)
    return (-(turned @ d @ turned),)


_inverse.defvjp(lambda under: (_inverse(under),) * 2, _inverse_backward)
