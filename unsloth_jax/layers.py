"""The maths of a decoder layer. Kernels are chosen here and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import attention as kernel
from pallas_kernels import causal_conv, recurrence
from unsloth_jax.dims import Params
from unsloth_jax.leaves import draws, folded, linear, linears

# attend(q, k, v, *, scale, window, cap, chunk, sinks) -> (mixed values, what the cache keeps)
Attend = Callable[..., tuple[Array, Any]]
# mlp(weights, x [B, T, D], activation or fn(weights, x)) -> [B, T, D]
Mlp = Callable[[Params, Array, Any], Array]


@dataclass(frozen=True)
class Mixers:
    """The ways in which tokens reach each other; called, it is attention.

    Each gives (a value of every token, what the cache keeps by name). `convolve(x [B, T, C], w,
    bias)` and `recur(q, k, v, decay, beta)` are those of `pallas_kernels`, with no borders to know.
    """

    attend: Attend
    convolve: Attend
    recur: Attend

    def __call__(self, *args: Any, **options: Any) -> tuple[Array, Any]:
        return self.attend(*args, **options)


class Holds(NamedTuple):
    """What a cache holds of a layer: keys and values, the last inputs of a convolution, a state."""

    attends: bool = True
    tail: tuple[int, int] | None = None  # inputs, channels
    state: tuple[int, int, int] | None = None  # heads, width of keys, width of values


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def rms_norm(
    w: Float[Array, " D"], x: Float[Array, "*B D"], eps: float, offset: float | None = None
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * w, the mean in float32 (arXiv:1910.07467).

    With `offset` the factor is w + offset, and the product is in float32 too.
    """
    x32 = x.astype(jnp.float32)
    unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if offset is not None:
        return (unit * (_last(w.astype(jnp.float32), x) + offset)).astype(x.dtype)
    return unit.astype(x.dtype) * _last(w.astype(x.dtype), x)


def layer_norm(node: Params, x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 (arXiv:1607.06450).

    The bias may be absent; a weight [n, D] has a row for each head of x.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(-1, keepdims=True)
    unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    y = unit * _last(node["weight"].astype(jnp.float32), x)
    if "bias" in node:
        y = y + _last(node["bias"].astype(jnp.float32), x)
    return y.astype(x.dtype)


def _last(w: Array, x: Array) -> Array:
    """w with as many axes as x."""
    return w.reshape((1,) * (x.ndim - w.ndim) + w.shape)


def scaled(x: Float[Array, "*B"], by: float) -> Float[Array, "*B"]:
    """x * by, rounded once."""
    return x if by == 1 else (x.astype(jnp.float32) * by).astype(x.dtype)


def feed_forward(
    node: Params,
    x: Float[Array, "B T D"],
    activation: str | Callable[[Params, Array], Array],
    tiles: int = 1,
) -> Float[Array, "B T D"]:
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202); without a gate c_proj(act(c_fc(x))).

    A family whose MLP is another gives that as a function in the activation's place.

    With `tiles` the tokens pass in as many parts, each computed again in the backward pass
    (arXiv:2501.01039). Raises ValueError unless they divide the tokens.
    """
    if tiles > 1:
        return _tiled(lambda x, n: feed_forward(folded(node, n), x, activation), x, tiles, node)
    if callable(activation):
        return activation(node, x)
    act = ACTIVATIONS[activation]
    if "c_fc" in node:
        return linear(node["c_proj"], act(checkpoint_name(linear(node["c_fc"], x), "up")))
    if "gate_up_proj" in node:
        gate, up = jnp.split(linear(node["gate_up_proj"], x), 2, axis=-1)
    else:
        gate, up = linears((node["gate_proj"], node["up_proj"]), x)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    return linear(node["down_proj"], act(gate) * up)


def _tiled(mlp: Callable[[Array, Any], Array], x: Array, tiles: int, node: Params) -> Array:
    tokens = x.shape[0] * x.shape[1]
    if tokens % tiles:
        raise ValueError(f"{tiles} tiles don't divide {x.shape[0]} x {x.shape[1]} tokens")
    parts = x.reshape(tiles, 1, tokens // tiles, x.shape[2])
    # Numbers only where masks are drawn by them, so that other programs have no operand more.
    numbers = jnp.arange(tiles) if draws(node) else None
    one = jax.checkpoint(lambda part: mlp(*part), prevent_cse=False)
    return jax.lax.map(one, (parts, numbers)).reshape(x.shape)


def self_attention(
    rule: kernel.Rule,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K u"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H*u"]:
    """Attention of whole rows to themselves, by the fastest kernel that takes them."""
    y = kernel.attention(rule, q, k, v, segments, positions, sinks=sinks)
    return y.reshape(*q.shape[:2], -1)


def row_mixers(
    segments: Int[Array, "B T"], positions: Int[Array, "B T"], documents: int | None = None
) -> Mixers:
    """Mixers of whole rows, whose documents don't reach each other; no cache keeps anything.

    `documents` is the most that a row holds, where that is known.
    """
    border = segments[:, 1:] != segments[:, :-1]
    starts = jnp.concatenate([jnp.ones_like(border[:, :1]), border], axis=1)

    def attend(q, k, v, *, scale, window, cap=None, chunk=None, sinks=None):
        rule = kernel.Rule(scale, window, cap, documents, chunk)
        return self_attention(rule, q, k, v, segments, positions, sinks), {}

    def recur(q, k, v, decay, beta=None):
        return recurrence.recur(q, k, v, decay, beta, starts, no_state(k, v))[0], {}

    convolve = lambda x, w, bias: (causal_conv.convolve(x, w, bias, starts), {})
    return Mixers(attend, convolve, recur)


def no_state(k: Float[Array, "B T G K"], v: Float[Array, "B T H V"]) -> Float[Array, "B H K V"]:
    """The state of a recurrence before its first token."""
    return jnp.zeros((k.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
