"""Mixtures of experts: each token goes to a few of many MLPs, and their answers are weighed.

Tokens are sorted by expert and multiplied group by group (arXiv:2211.15841): none is dropped, and
no expert works for tokens that were not sent to it. Routing is in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params
from unsloth_jax.layers import ACTIVATIONS
from unsloth_jax.leaves import Groups, grouped


class Route(NamedTuple):
    """To which experts each token goes, and with what weight; k experts a token."""

    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class Spread(NamedTuple):
    """How tokens were sent to experts, summed over tokens and the layers that have some."""

    chances: Float[Array, " E"]  # of the router's softmax over all experts
    sent: Float[Array, " E"]  # tokens
    rows: Float[Array, ""]  # tokens times layers


# From the products of an expert's input to what its last matrix takes.
Inner = Callable[[list[Array]], Array]


def router_scores(node: Params, x: Float[Array, "N D"]) -> Float[Array, "N E"]:
    """x @ weight.T (+ bias) in float32, whatever the model computes in."""
    y = jnp.einsum("nd,ed->ne", *(a.astype(jnp.float32) for a in (x, node["weight"])))
    return y + node["bias"].astype(jnp.float32)[None] if "bias" in node else y


def softmax_route(scores: Float[Array, "N E"], k: int, renormalized: bool) -> Route:
    """The k likeliest experts by softmax; their chances again to a sum of 1 if `renormalized`."""
    chances, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), k)
    if renormalized:
        chances = chances / chances.sum(-1, keepdims=True)
    return Route(chosen, chances)


def sigmoid_route(
    scores: Float[Array, "N E"],
    correction: Float[Array, " E"],
    k: int,
    renormalized: bool,
    groups: int = 1,
    kept: int = 1,
    scale: float = 1.0,
) -> Route:
    """The k experts of the highest sigmoid + correction; their sigmoids times `scale` weigh them.

    Experts lie in `groups` of which a token uses the `kept` ones whose two highest have the largest
    sum. The correction balances experts and weighs nothing (arXiv:2408.15664, 2412.19437).
    """
    chances = jax.nn.sigmoid(scores)
    ranks = jax.lax.stop_gradient(chances) + correction.astype(jnp.float32)[None]
    if kept < groups:
        by_group = ranks.reshape(ranks.shape[0], groups, -1)
        best = jax.lax.top_k(jax.lax.top_k(by_group, 2)[0].sum(-1), kept)[1]
        used = jax.nn.one_hot(best, groups, dtype=jnp.bool_).any(1)
        ranks = jnp.where(used[..., None], by_group, -jnp.inf).reshape(ranks.shape)
    chosen = jax.lax.top_k(ranks, k)[1]
    chances = jnp.take_along_axis(chances, chosen, axis=-1)
    if renormalized:
        chances = chances / (chances.sum(-1, keepdims=True) + 1e-20)
    return Route(chosen, chances * scale)


def spread(
    scores: Float[Array, "N E"], chosen: Int[Array, "N k"], real: Float[Array, " N"]
) -> Spread:
    """A layer's, of the tokens that are `real` (1, else 0)."""
    chances = jax.nn.softmax(scores, axis=-1)
    sent = jax.nn.one_hot(chosen, scores.shape[-1]).sum(1)
    return Spread(real @ chances, real @ sent, real.sum())


def chosen_route(scores: Float[Array, "N E"], k: int) -> Route:
    """The k experts of the highest scores, weighed by the softmax of these alone."""
    highest, chosen = jax.lax.top_k(scores, k)
    return Route(chosen, jax.nn.softmax(highest, axis=-1))


def gated(activation: str, products: list[Array]) -> Array:
    """act(gate) * up, of the products [gate, up]."""
    gate, up = products
    return ACTIVATIONS[activation](gate) * up


def clamped(gain: float, limit: float, products: list[Array]) -> Array:
    """gate * sigmoid(gain * gate) * (up + 1), gate up to `limit`, up between -limit and limit.

    Of one product whose even columns are the gate, the odd ones up (transformers `gpt_oss`).
    """
    (both,) = products
    gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(gain * gate) * (up + 1)


def mixture(
    node: Params,
    x: Float[Array, "N D"],
    route: Route,
    first: tuple[str, ...],
    last: str,
    inner: Inner,
    weigh_inputs: bool = False,
) -> Float[Array, "N D"]:
    """The weighed sum of what each token's experts give.

    `node` holds the experts' matrices [E, O, I] by name: `inner` of the products with those named
    `first` is what `last` takes. Biases [E, O] stand beside them in `{weight, bias}` nodes. With
    `weigh_inputs` weights multiply what experts take, else what they give.
    """
    count, k = route.experts.shape
    flat = route.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=_experts(node[last])).astype(jnp.int32)
    groups = Groups(flat[order], sizes)
    rows = _sorted(x, order, back, k)
    if weigh_inputs:
        by = _permuted(route.weights.reshape(-1, 1), order, back)
        rows = (rows.astype(jnp.float32) * by).astype(x.dtype)
    y = grouped(node[last], inner([grouped(node[name], rows, groups) for name in first]), groups)
    y = _permuted(y, back, order).reshape(count, k, -1).astype(jnp.float32)
    weighed = y if weigh_inputs else y * route.weights[..., None]
    return weighed.sum(1).astype(x.dtype)


def _experts(node: Params) -> int:
    return node["weight"].shape[0]


def _sorted(x: Array, order: Array, back: Array, k: int) -> Array:
    """x's rows k times each, in the order of their experts."""
    return _permuted(jnp.repeat(x, k, axis=0), order, back)


@jax.custom_vjp
def _permuted(x: Array, order: Array, back: Array) -> Array:
    """x[order]; `back` is the inverse, so that the gradient is a gather and no scattered sum."""
    return x[order]


_permuted.defvjp(
    lambda x, order, back: (x[order], back),
    lambda back, dy: (dy[back], *(np.zeros(back.shape, jax.dtypes.float0) for _ in range(2))),
)
