"""What a run lowers: a loss of adapters and a batch, and what a batch needs before it."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from unsloth_jax import decoder, lora, losses, plan, remat, train, tree
from unsloth_jax.dims import Batch, Params, Total
from unsloth_jax.leaves import Hosted


def loss(
    model: ModuleType,
    c: Any,
    scale: float,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = None,
) -> train.LossFn:
    """Cross entropy of the supervised tokens under base plus adapters.

    `memory` and `documents` are those of `decoder.forward`.
    """

    def fn(adapters: Params, frozen: Params, b: Batch) -> Total:
        params = lora.attach(frozen, adapters, scale)
        hidden = decoder.forward(
            model, c, params, b.tokens, b.positions, b.segments, memory, documents, b.embedded
        )
        head = model.head(c, params)
        logps = losses.token_logprobs(hidden, head, b.targets, memory.chunk, b.weights)
        return losses.sft(logps, b.weights)

    return fn


class Objective(NamedTuple):
    """How a run's loss is built, and the batches of its steps made ready.

    `name` stands in checkpoints. `loss` takes what `objective.loss` takes. `ready(step, batch)`
    fills in what the loss reads beside the rows, on the host, a step ahead of the device.
    """

    name: str
    loss: Callable[..., train.LossFn]
    ready: Callable[[int, Batch], Batch] = lambda step, batch: batch


SFT = Objective("sft/1", loss)


def hosted(params: Params) -> Params:
    """The tree with its embedding table in host memory, where a head of its own stays behind.

    A tied or quantized table is needed on the device: then the tree as it is.
    """
    path, leaf = plan.table(params)
    if isinstance(leaf, Hosted) or not plan.hostable(params):
        return params
    return tree.unflatten(tree.flatten(params) | {path: Hosted(np.asarray(leaf))})


def embedded(params: Params, batch: Batch) -> Batch:
    """The batch with its tokens' embeddings, where their table is in host memory."""
    _, leaf = plan.table(params)
    return batch._replace(embedded=leaf.rows(batch.tokens)) if isinstance(leaf, Hosted) else batch
