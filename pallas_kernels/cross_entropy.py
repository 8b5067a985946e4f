"""Log-probabilities of given tokens under a linear head, a chunk of rows at a time.

    s = cap(x @ w.T * scale)          cap(s) = c tanh(s / c), or s
    logp[n] = s[n, y[n]] - log sum_v exp s[n, v]
    dlogp[n]/dx[n] = sum_v (1[v = y[n]] - p[n, v]) cap'(s[n, v]) scale w[v]

Under label smoothing by e, (1 - e) s[n, y[n]] + e mean_v s[n, v] stands for s[n, y[n]], and
(1 - e) 1[v = y[n]] + e / V for 1[v = y[n]]. Scores [N, V] never exist as a whole. Where the head
is frozen the derivative by x is found in the forward pass, from the scores at hand (Liger,
arXiv:2410.10989; Cut Cross-Entropy, arXiv:2411.09009), so nothing is computed twice; else a chunk
is computed again in the backward.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

CHUNK = 512


class Rule(NamedTuple):
    """What is static: rows at a time, the scores' factor and soft-cap (arXiv:2408.00118)."""

    chunk: int = CHUNK
    scale: float = 1.0
    cap: float | None = None
    entropy: bool = False  # whether it is asked for
    smoothing: float | int = 0.0  # share of the mean over all tokens (arXiv:1512.00567)


PLAIN = Rule()


class Result(NamedTuple):
    """float32 [N] each; rows that were not wanted hold 0."""

    logps: Array
    entropy: Array | None  # nats, without gradient; None unless asked for


def reference(
    x: Float[Array, "N D"],
    w: Float[Array, "V D"],
    targets: Int[Array, " N"],
    wanted: Bool[Array, " N"],
    rule: Rule = PLAIN,
) -> Result:
    """The same from all scores at once."""
    logps = jax.nn.log_softmax(_scores(x, w, rule)[0], axis=-1)
    picked = _picked(rule, logps, targets)[:, 0]
    keep = lambda rows: jnp.where(wanted, rows, 0)
    entropy = jax.lax.stop_gradient(keep(-jnp.sum(jnp.exp(logps) * logps, axis=-1)))
    return Result(keep(picked), entropy if rule.entropy else None)


def _scores(x, w, rule):
    """(capped scores, tanh where there is a cap), float32."""
    w = w.astype(x.dtype)
    s = jnp.einsum("nd,vd->nv", x, w, preferred_element_type=jnp.float32) * rule.scale
    if rule.cap is None:
        return s, None
    t = jnp.tanh(s / rule.cap)
    return rule.cap * t, t


def _picked(rule, s, y):
    """[n, 1]: the targets' scores, smoothed."""
    picked = jnp.take_along_axis(s, y[:, None], axis=-1)
    if not rule.smoothing:
        return picked
    return (1 - rule.smoothing) * picked + rule.smoothing * s.mean(-1, keepdims=True)


def _slope(rule, chance, t, y):
    """d log p(y) / d (x @ w.T) [n, V] from every token's probability."""
    wanted = jnp.arange(chance.shape[-1], dtype=y.dtype)[None] == y[:, None]
    if rule.smoothing:
        wanted = (1 - rule.smoothing) * wanted + rule.smoothing / chance.shape[-1]
    d = wanted - chance
    return (d if t is None else d * (1 - t * t)) * rule.scale


def token_logprobs(
    x: Float[Array, "N D"],
    w: Float[Array, "V D"],
    targets: Int[Array, " N"],
    wanted: Bool[Array, " N"] | None = None,
    rule: Rule = PLAIN,
) -> Result:
    """log p(target) and entropy of each wanted row; the others cost nothing and hold 0.

    Differentiable by x and w. Raises ValueError for a chunk under 1 or smoothing outside [0, 1).
    """
    if rule.chunk < 1:
        raise ValueError(f"chunk is a number of rows of 1 or more, got {rule.chunk}")
    if not 0 <= rule.smoothing < 1:
        raise ValueError(f"smoothing is a share from 0 up to below 1, got {rule.smoothing}")
    if wanted is None:
        wanted = jnp.ones(targets.shape, bool)
    return _token_logprobs(rule, x, w, targets, wanted)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(rule, x, w, targets, wanted):
    return _forward_pass(rule, x, w, targets, wanted, slope=False)[0]


