"""One optimizer step over the trainable tree."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unsloth_jax.dims import Batch, Measured, Params, Total, measured

LossFn = Callable[[Params, Params, Batch], Total | Measured]  # (trainable, frozen, micro-batch)
StatisticsFn = Callable[[Params, Params, Batch], dict[str, Total]]


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
    metrics: Any = flax.struct.field(
        default_factory=dict
    )  # Totals, Most and Least by name, of losses that have some


def start(trainable: Params, optimizer: optax.GradientTransformation) -> State:
    """State before the first step; the trainable tree is copied, since steps donate it."""
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
    return State(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def whole(loss: LossFn, statistics: StatisticsFn | None) -> LossFn:
    """`loss` of a batch that is a step of its own: it is told the `statistics` of itself."""
    if statistics is None:
        return loss

    def fn(trainable: Params, frozen: Params, b: Batch) -> Total | Measured:
        found = {name: total.mean() for name, total in statistics(trainable, frozen, b).items()}
        return loss(trainable, frozen, b._replace(beside=(b.beside or {}) | found))

    return fn


def _informed(
    batches: Batch, statistics: StatisticsFn | None, trainable: Params, frozen: Params
) -> Batch:
    """The micro-batches, each told the means over all of them."""
    if statistics is None:
        return batches
    totals = jax.lax.map(lambda batch: statistics(trainable, frozen, batch), batches)
    count = jax.tree.leaves(batches)[0].shape[0]
    means = {name: Total(*(x.sum(0) for x in total)).mean() for name, total in totals.items()}
    found = {name: jnp.broadcast_to(x[None], (count, *x.shape)) for name, x in means.items()}
    return batches._replace(beside=(batches.beside or {}) | jax.lax.stop_gradient(found))


def make_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    statistics: StatisticsFn | None = None,
):
    """step(state, frozen, batches) -> (state, Report); `batches` has a leading micro-batch axis.

    Gradients of the sums are added over micro-batches and divided once by the total count. The
    old state is donated; where loss or gradient is not finite it is returned unchanged. Means of
    `statistics` over the whole step stand in each micro-batch's `beside`, without gradient.
    """

    def summed(trainable, frozen, batch):
        found = measured(loss(trainable, frozen, batch))
        return found.total.value, found

    def step(state: State, frozen: Params, batches: Batch) -> tuple[State, Report]:
        batches = _informed(batches, statistics, state.trainable, frozen)

        def gradient(batch):
            (_, found), g = jax.value_and_grad(summed, has_aux=True)(state.trainable, frozen, batch)
            return g, found

        def micro(grads, batch):
            g, found = gradient(batch)
            return jax.tree.map(jnp.add, grads, g), found

        if jax.tree.leaves(batches)[0].shape[0] == 1:
            grads, found = gradient(jax.tree.map(lambda x: x[0], batches))
        else:
            zero = jax.tree.map(jnp.zeros_like, state.trainable)
            grads, each = jax.lax.scan(micro, zero, batches)
            metrics = {name: of.over() for name, of in each.metrics.items()}
            found = Measured(each.total.over(), metrics)
        total, metrics = found
        grads = jax.tree.map(lambda g: g / jnp.where(total.count == 0, 1.0, total.count), grads)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.trainable)
        new = State(optax.apply_updates(state.trainable, updates), opt, state.step + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(total.value)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return kept, Report(total.mean(), norm, total.count, finite, metrics)

    return jax.jit(step, donate_argnums=0)
