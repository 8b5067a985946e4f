"""Evaluation by reward: held-out prompts are answered and scored, alike at each evaluation."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unsloth_jax import advantages
from unsloth_jax.dims import Params
from workflows import grpo_report
from workflows.engines import InProcess
from workflows.evaluate import CLOCKS
from workflows.generate import Stopwatch
from workflows.grpo_batches import Generation, PolicyBatches
from workflows.grpo_prompts import Prompt

LEFT_OUT = ("rollout_seconds", "reward_seconds", "rollout_tokens_per_s", "num_tokens")
SEED = 999_983  # beside the run's: generations of training have other keys


def evaluator(
    batches: PolicyBatches, sets: Mapping[str, Sequence[Prompt]]
) -> Callable[[Params], dict[str, float]]:
    """fn(adapters) -> metrics of each set, their names before a "_": TRL's, without a loss.

    A completion's random key is that of its prompt's place and of the run's seed, so that every
    evaluation draws alike, and none changes what training draws.
    """

    def metrics(adapters: Params) -> dict[str, float]:
        found = {}
        for prefix, prompts in sets.items():
            clock = Stopwatch()
            told = _told(batches, prompts, adapters)
            seconds = clock()
            told |= zip(CLOCKS, (round(seconds, 3), round(len(prompts) / seconds, 3)), strict=True)
            found |= {f"{prefix}_{name}": value for name, value in told.items()}
        return found

    return metrics


def _told(batches: PolicyBatches, prompts: Sequence[Prompt], adapters: Params) -> dict[str, Any]:
    """One set's metrics; NaN where no function gave a reward."""
    a, how = batches.args, batches.args.sampling_eval()
    size, engine = a.per_device_eval_batch_size, batches.engine
    if size is not None and isinstance(engine, InProcess):
        engine = replace(engine, slots=size)
    base = (a.seed * SEED + SEED) % 2**32
    drawn = engine.draw(adapters, prompts, how, base)
    completions = list(itertools.chain.from_iterable(drawn.completions))
    parts, step = [], max(1, (size or batches.rows_a_generation) // how.n)
    for at in range(0, len(prompts), step):
        mine = slice(at * how.n, (at + step) * how.n)
        brought = None if drawn.rewards is None else drawn.rewards[mine]
        parts.append(batches.scores(prompts[at : at + step], completions[mine], brought))
    scores = batches.rewards.joined(parts)
    worth = advantages.advantages(
        scores.rewards, batches.rewards.weights, how.n, scale_rewards=a.scale_rewards,
        multi_objective_aggregation=a.multi_objective_aggregation,
    )  # fmt: skip
    masks = [one.drawn for one in completions]
    whole = Generation(list(prompts), completions, masks, scores, worth, {})
    told = grpo_report.metrics(whole, drawn.counts, {"rollout": 1.0, "rewards": 0.0})
    told["reward"] = math.nan if told["reward"] is None else told["reward"]
    return {name: value for name, value in told.items() if name not in LEFT_OUT}