def _forward_pass(rule, x, w, targets, wanted, slope):
    """(Result, d logp / d x in x's dtype if `slope`): as many chunks as wanted rows fill."""
    count, width = x.shape
    # A quarter of few rows, so that unwanted ones are left out there too.
    chunk = min(rule.chunk, max(64, count // 4), count)
    order = jnp.argsort(~wanted, stable=True)
    order = jnp.where(wanted[order], order, count)
    order = jnp.pad(order, (0, -count % chunk), constant_values=count)

    def one(i, carry):
        (logps, entropy), slopes = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        part, y = x.at[rows].get(mode="fill", fill_value=0), targets.at[rows].get(mode="clip")
        s, t = _scores(part, w, rule)
        top = s.max(-1, keepdims=True)
        e = jnp.exp(s - top)
        z = e.sum(-1, keepdims=True)
        lse = jnp.log(z) + top
        picked = _picked(rule, s, y) - lse
        put = lambda out, new: out.at[rows].set(new, mode="drop")
        if rule.entropy:
            entropy = put(entropy, (lse - (e * s).sum(-1, keepdims=True) / z)[:, 0])
        if slope:
            d = _slope(rule, e / z, t, y).astype(x.dtype)
            slopes = put(slopes, jnp.einsum("nv,vd->nd", d, w.astype(x.dtype)))
        return Result(put(logps, picked[:, 0]), entropy), slopes

    zeros = jnp.zeros((count,), jnp.float32)
    empty = jnp.zeros((count if slope else 0, width), x.dtype)
    chunks = (wanted.sum() + chunk - 1) // chunk
    start = Result(zeros, zeros if rule.entropy else None), empty
    return jax.lax.fori_loop(0, chunks, one, start)


def _forward(rule, x, w, targets, wanted):
    frozen = not w.perturbed
    x, w, targets, wanted = x.value, w.value, targets.value, wanted.value
    result, slopes = _forward_pass(rule, x, w, targets, wanted, slope=frozen)
    return result, (slopes, None) if frozen else (None, (x, w, targets, wanted))


def _backward(rule, saved, g):
    slopes, inputs = saved
    by_logp = g.logps
    if isinstance(by_logp, SymbolicZero):
        by_logp = jnp.zeros(by_logp.shape, by_logp.dtype)
    if inputs is None:
        return (slopes * by_logp[:, None].astype(slopes.dtype)), None, None, None
    x, w, targets, wanted = inputs
    return *_again(rule, x, w, targets, jnp.where(wanted, by_logp, 0)), None, None


def _again(rule, x, w, targets, by_logp):
    """Cotangents of x and w, every chunk's scores computed once more."""
    count, width = x.shape
    chunk = min(rule.chunk, count)
    split = lambda a: jnp.pad(a, ((0, -count % chunk), *[(0, 0)] * (a.ndim - 1))).reshape(
        -1, chunk, *a.shape[1:]
    )

    def one(dw, rows):
        x, y, g = rows
        s, t = _scores(x, w, rule)
        d = (_slope(rule, jax.nn.softmax(s, -1), t, y) * g[:, None]).astype(x.dtype)
        dw = dw + jnp.einsum("nv,nd->vd", d, x, preferred_element_type=jnp.float32)
        return dw, jnp.einsum("nv,vd->nd", d, w.astype(x.dtype))

    zero = jnp.zeros(w.shape, jnp.float32)
    dw, dx = jax.lax.scan(one, zero, (split(x), split(targets), split(by_logp)))
    return dx.reshape(-1, width)[:count], dw.astype(w.dtype)


_token_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
