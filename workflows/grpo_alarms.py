"""What a GRPO run says of itself: alarms that stop it with advice, hints that do not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workflows.grpo_config import GRPOConfig
from workflows.grpo_objective import GAP
from workflows.keywords import say

WATCHED = 5  # generations that an alarm looks at
MOST_CUT = 0.5  # the share of completions that the length may end
NEAR, FAR = 0.02, 0.1  # nats a token between sampler and learner: said, and stopped at
REPEATED = 0.5  # the share of a completion that is repetition
LONGER = 2.0  # times the length of the first generations
SMALL = 1e-3  # a loss that looks like none

Row = Mapping[str, Any]


@dataclass
class Alarms:
    """Stops a run that can't learn, after its first generations. Raises RuntimeError."""

    seen: list[Row] = field(default_factory=list)

    def heed(self, told: Row, args: GRPOConfig) -> None:
        """Looks at one generation's metrics."""
        self.seen.append(told)
        if len(self.seen) < WATCHED:
            return
        cut, flat = self._last("completions/clipped_ratio"), self._last("frac_reward_zero_std")
        if len(self.seen) == WATCHED and np.mean(cut) > MOST_CUT:
            raise RuntimeError(
                f"{np.mean(cut):.0%} of the completions of the first {WATCHED} generations "
                f"were cut off at max_completion_length={args.max_completion_length}, and what is "
                "cut off seldom earns a reward. Raise max_completion_length, warm the model up "
                "with SFT on answers that end, or go on with alarms=False"
            )
        if min(flat) == 1.0:
            raise RuntimeError(
                f"in the last {WATCHED} generations every group's rewards were equal, so nothing "
                "is learnt from them. Take easier or harder prompts, rewards with steps between "
                "all and nothing, a higher temperature or num_generations, or alarms=False"
            )
        self._hint()

    def _last(self, name: str) -> list[float]:
        return [told[name] for told in self.seen[-WATCHED:] if told.get(name) is not None]

    def _hint(self) -> None:
        """Says once what rewards that are earned without the task look like."""
        read = "Read some completions (report.html, log_completions=True) before going on"
        repeated = self._last("completions/repetition")
        if repeated and np.mean(repeated) > REPEATED:
            say(
                f"over half of what the last {WATCHED} generations say repeats itself "
                f"(completions/repetition): some reward may pay for length alone. {read}"
            )
        lengths = [told.get("completions/mean_length", 0.0) for told in self.seen]
        first, now = np.mean(lengths[:WATCHED]), np.mean(lengths[-WATCHED:])
        if len(lengths) >= 2 * WATCHED and now > LONGER * first > 0:
            say(
                f"completions have become {now / first:.1f} times as long as at first "
                f"({first:.0f}, now {now:.0f} tokens): see whether what is added earns it. {read}"
            )
        spreads = [n for n in self.seen[-1] if n.startswith("rewards/") and n.endswith("/std")]
        for name in spreads if len(spreads) > 1 else []:
            if self._last(name) == [0.0] * WATCHED:
                one = name.removeprefix("rewards/").removesuffix("/std")
                say(
                    f"reward function {one!r} gave every completion of the last {WATCHED} "
                    f"generations the same, so only the others teach. {read}"
                )

    @staticmethod
    def gap(row: Row) -> None:
        """Looks at how far sampler and learner are apart in a step's row."""
        gap = row.get(f"{GAP}/mean")
        if gap is None or gap <= NEAR:
            return
        apart = f"sampler and learner differ by {gap:.3f} nats a token on average"
        if gap > FAR:
            raise RuntimeError(
                f"step {row.get('step')}: {apart} (limit {FAR}), so ratios mean little: the "
                "completions were not drawn from the policy that learns. alarms=False goes on"
            )
        say(f"{apart} (usual: under 0.002; the run stops at {FAR}): see {GAP}/mean in the log")

    @staticmethod
    def loss(row: Row) -> None:
        """Says of a first step why its loss is near 0, and whether that is bad."""
        if row.get("grad_norm") == 0 and row.get("frac_reward_zero_std") == 1:
            say(
                "the first step taught nothing: every group's rewards were equal, so loss and "
                "gradient are 0 (frac_reward_zero_std 1)"
            )
        elif abs(row["loss"]) < SMALL:
            say(
                "the loss is near 0, as it must be where ratios are 1 and a group's advantages sum "
                f"to 0: reward says whether it learns, the gradient norm ({row['grad_norm']:.2g}) "
                "that it does"
            )


def limits(row: Row, args: GRPOConfig) -> None:
    """Raises RuntimeError where a step's row is past what `stop_at_kl` or `stop_at_length` say."""
    for setting, name, unit in (
        ("stop_at_kl", "kl", "nats a token from the reference"),
        ("stop_at_length", "completions/mean_length", "tokens a completion"),
    ):
        most, now = getattr(args, setting), row.get(name)
        if most is not None and now is not None and now > most:
            raise RuntimeError(
                f"step {row['step']}: {now:.4g} {unit} ({name}), over {setting}={most}. The model "
                "has the adapters of this step; a lower learning_rate or a higher beta keeps them "
                "nearer to where they began"
            )
