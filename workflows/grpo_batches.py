"""GRPO's batches: what the policy answers to the next prompts, scored, as optimizer steps."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import advantages, data, policy, shared_prompts
from unsloth_jax.dims import Batch, Params
from workflows import grpo_alarms, grpo_objective, grpo_report
from workflows.engines import Engine
from workflows.generate import Stopwatch
from workflows.grpo_config import GRPOConfig
from workflows.grpo_prompts import Prompt
from workflows.grpo_rows import Layout
from workflows.model import Model
from workflows.objective import embedded
from workflows.rewards import Rewards, Scores
from workflows.rollout import Completion


class Generation(NamedTuple):
    """Completions of some prompts, a prompt's `num_generations` together, and what they got."""

    prompts: list[Prompt]
    completions: list[Completion]
    masks: list[list[int]]  # 1 for each token that is learnt from
    scores: Scores
    worth: advantages.Advantages
    metrics: dict[str, float]

    @property
    def tokens_a_completion(self) -> float:
        return sum(map(sum, self.masks)) / len(self.masks)


@dataclass
class PolicyBatches:
    """[accumulation, batch, length] arrays of prompts with completions, made as they are asked for.

    `policy` gives the adapters as they are then; `reference` those of the frozen policy, None for
    the base itself. `layout` says how completions lie in rows.
    """

    prompts: Sequence[Prompt]
    model: Model
    args: GRPOConfig
    length: int
    rewards: Rewards
    tokenizer: Any
    state: Any
    reference: Params | None
    seed: int | None  # None leaves prompts in their order
    engine: Engine
    policy: Callable[[], Params] = lambda: {}
    told: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (step, metrics)
    tokens: dict[int, int] = field(default_factory=dict)  # of prompts and completions, by step
    alarms: grpo_alarms.Alarms = field(default_factory=grpo_alarms.Alarms)
    spent: float = 0.0  # seconds of rollouts and rewards since somebody set it to 0
    # The newest epoch's number, and its prompts in their order.
    _shuffled: tuple[int, Sequence[Prompt]] = field(default=(-1, ()), init=False, repr=False)

    @cached_property
    def layout(self) -> Layout:
        """How an optimizer step's completions lie in rows."""
        a, m = self.args, self.model
        longest = max(len(one.ids) for one in self.prompts), a.max_completion_length
        return Layout(
            a.prompts_a_step, a.num_generations, a.per_device_train_batch_size, longest,
            self.length, apart=not shared_prompts.alike(m.family, m.config, self.length),
        )  # fmt: skip

    @property
    def batch(self) -> int:
        return self.layout.rows

    @property
    def rows_a_step(self) -> int:
        """Completions that an optimizer step learns from."""
        return self.args.prompts_a_step * self.args.num_generations

    @property
    def accumulation(self) -> int:
        return self.layout.accumulation

    @property
    def rows_a_generation(self) -> int:
        """Completions that are drawn and scored at once."""
        return self.rows_a_step * self.args.steps_a_generation

    @property
    def widest(self) -> int:
        return self.layout.widest

    def documents(self, steps: int) -> int:
        """Of what attention sees: each completion with its prompt."""
        return 1

    def steps(self, epoch: int) -> int:
        """Optimizer steps in one epoch."""
        a = self.args
        return math.ceil(len(self.prompts) / a.prompts_a_step) * a.num_iterations

    def forever(self, skip: int = 0) -> Iterator[tuple[float, Batch]]:
        """(epochs done after the step, batch), the first `skip` steps left out.

        Raises ValueError where `skip` is amid what one generation is learnt from.
        """
        a, updates = self.args, self.args.updates
        if skip % updates:
            raise ValueError(f"step {skip} is amid the {updates} steps of one generation")
        for number in itertools.count(skip // updates):
            found = self._generation(number)
            laid = [self._step(found, part) for part in range(a.steps_a_generation)]
            told = laid if updates == 1 and not self._scores_first else self._with_old(laid, found)
            order = itertools.product(range(a.num_iterations), told)
            for n, (_, batch) in enumerate(order, start=number * updates + 1):
                first = (n - 1) % updates == 0
                self.told.append((n, found.metrics if first else {}))
                self.tokens[n] = found.metrics["num_tokens"] if first else 0
                yield n / self.steps(0), self._thresholded(batch)

    def _prompts(self, number: int) -> list[Prompt]:
        """Those of a generation: one epoch's after another's."""
        count = self.args.prompts_a_step * self.args.steps_a_generation
        start, size = number * count, len(self.prompts)
        found = []
        for at in range(start, start + count):
            epoch, place = divmod(at, size)
            found.append(self._order(epoch)[place])
        return found

    def _order(self, epoch: int) -> Sequence[Prompt]:
        if self.seed is None:
            return self.prompts
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, data.shuffled(self.prompts, self.seed, epoch)
        return self._shuffled[1]

    def _generation(self, number: int) -> Generation:
        a, prompts = self.args, self._prompts(number)
        self.state.global_step = number * a.updates  # which a step ahead is not told yet
        base = (a.seed * 1_000_003 + number) % 2**32
        # The step before may still be at work, which is none of the rollout's time.
        adapters, clock = jax.block_until_ready(self.policy()), Stopwatch()
        drawn = self.engine.draw(adapters, prompts, a.sampling(), base)
        completions = list(itertools.chain.from_iterable(drawn.completions))
        took = clock()
        scores = self.scores(prompts, completions, drawn.rewards)
        seconds = {"rollout": took - drawn.aside, "rewards": clock() - took}
        self.spent += clock()
        cut = np.asarray([one.finish_reason == "length" for one in completions])
        masked = a.mask_truncated_completions
        left_out = masked and not a.truncated_in_statistics
        worth = advantages.advantages(
            scores.rewards, self.rewards.weights, a.num_generations, ~cut if left_out else None,
            scale_rewards=a.scale_rewards,
            multi_objective_aggregation=a.multi_objective_aggregation,
        )  # fmt: skip
        masks = [
            [0] * len(one.tokens) if masked and ended else one.drawn
            for one, ended in zip(completions, cut, strict=True)
        ]
        found = Generation(prompts, completions, masks, scores, worth, {})
        metrics = grpo_report.metrics(found, drawn.counts, seconds) | drawn.metrics
        if a.alarms:
            self.alarms.heed(metrics, a)
        if kept := grpo_report.chosen(found, number, a):
            texts = self.texts(found)
            metrics[grpo_report.TABLE] = grpo_report.table(found, texts, kept, self.rewards.names)
        return found._replace(metrics=metrics)

    def scores(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        brought: Sequence[float] | None,
    ) -> Scores:
        """What the reward functions give for completions, as many of each prompt.

        `brought` are rewards that came with them.
        """
        texts = [self._text(one) for one in completions]
        if prompts[0].conversational:
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [one.tokens for one in completions]
        rows = [one.example for one in prompts]
        return self.rewards.score(rows, texts, ids, self.state, brought)

    def _text(self, completion: Completion) -> str:
        return self.tokenizer.decode(completion.tokens, skip_special_tokens=True)

    def texts(self, found: Generation) -> list[str]:
        """What the completions say."""
        return [self._text(one) for one in found.completions]

    def _step(self, found: Generation, part: int) -> Batch:
        """One optimizer step's completions, with what its loss reads beside them."""
        count, size = self.args.prompts_a_step, self.rows_a_step
        mine = slice(part * size, (part + 1) * size)
        of_tokens = {
            "drawn": [one.logprobs for one in found.completions[mine]],
            "sampled": [one.sampled_logprobs for one in found.completions[mine]],
        }
        of_completions = {"advantages": found.worth.values[mine], "real": np.ones(size)}
        if not self.args.kl_on_flat_groups:
            flat = np.repeat(found.worth.flat, self.args.num_generations)
            of_completions["pulled"] = ~flat[mine]
        batch = self.layout.laid(
            [one.ids for one in found.prompts[part * count :][:count]],
            [one.tokens for one in found.completions[mine]],
            found.masks[mine], of_tokens, of_completions,
        )  # fmt: skip
        mean = np.full(self.accumulation, found.tokens_a_completion, np.float32)
        return batch._replace(beside=batch.beside | {"tokens_a_completion": mean})

    @property
    def _scores_first(self) -> bool:
        """Whether the learner's log-probabilities are needed before the first update."""
        return bool(self.args.vllm_importance_sampling_correction or self.args.beta)

    @cached_property
    def _scored(self) -> Callable:
        m = self.model
        return grpo_objective.of_each(m.family, m.config, m.scale, self.args.temperature)

    def _logps(self, adapters: Params | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
        whole = embedded(self.model.params, batch)._replace(beside=None, key=None)
        return self._scored(adapters, self.model.params, whole)

    def _with_old(self, steps: Sequence[Batch], found: Generation) -> list[Batch]:
        """The steps with the policy's and the reference's log-probabilities before any update."""
        a, out = self.args, []
        for batch in steps:
            more: dict[str, Any] = {}
            if a.updates > 1 or a.vllm_importance_sampling_correction:
                more["old"] = np.asarray(self._logps(self.policy(), batch)[0])
            if a.vllm_importance_sampling_correction:
                more["correction"] = self._corrected(more["old"], batch)
            if a.beta:
                more["reference"] = np.asarray(self._logps(self.reference, batch)[0])
            out.append(batch._replace(beside=batch.beside | more))
        if a.vllm_importance_sampling_correction:
            behind, owned = grpo_objective.behind, grpo_objective.owned
            of = lambda b: (b.beside["correction"], behind(b.weights, b), np.asarray(owned(b)))
            told = grpo_report.weights(list(map(of, out)), a.vllm_importance_sampling_mode)
            found.metrics.update(told)
        return out

    def _corrected(self, old: np.ndarray, batch: Batch) -> np.ndarray:
        a = self.args
        count = self.batch * self.layout.together
        how = dict(
            mode=a.vllm_importance_sampling_mode,
            clip_min=a.vllm_importance_sampling_clip_min,
            clip_max=a.vllm_importance_sampling_clip_max,
        )
        weights = grpo_objective.behind(batch.weights, batch)
        each = zip(old, batch.beside["sampled"], weights, grpo_objective.owned(batch), strict=True)
        return np.stack([policy.corrections(*map(jnp.asarray, of), count, **how) for of in each])

    def _thresholded(self, batch: Batch) -> Batch:
        """The batch without what only this file reads, with the least entropy that counts."""
        beside = {name: x for name, x in batch.beside.items() if name != "sampled"}
        if self.args.top_entropy_quantile < 1:
            weights = grpo_objective.behind(batch.weights, batch)
            entropies = np.asarray(self._logps(self.policy(), batch)[1])[weights > 0]
            share = 1 - self.args.top_entropy_quantile
            least = np.quantile(entropies, share) if entropies.size else 0.0
            beside["entropy_least"] = np.full(self.accumulation, least, np.float32)
        return batch._replace(beside=beside)

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the arrays beside a batch's rows."""
        a = self.args
        there = {
            "drawn": True, "advantages": True, "real": True, "tokens_a_completion": True,
            "pulled": not a.kl_on_flat_groups,
            "old": a.updates > 1 or a.vllm_importance_sampling_correction,
            "correction": a.vllm_importance_sampling_correction, "reference": bool(a.beta),
            "entropy_least": a.top_entropy_quantile < 1,
        }  # fmt: skip
        return tuple(name for name, is_there in there.items() if is_there)
