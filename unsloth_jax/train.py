"""One optimizer step over the trainable tree."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unsloth_jax.dims import Batch, Params, Total

LossFn = Callable[[Params, Params, Batch], Total]  # (trainable, frozen, one micro-batch)


@flax.struct.dataclass
class State:
    """What a step changes and a checkpoint keeps. Fields are Any since trees may hold shapes."""

    trainable: Any  # Params
    opt: Any  # optax.OptState
    step: Any  # int32 [], optimizer steps taken


@flax.struct.dataclass
class Report:
    """What comes back from the device after a step: scalars."""

    loss: Any  # nats a supervised token
    grad_norm: Any  # before clipping
    tokens: Any  # supervised tokens of the whole batch
    finite: Any  # False where loss or gradient was not, and the state was kept


def start(trainable: Params, optimizer: optax.GradientTransformation) -> State:
    """State before the first step; the trainable tree is copied, since steps donate it."""
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
    return State(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def make_step(loss: LossFn, optimizer: optax.GradientTransformation):
    """step(state, frozen, batches) -> (state, Report); `batches` has a leading micro-batch axis.

    Gradients of the sums are added over micro-batches and divided once by the total count. The
    old state is donated; where loss or gradient is not finite it is returned unchanged.
    """

    def summed(trainable, frozen, batch):
        total = loss(trainable, frozen, batch)
        return total.value, total

    def step(state: State, frozen: Params, batches: Batch) -> tuple[State, Report]:
        def micro(carry, batch):
            grads, total = carry
            (_, new), g = jax.value_and_grad(summed, has_aux=True)(state.trainable, frozen, batch)
            return (jax.tree.map(jnp.add, grads, g), jax.tree.map(jnp.add, total, new)), None

        if jax.tree.leaves(batches)[0].shape[0] == 1:
            only = jax.tree.map(lambda x: x[0], batches)
            (_, total), grads = jax.value_and_grad(summed, has_aux=True)(
                state.trainable, frozen, only
            )
        else:
            zero = jax.tree.map(jnp.zeros_like, state.trainable), Total(*jnp.zeros((2,)))
            (grads, total), _ = jax.lax.scan(micro, zero, batches)
        grads = jax.tree.map(lambda g: g / jnp.where(total.count == 0, 1.0, total.count), grads)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.trainable)
        new = State(optax.apply_updates(state.trainable, updates), opt, state.step + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(total.value)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return kept, Report(total.mean(), norm, total.count, finite)

    return jax.jit(step, donate_argnums=0)
