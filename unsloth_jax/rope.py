"""Rotary position embedding: frequencies of every scaling kind, angles, rotation.

RoFormer (arXiv:2104.09864); linear (kaiokendev), dynamic NTK (bloc97, emozilla), YaRN
(arXiv:2309.00071), LongRoPE (arXiv:2402.13753), Llama 3.1's rescaling. Field names: transformers
`rope_parameters`.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Angles = tuple[Array, Array]  # cos and sin, float32 [B, T, 1, h/2]


@dataclass(frozen=True)
class Rope:
    """Everything that decides the angles of one kind of layer. Lengths are in tokens."""

    kind: str
    theta: float
    width: int  # of the part of a head that turns
    factor: float = 1.0
    context: int = 0  # the length the model was first trained on
    low: float = 0.0  # llama3: turns within the context under which a frequency is divided
    high: float = 0.0  # llama3: turns above which a frequency is kept
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin
    short: tuple[float, ...] = ()  # longrope: divisors of documents within the context
    long: tuple[float, ...] = ()  # longrope: divisors of longer ones


def frequencies(r: Rope) -> np.ndarray:
    """Radians a token, float32 [h/2]; "dynamic" and "longrope" those of short documents."""
    plain = 1 / (np.float32(r.theta) ** (np.arange(0, r.width, 2, dtype=np.float32) / r.width))
    if r.kind == "linear":
        return plain / np.float32(r.factor)
    if r.kind == "llama3":
        turns = r.context * plain / np.float32(2 * math.pi)
        # Llama 4 has one number for both ends of the ramp.
        wide = max(r.high - r.low, 1e-6)
        keep = np.clip((turns - r.low) / wide, 0, 1).astype(np.float32)
        return plain * keep + plain / np.float32(r.factor) * (1 - keep)
    if r.kind == "yarn":
        return _yarn(r, plain)
    if r.kind == "longrope":
        return plain / np.asarray(r.short, np.float32)
    return plain


def _yarn(r: Rope, plain: np.ndarray) -> np.ndarray:
    """Dimensions that turn often keep their frequency, slow ones are divided, a ramp between."""

    def dimension(turns: float) -> float:
        return r.width * math.log(r.context / (turns * 2 * math.pi)) / (2 * math.log(r.theta))

    low, high = dimension(r.beta_fast), dimension(r.beta_slow)
    if r.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r.width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(r.width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    ramp = ramp.astype(np.float32)
    return plain / np.float32(r.factor) * ramp + plain * (1 - ramp)


def angles(r: Rope, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Angles:
    """cos and sin of every position; `lengths` is the length of each token's document."""
    if r.kind == "dynamic":
        over = jnp.maximum(lengths, r.context).astype(jnp.float32) / r.context
        growth = (r.factor * over - (r.factor - 1)) ** (r.width / (r.width - 2))
        exponent = jnp.arange(0, r.width, 2, dtype=jnp.float32)[None, None] / r.width
        f = 1 / ((r.theta * growth)[..., None] ** exponent)
    else:
        f = jnp.asarray(frequencies(r))[None, None]
    if r.kind == "longrope":
        beyond = f * jnp.asarray(np.float32(r.short) / np.float32(r.long))[None, None]
        f = jnp.where((lengths > r.context)[..., None], beyond, f)
    angle = positions[..., None].astype(jnp.float32) * f
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return cos[:, :, None] * r.attention_factor, sin[:, :, None] * r.attention_factor


def rotate(x: Float[Array, "B T n h"], by: Angles) -> Float[Array, "B T n h"]:
    """Turns the two halves of each head against each other (Hugging Face's convention).

    Of a head that is wider than the angles only the first part turns.
    """
    cos, sin = by
    width = 2 * cos.shape[-1]
    left, right = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return _whole(x, turned, width)


def rotate_pairs(x: Float[Array, "B T n h"], by: Angles) -> Float[Array, "B T n h"]:
    """`rotate` of neighbouring elements instead of halves (RoFormer's own order)."""
    cos, sin = by
    width = 2 * cos.shape[-1]
    pairs = x[..., :width].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    left, right = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([left * cos - right * sin, right * cos + left * sin], -1)
    return _whole(x, turned.reshape(*x.shape[:-1], width), width)


def _whole(x: Array, turned: Array, width: int) -> Array:
    turned = turned.astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], -1)
