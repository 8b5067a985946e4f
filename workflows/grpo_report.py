"""What is told of a generation: numbers for the log, completions to read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workflows.grpo_config import GRPOConfig
from workflows.rollout import Counts

if TYPE_CHECKING:
    from workflows.grpo_batches import Generation

GRAM = 4  # tokens in a row that count as repeated where they stood before
KEPT_EVERY, KEPT = 10, 4  # generations, and completions of them that the log keeps unasked
TABLE = "sampled_completions"  # the name of a table in the log
RATIO = "sampling/importance_sampling_ratio"


def metrics(found: "Generation", counts: Counts, seconds: dict[str, float]) -> dict[str, Any]:
    """TRL's names, and the time that rollout and rewards took."""
    rewards, flat = found.worth.rewards, found.worth.flat
    given = rewards[~np.isnan(rewards)]
    lengths = np.asarray([sum(one.drawn) for one in found.completions])
    cut = np.asarray([one.finish_reason == "length" for one in found.completions])
    ended = lengths[~cut]
    told = {
        "reward": float(given.mean()) if given.size else None,
        "reward_std": float(given.std(ddof=1)) if given.size > 1 else 0.0,
        "frac_reward_zero_std": float(flat.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(cut.mean()),
        "completions/mean_terminated_length": float(ended.mean()) if ended.size else 0.0,
        "completions/min_terminated_length": int(ended.min()) if ended.size else 0,
        "completions/max_terminated_length": int(ended.max()) if ended.size else 0,
        "completions/repetition": float(np.mean([_repeated(x.tokens) for x in found.completions])),
        "num_tokens": _tokens(found),
        "rollout_tokens_per_s": round(counts.tokens / seconds["rollout"], 1),
        "rollout_seconds": round(seconds["rollout"], 3),
        "reward_seconds": round(seconds["rewards"], 3),
        "unscored": found.scores.unscored,
    }
    logged = {name: float(np.mean(x)) for name, x in found.scores.logged.items() if x}
    return told | found.scores.metrics | logged


def _tokens(found: "Generation") -> int:
    """Tokens of prompts and completions, a prompt once for each of its completions, as in TRL."""
    group = len(found.completions) // len(found.prompts)
    prompts = group * sum(len(one.ids) for one in found.prompts)
    return prompts + sum(len(one.tokens) for one in found.completions)


def _repeated(tokens: Sequence[int]) -> float:
    """The share of a completion's runs of GRAM tokens that stood in it before."""
    runs = list(zip(*(tokens[n:] for n in range(GRAM)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def weights(steps: Sequence[Sequence[np.ndarray]], how: str) -> dict[str, float]:
    """TRL's names for the importance weights of what is learnt from, one a token or a completion.

    A step has three arrays [M, B, C]: importance weights, tokens' weights in the loss, and numbers
    of their completions in a micro-batch.
    """
    found = []
    for each, learnt, of in (micro for step in steps for micro in zip(*step, strict=True)):
        on = learnt > 0
        # Every token has its completion's.
        first = np.unique(of[on], return_index=True)[1]
        found.append(each[on][first] if how.startswith("sequence") else each[on])
    flat = np.concatenate(found)
    if not flat.size:
        return {}
    ends = {"min": flat.min(), "mean": flat.mean(), "max": flat.max()}
    return {f"{RATIO}/{name}": float(value) for name, value in ends.items()}


def chosen(found: "Generation", number: int, args: GRPOConfig) -> list[int]:
    """Numbers of the completions that the log keeps of a generation.

    With `log_completions` all or the first; else, of every tenth generation, best and worst.
    """
    if args.log_completions:
        return list(range(len(found.completions)))[: args.num_completions_to_print]
    if number % KEPT_EVERY:
        return []
    order = np.argsort(-np.nan_to_num(found.worth.rewards, nan=-np.inf), kind="stable").tolist()
    return order if len(order) <= KEPT else order[: KEPT // 2] + order[-KEPT // 2 :]


def table(
    found: "Generation", texts: Sequence[str], numbers: Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Some completions with prompt, rewards by function, their weighted sum, and advantage."""
    group, rows = len(found.completions) // len(found.prompts), []
    number = lambda x: None if np.isnan(x) else float(x)
    for n in numbers:
        rows.append({
            "prompt": found.prompts[n // group].example["prompt"],
            "completion": texts[n],
            "rewards": dict(zip(names, map(number, found.scores.rewards[n]), strict=True)),
            "reward": number(found.worth.rewards[n]),
            "advantage": float(found.worth.values[n]),
            "finish_reason": found.completions[n].finish_reason,
        } | {name: values[n] for name, values in found.scores.extra.items()})  # fmt: skip
    return rows
