"""The loss on held-out rows, and what follows from it: best adapters, the end of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax.dims import Least, Measured, Most, Params, Total, measured
from unsloth_jax.train import LossFn
from workflows.batching import Batches
from workflows.generate import Stopwatch
from workflows.model import Model
from workflows.objective import SFT, Objective, embedded

CLOCKS = ("runtime", "samples_per_second")


class Best(NamedTuple):
    """The adapters of the best evaluation so far."""

    metric: float
    step: int
    adapters: Params


def of_sets(given: Any, made: Callable[[Any], list[Any]]) -> dict[str, list[Any]]:
    """What `made` makes of one evaluation set, "" by name, or of several; {} of None.

    Raises as `of_each`, and ValueError for an empty dictionary.
    """
    if given is None:
        return {}
    several = isinstance(given, Mapping)
    if several and not given:
        raise ValueError("eval_dataset is an empty dictionary: there is nothing to evaluate")
    return of_each(given if several else {"": given}, made)


def of_each(held_out: Mapping[str, Any], made: Callable[[Any], list[Any]]) -> dict[str, list[Any]]:
    """What `made` makes of each evaluation set; its ValueErrors and TypeErrors name the set."""
    found = {}
    for name, one in held_out.items():
        try:
            found[name] = made(one)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            which = f"eval_dataset[{name!r}]" if name else "eval_dataset"
            raise kind(f"{which}: {error}") from error
    return found


def evaluator(
    model: Model, sets: Mapping[str, Batches], objective: Objective = SFT
) -> Callable[[Params], dict[str, float]]:
    """fn(adapters) -> metrics of one pass over each set, in order, their names before a "_".

    The loss is the sum over all supervised tokens divided once by their number, so that batch
    size and padding make no difference; perplexity only where it is a plain cross entropy.
    Compiled once a width.
    """
    documents = max(batches.documents(batches.steps(0)) for batches in sets.values())
    loss = jax.jit(objective.alone(model.family, model.config, model.scale, documents=documents))

    def metrics(adapters: Params) -> dict[str, float]:
        found = {}
        for prefix, batches in sets.items():
            clock = Stopwatch()
            totals = _totals(loss, adapters, model.params, batches, objective)
            named = _named(prefix, totals, len(batches.rows), clock(), objective.counts)
            if not objective.perplexity:
                del named[f"{prefix}_perplexity"]
            found |= named
        return found

    return metrics


def _totals(
    loss: LossFn, adapters: Params, frozen: Params, batches: Batches, objective: Objective
) -> list[Measured]:
    totals = []
    for batch in batches.epoch(0):
        ready = embedded(frozen, objective.compared(batch))
        micro = jax.tree.map(lambda x: x[0], ready)
        totals.append(measured(loss(adapters, frozen, jax.device_put(micro))))
        # One batch ahead of the device, else all of them would pile up there.
        jax.block_until_ready(totals[-2:-1])
    return jax.device_get(totals)


def _named(
    prefix: str, totals: list[Measured], rows: int, seconds: float, counts: str
) -> dict[str, float]:
    value, count = (sum(map(float, part)) for part in zip(*(m.total for m in totals), strict=True))
    loss = value / count
    found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    found |= {counts: int(count)} | means([m.metrics for m in totals])
    found |= zip(CLOCKS, (round(seconds, 3), round(rows / seconds, 3)), strict=True)
    return {f"{prefix}_{name}": value for name, value in found.items()}


def means(metrics: Sequence[Mapping[str, Total | Most | Least]]) -> dict[str, float]:
    """Each metric's mean or extreme over batches, those of which nothing was counted left out.

    Where answers stand alone, margins are the difference of the means, as in TRL's KTO.
    """
    whole = {
        name: type(of)(*map(np.stack, zip(*(m[name] for m in metrics), strict=True))).over()
        for name, of in (metrics or [{}])[0].items()
    }
    sums = {name: of for name, of in whole.items() if isinstance(of, Total)}
    ends = {name: float(of.value) for name, of in whole.items() if not isinstance(of, Total)}
    found = {name: float(value / count) for name, (value, count) in sums.items() if count}
    found |= {name: value for name, value in ends.items() if math.isfinite(value)}
    sides = [found.get(f"rewards/{side}") for side in ("chosen", "rejected")]
    if "rewards/margins" not in found and None not in sides:
        found["rewards/margins"] = sides[0] - sides[1]
    return found


def due(strategy: str, every: int, step: int, epoch: float) -> bool:
    """Whether a run that has taken `step` steps, `epoch` epochs, is evaluated now."""
    if strategy == "steps":
        return step % every == 0
    return strategy == "epoch" and epoch == int(epoch)


def interval(given: int | float, total: int) -> int:
    """Steps between evaluations; under 1 it is a share of all steps, as in transformers."""
    return max(1, math.ceil(total * given) if given < 1 else int(given))


def check(name: str, sets: Sequence[str], objective: Objective, more: bool) -> None:
    """Raises ValueError for a metric that no evaluation of these `sets` will give.

    Where `more` than the loss is measured, any name after a set's may be one.
    """
    own = ["loss", "perplexity"] if objective.perplexity else ["loss"]
    known = [f"{one}_{n}" for one in sets for n in own]
    beside = [f"{one}_{n}" for one in sets for n in (objective.counts, *CLOCKS)]
    full = _full(name)
    if full in known + beside or (more and any(full.startswith(f"{one}_") for one in sets)):
        return
    also = f", or another after {[f'{one}_' for one in sets]}" if more else ""
    raise ValueError(f"metric_for_best_model={name!r} is none of {known}{also}")


def _full(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def chosen(metrics: Mapping[str, float], name: str) -> float:
    """The metric by which adapters are judged; raises ValueError where no evaluation gave it."""
    full = _full(name)
    if full not in metrics:
        raise ValueError(f"metric_for_best_model={name!r} is none of {sorted(metrics)}")
    return metrics[full]


def better(best: Best | None, metric: float, step: int, adapters: Params, greater: bool) -> Best:
    """The better of what was best and what is there now, copied: a step donates its adapters.

    A metric that is no number is worse than any.
    """
    if best is not None and not math.isnan(best.metric):
        if not (metric > best.metric if greater else metric < best.metric):
            return best
    return Best(metric, step, jax.tree.map(lambda x: jnp.array(x, copy=True), adapters))
