"""Products of one input with several NF4 weights and their low-rank terms.

    y_j = x @ (w_j + s_j b_j a_j).T
    dx = sum_j dy_j @ (w_j + s_j b_j a_j)
    da_j = (dy_j @ s_j b_j).T @ x,  db_j = s_j dy_j.T @ (x @ a_j.T)

Up to 64 rows the bytes are multiplied as they are (`nf4_few_rows`) where that can run and no
gradient is asked for. Otherwise the merged implementation adds the low-rank term while it
dequantizes (`nf4_dequantize`), so that y and dx are one product each; the sum is rounded to 16
bits once, as the plain weight is. Backward dequantizes again: residuals are x, the packed bytes
and the pairs, never a weight.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _choice, nf4, nf4_dequantize
from pallas_kernels import nf4_few_rows as few_rows
from pallas_kernels.nf4_dequantize import LowRank, dequantize, one_layer

Implementation = Literal["merged", "xla"]
TOGETHER = 3  # matrices that one launch of `nf4_few_rows` takes


class Packed(NamedTuple):
    """One weight's bytes, or a stack of them with a layer number."""

    bytes: Any  # uint8 [O, I/2], or [L, O, I/2] with `layer`
    statistics: nf4.Statistics
    layer: Any = None  # int32 []


def reference(
    layouts: Sequence[nf4.Layout],
    x: Float[Array, "*B I"],
    weights: Sequence[Packed],
    pairs: Sequence[LowRank | None],
) -> list[Array]:
    """Weight and low-rank term apart, as PEFT multiplies them."""
    ys = []
    for layout, w, pair in zip(layouts, weights, pairs, strict=True):
        y = nf4.matmul(layout, x, *one_layer(*w))
        if pair is not None:
            low = jnp.einsum("...i,ri->...r", x, pair.a.astype(x.dtype))
            up = jnp.einsum("...r,or->...o", low, pair.b.astype(x.dtype))
            y = y + jnp.asarray(pair.scale).astype(x.dtype) * up
        ys.append(y)
    return ys


def supports(layouts: Sequence[nf4.Layout], x: Array, weights: Sequence[Packed]) -> str | None:
    """Why the merged implementation can't run, or None."""
    reasons = (
        nf4_dequantize.supports(layout, w.bytes, w.statistics, dtype=x.dtype)
        for layout, w in zip(layouts, weights, strict=True)
    )
    return next((r for r in reasons if r), None)


def products(
    layouts: Sequence[nf4.Layout],
    x: Float[Array, "*B I"],
    weights: Sequence[Packed],
    pairs: Sequence[LowRank | None],
    implementation: Implementation | None = None,
) -> list[Array]:
    """[y_j [*B, O_j]] in x's dtype; differentiable by x and the pairs.

    Raises ValueError with the reason where the implementation asked for can't run.
    """
    reasons = {"merged": supports(layouts, x, weights), "xla": None}
    if _choice.pick("NF4 products", implementation, reasons) == "xla":
        return reference(layouts, x, weights, pairs)
    numbered = [w._replace(layer=jnp.int32(0 if w.layer is None else w.layer)) for w in weights]
    groups = _together(weights)
    ys = _merged(tuple(layouts), groups, x.reshape(-1, x.shape[-1]), numbered, list(pairs))
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _merged(layouts, groups, x, weights, pairs):
    if few_rows.supports(layouts, x, *zip(*[w[:2] for w in weights], strict=True)):
        return _products(layouts, x, weights, pairs)
    ys = []
    for part in groups:
        some, kinds = [weights[j] for j in part], [layouts[j] for j in part]
        stack = some[0].layer if some[0].bytes.ndim == 3 else None
        packed, statistics, _ = zip(*some, strict=True)
        ys += few_rows.few_rows_together(kinds, x, packed, statistics, stack)
    return _with_terms(ys, x, pairs)


