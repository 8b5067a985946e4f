"""Optimizers and schedules by Hugging Face names, as optax transforms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from unsloth_jax import adam8

Schedule = Callable[[jax.Array], jax.Array]  # step number, from 0 -> learning rate


def _decay(kind: Callable[[jax.Array], jax.Array]) -> Callable[[float, int, int], Schedule]:
    def make(peak: float, warmup: int, steps: int) -> Schedule:
        def rate(step: jax.Array) -> jax.Array:
            done = (step - warmup) / max(1, steps - warmup)
            rise = step / max(1, warmup)
            return peak * jnp.where(step < warmup, rise, kind(jnp.clip(done, 0, 1)))

        return rate

    return make


SCHEDULES: dict[str, Callable[[float, int, int], Schedule]] = {
    "linear": _decay(lambda done: 1 - done),
    "cosine": _decay(lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done))),
    "constant": lambda peak, warmup, steps: lambda step: jnp.full(jnp.shape(step), peak),
    "constant_with_warmup": _decay(lambda done: jnp.ones_like(done)),
}
# How the moments are kept; adamw_8bit is bitsandbytes' AdamW8bit.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw_torch": optax.scale_by_adam,
    "adamw_8bit": adam8.scale_by_adam,
}


def schedule(name: str, peak: float, warmup: int, steps: int) -> Schedule:
    """Learning rate of step n as transformers' `get_scheduler` gives it.

    `warmup` and `steps` count optimizer steps. Raises ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type {name!r} is not supported; supported: {sorted(SCHEDULES)}"
        )
    return SCHEDULES[name](peak, warmup, steps)


def clip_by_norm(limit: float | int) -> optax.GradientTransformation:
    """Scales gradients whose global norm exceeds `limit`, as torch's `clip_grad_norm_` does."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make(
    name: str,
    rate: Schedule,
    *,
    weight_decay: float | int = 0.0,
    max_grad_norm: float | int = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Clipping (0 for none), then AdamW (arXiv:1711.05101), computed in float32.

    Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim {name!r} is not supported; supported: {list(OPTIMIZERS)}")
    adamw = optax.chain(
        OPTIMIZERS[name](b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(clip_by_norm(max_grad_norm), adamw) if max_grad_norm else adamw
