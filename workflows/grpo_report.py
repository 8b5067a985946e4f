"""What is told of a generation: numbers for the log, completions to read, alarms that stop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from workflows.grpo_config import GRPOConfig
from workflows.rollout import Counts

if TYPE_CHECKING:
    from workflows.grpo_batches import Generation

WATCHED = 5  # generations that an alarm looks at
MOST_CUT = 0.5  # the share of completions that the length may end
FAR = 0.1  # nats a token between sampler and learner


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
        "rollout_tokens_per_s": round(counts.tokens / seconds["rollout"], 1),
        "rollout_seconds": round(seconds["rollout"], 3),
        "reward_seconds": round(seconds["rewards"], 3),
        "unscored": found.scores.unscored,
    }
    logged = {name: float(np.mean(x)) for name, x in found.scores.logged.items() if x}
    return told | found.scores.metrics | logged


def table(found: "Generation", texts: Sequence[str], args: GRPOConfig) -> list[dict[str, Any]]:
    """Some completions with prompt, rewards and advantage."""
    group, rows = args.num_generations, []
    for n, text in enumerate(texts[: args.num_completions_to_print]):
        given = [None if np.isnan(x) else float(x) for x in found.scores.rewards[n]]
        rows.append({
            "prompt": found.prompts[n // group].example["prompt"],
            "completion": text,
            "rewards": given,
            "advantage": float(found.worth.values[n]),
            "finish_reason": found.completions[n].finish_reason,
        } | {name: values[n] for name, values in found.scores.extra.items()})  # fmt: skip
    return rows


@dataclass
class Alarms:
    """Stops a run that can't learn, after its first generations. Raises RuntimeError."""

    cut: list[float] = field(default_factory=list)
    flat: list[float] = field(default_factory=list)

    def heed(self, told: dict[str, Any], args: GRPOConfig) -> None:
        """Looks at one generation's metrics."""
        self.cut.append(told["completions/clipped_ratio"])
        self.flat.append(told["frac_reward_zero_std"])
        if len(self.cut) == WATCHED and np.mean(self.cut) > MOST_CUT:
            raise RuntimeError(
                f"{np.mean(self.cut):.0%} of the completions of the first {WATCHED} generations "
                f"were cut off at max_completion_length={args.max_completion_length}, and what is "
                "cut off seldom earns a reward. Raise max_completion_length, warm the model up "
                "with SFT on answers that end, or go on with alarms=False"
            )
        if len(self.flat) >= WATCHED and min(self.flat[-WATCHED:]) == 1.0:
            raise RuntimeError(
                f"in the last {WATCHED} generations every group's rewards were equal, so nothing "
                "is learnt from them. Take easier or harder prompts, rewards with steps between "
                "all and nothing, a higher temperature or num_generations, or alarms=False"
            )

    @staticmethod
    def gap(row: dict[str, Any]) -> None:
        """Looks at a step's row."""
        gap = row.get("sampling/sampling_logp_difference/mean")
        if gap is not None and gap > FAR:
            raise RuntimeError(
                f"step {row.get('step')}: sampler and learner differ by {gap:.3f} nats a token on "
                f"average (limit {FAR}), so ratios mean little: the completions were not drawn "
                "from the policy that learns. alarms=False goes on"
            )