def _together(weights):
    """Runs of weights that `nf4_few_rows` may read in one launch: the same layer of each stack."""
    out = []
    for j, w in enumerate(weights):
        last = weights[out[-1][0]] if out else None
        if (
            out
            and _same(last.layer, w.layer)
            and len(out[-1]) < TOGETHER
            and last.bytes.ndim == w.bytes.ndim
        ):
            out[-1] += (j,)
        else:
            out.append((j,))
    return tuple(out)


def _same(a, b):
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _with_terms(ys, x, pairs):
    """Adds what the pairs make of x."""
    for j, low in enumerate(first_products(x, pairs)):
        if low is not None:
            b = (pairs[j].b * pairs[j].scale).astype(x.dtype)
            ys[j] = ys[j] + jnp.einsum("mr,or->mo", low, b)
    return ys


def first_products(
    x: Float[Array, "M I"], pairs: Sequence[LowRank | None]
) -> list[Float[Array, "M _"] | None]:
    """x @ a_j.T of each pair, made as one product."""
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return [None] * len(pairs)
    low = jnp.einsum("mi,ri->mr", x, jnp.concatenate([pair.a for pair in there]).astype(x.dtype))
    ends = list(itertools.accumulate(pair.a.shape[0] for pair in there))
    parts = iter(jnp.split(low, ends[:-1], axis=1))
    return [None if pair is None else next(parts) for pair in pairs]


def second_products(
    dys: Sequence[Float[Array, "M _"]], pairs: Sequence[LowRank | None]
) -> list[Float[Array, "M _"] | None]:
    """dy_j @ b_j of each pair."""
    back = lambda dy, pair: jnp.einsum("mo,or->mr", dy, pair.b.astype(dy.dtype))
    both = zip(dys, pairs, strict=True)
    return [None if pair is None else back(dy, pair) for dy, pair in both]


def _products(layouts, x, weights, pairs):
    return [
        jnp.einsum("mi,oi->mo", x, _dense(layout, w, pair, x.dtype))
        for layout, w, pair in zip(layouts, weights, pairs, strict=True)
    ]


def _dense(layout, w, pair, dtype):
    return dequantize(layout, w.bytes, w.statistics, w.layer, pair, dtype, "pallas")


def _forward(layouts, groups, x, weights, pairs):
    return _products(layouts, x, weights, pairs), (x, weights, pairs)


def _backward(layouts, groups, saved, dys):
    x, weights, pairs = saved
    # Tied to dy, else XLA may keep forward's weight for backward. The layer number is enough.
    numbers, dys = jax.lax.optimization_barrier(([w.layer for w in weights], dys))
    terms = [
        jnp.einsum("mo,oi->mi", dy, _dense(layout, w._replace(layer=i), pair, x.dtype))
        for layout, w, i, pair, dy in zip(layouts, weights, numbers, pairs, dys, strict=True)
    ]
    return sum(terms), None, pair_gradients(x, pairs, dys)


def pair_gradients(
    x: Float[Array, "M I"],
    pairs: Sequence[LowRank | None],
    dys: Sequence[Float[Array, "M _"]],
) -> list[LowRank | None]:
    """Cotangents of the pairs. The skinny products share one reading of x."""
    there = [j for j, pair in enumerate(pairs) if pair is not None]
    out = [None] * len(pairs)
    if not there:
        return out
    lows, backs = first_products(x, pairs), second_products(dys, pairs)
    wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
    da = wide("mr,mi->ri", jnp.concatenate([backs[j] for j in there], axis=1), x)
    at = 0
    for j in there:
        pair, low, rank = pairs[j], lows[j], pairs[j].a.shape[0]
        scale = jnp.asarray(pair.scale, jnp.float32)
        db = wide("mo,mr->or", dys[j], low) * scale
        dscale = jnp.sum(backs[j].astype(jnp.float32) * low.astype(jnp.float32))
        cast = lambda g, like: g.astype(jnp.asarray(like).dtype)
        out[j] = LowRank(
            cast(da[at : at + rank] * scale, pair.a),
            cast(db, pair.b),
            cast(dscale, pair.scale),
        )
        at += rank
    return out


_merged.defvjp(_forward, _backward)
