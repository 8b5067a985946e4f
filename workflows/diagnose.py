"""Where a training step stopped being finite, found by a pass of its own."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import decoder, lora, tree
from unsloth_jax.dims import Batch, Params, measured
from unsloth_jax.leaves import stacks
from unsloth_jax.remat import Memory
from workflows.objective import SFT, Objective

Find = Callable[[Params, Params, Batch], str]  # (adapters, frozen, the step's batch) -> where


def first_bad_layer(
    family: ModuleType,
    c: Any,
    scale: float,
    objective: Objective = SFT,
    documents: int | None = None,
) -> Find:
    """A function that says where values, or else gradients, are first not finite.

    `documents` is that of `decoder.forward`. It runs beside a run's state with every layer computed
    again in the backward pass; where the device has no room for that it says so.
    """

    @jax.jit
    def forward(adapters, frozen, b):
        params = lora.attach(frozen, adapters, scale)
        rows = b.tokens, b.positions, b.segments, b.embedded, documents, b.shared
        return decoder.finite_layers(family, c, params, *rows)

    loss = objective.alone(family, c, scale, Memory("full"), documents)
    value = lambda adapters, frozen, b: measured(loss(adapters, frozen, b)).total.value
    backward = jax.jit(jax.value_and_grad(value))

    def find(adapters: Params, frozen: Params, batches: Batch) -> str:
        try:
            return searched(adapters, frozen, batches)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return "the device has no room to search for the first layer"

    def searched(adapters: Params, frozen: Params, batches: Batch) -> str:
        for n in range(len(batches.tokens)):
            b = jax.tree.map(lambda x, n=n: x[n], batches)
            bad = np.flatnonzero(~np.asarray(forward(adapters, frozen, b)))
            if bad.size:
                return f"the output of layer {bad[0]} is the first that is not finite"
            total, grads = backward(adapters, frozen, b)
            if not np.isfinite(total):
                return "every layer's output is finite, the head's scores are not"
            bad = _layers_without_gradient(grads, c.layers)
            if bad:
                # Gradients are found from the last layer to the first.
                layer = max(bad)
                return f"the gradient of layer {layer} is the first that is not, in {bad[layer]}"
        return "each micro-batch alone is finite, their sum or the gradient's norm is not"

    return find


def _layers_without_gradient(grads: Params, layers: int) -> dict[int, str]:
    """Layers with a gradient that is not finite, and the first path where it is."""
    out: dict[int, str] = {}
    for path, leaf in tree.flatten(grads).items():
        whole = stacks(leaf, layers)
        for part, ids in zip(whole.parts, whole.layers, strict=True):
            axes = tuple(range(1, part.ndim))
            for i in np.flatnonzero(~np.asarray(jnp.isfinite(part).all(axes))):
                out.setdefault(ids[i], path)
    return out
