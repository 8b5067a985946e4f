"""The maths of a decoder layer. Kernels are chosen here and nowhere else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax.dims import Params
from unsloth_jax.leaves import linear, linears

# attend(q, k, v, *, scale, window) -> (mixed values [B, T, H*h], what the cache keeps)
Attend = Callable[..., tuple[Array, Any]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def rms_norm(w: Float[Array, " D"], x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * w, the mean in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return unit.astype(x.dtype) * w.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def gated_mlp(node: Params, x: Float[Array, "B T D"], activation: str) -> Float[Array, "B T D"]:
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""
    gate, up = linears((node["gate_proj"], node["up_proj"]), x)
    return linear(node["down_proj"], ACTIVATIONS[activation](gate) * up)


def causal_mask(
    q_pos: Int[Array, "B T"],
    q_seg: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    k_seg: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B 1 1 T S"]:
    """The mask rule of training, prefill and decoding: same segment, not later, in the window."""
    back = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (back >= 0) & (k_seg[:, None, :] == q_seg[:, :, None])
    if window is not None:
        seen = seen & (back < window)
    return seen[:, None, None]


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B 1 1 T S"],
    scale: float,
) -> Float[Array, "B T H*h"]:
    """Grouped-query attention (arXiv:2305.13245), softmax in float32."""
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    probs = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(batch, length, heads * width)
