"""A user's metrics of an evaluation, as transformers' `compute_metrics` is called.

`compute_metrics` gets (predictions, label_ids): float32 logits [N, T, V], which score the next
token at each place, and the rows' own tokens [N, T], -100 where nothing is learnt. With
`preprocess_logits_for_metrics(logits [1, T, V], labels [1, T])`, a function of JAX and NumPy
arrays, only what it returns is kept, so that no more than one row's logits exist.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from unsloth_jax import decoder, lora
from unsloth_jax.dims import Batch, Params
from workflows import machine
from workflows.batching import Batches
from workflows.model import Model
from workflows.objective import embedded
from workflows.rows import IGNORED


class Measured(NamedTuple):
    """What a trainer was given."""

    compute: Callable[[Any], Mapping[str, Any]] | None = None
    reduce: Callable[[Any, Any], Any] | None = None


class EvalPrediction(NamedTuple):
    """What `compute_metrics` is given, by the names of transformers."""

    predictions: Any
    label_ids: np.ndarray


def beside(
    found: Callable[[Params], dict[str, float]],
    model: Model,
    sets: Mapping[str, Batches],
    user: Measured,
) -> Callable[[Params], dict[str, float]]:
    """`found` with the user's metrics of each set, their names after the set's and a "_"."""
    if user.compute is None:
        return found

    def metrics(adapters: Params) -> dict[str, float]:
        out = found(adapters)
        for prefix, batches in sets.items():
            got = user.compute(predictions(model, adapters, batches, user.reduce))
            out |= _named(prefix, got)
        return out

    return metrics


def _named(prefix: str, got: Any) -> dict[str, float]:
    numbers = isinstance(got, Mapping) and all(np.ndim(x) == 0 for x in got.values())
    if not numbers:
        raise TypeError(f"compute_metrics must return a dictionary of numbers, got {got!r:.80}")
    whole = lambda name: name if str(name).startswith(f"{prefix}_") else f"{prefix}_{name}"
    return {whole(name): float(value) for name, value in got.items()}


def predictions(
    model: Model, adapters: Params, batches: Batches, reduce: Callable | None
) -> EvalPrediction:
    """All rows' predictions and labels, padded with -100 to the longest.

    Raises ValueError where whole logits would not fit into the host's memory.
    """
    if reduce is None:
        _room(batches, model.config.vocab)
    kept = [(keep(reduce, logits, labels), labels) for logits, labels in scored(
        model, adapters, batches)]  # fmt: skip
    joined = jax.tree.map(lambda *parts: _joined(parts), *(one for one, _ in kept))
    return EvalPrediction(joined, _joined([labels for _, labels in kept]))


def keep(reduce: Callable | None, logits: jax.Array, labels: np.ndarray) -> Any:
    """What stays of a row's logits, on the host."""
    return jax.tree.map(np.asarray, logits if reduce is None else reduce(logits, labels))


def scored(
    model: Model, adapters: Params, batches: Batches
) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """(logits [1, T, V] float32, labels [1, T]) of each row that holds tokens, in order."""
    hidden, scores = programs(model.family, model.config, model.scale)
    for batch in batches.epoch(0):
        labels = labelled(batch)
        micro = jax.device_put(jax.tree.map(lambda x: x[0], embedded(model.params, batch)))
        states = hidden(model.params, adapters, micro)
        for i in np.flatnonzero(np.asarray(batch.segments[0]).any(-1)):
            yield scores(model.params, adapters, states[i : i + 1]), labels[i : i + 1]


@cache
def programs(family: ModuleType, c: Any, scale: float) -> tuple[Callable, Callable]:
    """Jitted: the hidden states of a batch, and the logits of some."""

    def hidden(params: Params, adapters: Params, b: Batch) -> jax.Array:
        attached = lora.attach(params, adapters, scale)
        rows = b.tokens, b.positions, b.segments
        return decoder.forward(family, c, attached, *rows, embedded=b.embedded)

    def scores(params: Params, adapters: Params, x: jax.Array) -> jax.Array:
        return decoder.logits(family, c, lora.attach(params, adapters, scale), x)

    return jax.jit(hidden), jax.jit(scores)


def labelled(batch: Batch) -> np.ndarray:
    """Labels [B, T] of the first micro-batch, not shifted: each token's own."""
    learnt = np.where(batch.weights[0] > 0, batch.targets[0], IGNORED)
    return np.pad(learnt[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED)


def _room(batches: Batches, vocab: int) -> None:
    needed, free = 4 * len(batches.rows) * batches.widest * vocab, machine.host_free()
    if needed > free // 2:
        raise ValueError(
            f"compute_metrics gets all logits, up to {needed / 2**30:.1f} GiB of them, but the "
            f"host has {free / 2**30:.1f} GiB: give preprocess_logits_for_metrics too, such as "
            "lambda logits, labels: logits.argmax(-1)"
        )


def _joined(parts: Any) -> np.ndarray:
    """Parts along the first axis, shorter ones padded with -100 along the second."""
    parts = [np.atleast_1d(part) for part in parts]
    if parts[0].ndim > 1:
        width = max(part.shape[1] for part in parts)
        gap = lambda x: [(0, width - n if i == 1 else 0) for i, n in enumerate(x.shape)]
        parts = [np.pad(part, gap(part), constant_values=IGNORED) for part in parts]
    return np.concatenate(parts)
