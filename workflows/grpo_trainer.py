"""GRPOTrainer with the names of TRL and Unsloth; rollouts in the same process."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from workflows import (
    evaluate,
    grpo_alarms,
    grpo_evaluation,
    grpo_objective,
    reference,
    updates,
    vllm_engine,
)
from workflows.callbacks import Callbacks
from workflows.custom_rollout import ROLLOUT_FN, Custom
from workflows.engines import Engine, InProcess
from workflows.facts import digest
from workflows.grpo_batches import PolicyBatches
from workflows.grpo_config import GRPOConfig
from workflows.grpo_prompts import Prompt, prompts
from workflows.keywords import say, settle, typed
from workflows.model import Model
from workflows.rewards import Rewards
from workflows.run import short_hash
from workflows.trainer import Trainer, TrainOutput, named, trainable
from workflows.watch import Watch

IGNORED = {"dataset_num_proc": "rows are made in this process"}
LATER = {
    "reward_processing_classes": (None,),
    "optimizers": (None, (None, None)),
    "peft_config": (None,),
    "tools": (None,),
    "environment_factory": (None,),
    "quantization_config": (None,),
}
USED = (
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    "tokenizer", "callbacks", "rollout_fn",
)  # fmt: skip
KINDS = {
    "model": Model, "tokenizer": PreTrainedTokenizerBase | None,
    "processing_class": PreTrainedTokenizerBase | None, "train_dataset": Iterable | Path | None,
    "eval_dataset": Iterable | Path | None, "args": GRPOConfig | None,
    "rollout_fn": Callable | None,
}  # fmt: skip
NO_LOSS = ("loss", "perplexity")


class Seen:
    """A callback that counts tokens, so that checkpoints keep their number."""

    def __init__(self, batches: PolicyBatches):
        self.batches, self.tokens = batches, 0

    def by(self, step: int) -> int:
        """Tokens of prompts and completions up to a step that is no older than the last."""
        return self.tokens + sum(n for at, n in self.batches.tokens.items() if at <= step)

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.tokens = self.by(state.global_step)
        for step in [at for at in self.batches.tokens if at <= state.global_step]:
            del self.batches.tokens[step]

    def state(self) -> dict[str, Any]:
        """As transformers' ExportableState."""
        return {"attributes": {"tokens": self.tokens}}


class GRPOTrainer(Trainer):
    """Trains a model's adapters by GRPO; the reference is the model as it stands here.

    Args:
        model: a model with adapters.
        reward_funcs: a function or several, see `workflows.rewards`.
        args: a GRPOConfig.
        train_dataset: rows with a column prompt, text or messages; the others go to the reward
            functions.
        eval_dataset: rows of the same kind, or several such data sets by name: answered and scored
            alike at each evaluation.
        processing_class, tokenizer: by default the model's own.
        callbacks: objects with methods named as transformers' TrainerCallback has them.
        rollout_fn: draws the completions, see `workflows.custom_rollout`; where it gives rewards,
            reward functions may be left out.
    """

    _seen: Seen | None = None

    def __init__(
        self,
        model: Model,
        reward_funcs: Any = (),
        args: GRPOConfig | None = None,
        train_dataset: Iterable | str | Path | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
        rollout_fn: Callable | None = None,
        **other: Any,
    ):
        where = "GRPOTrainer"
        if other.pop("rollout_func", None) is not None:
            raise ValueError(
                f"{where}: rollout_func is TRL's, which gets the trainer; give rollout_fn(params, "
                "prompts, key), see docs/grpo.md"
            )
        settle(where, other, USED, IGNORED, LATER)
        given = dict(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        given |= dict(processing_class=processing_class, tokenizer=tokenizer, rollout_fn=rollout_fn)
        typed(where, given, KINDS)
        tokenizers = [x for x in (processing_class, tokenizer) if x is not None]
        if len(tokenizers) == 2 and tokenizers[0] is not tokenizers[1]:
            raise ValueError(f"{where}: give tokenizer or processing_class, got two that differ")
        args = GRPOConfig() if args is None else args
        self.rollout_fn = rollout_fn
        brought = None if rollout_fn is None else ROLLOUT_FN
        self.rewards = Rewards(reward_funcs, args.reward_weights, args.reward_timeout, brought)
        tokenizer = (*tokenizers, model.tokenizer)[0]
        super().__init__(model, args, tokenizer, train_dataset, eval_dataset, callbacks)
        self.rewards.check(self.rows[0].example)
        self._check_metric(more=True)
        self.start = model.adapters if reference.changes(model.adapters) else None
        self.engine = self._engine()
        batches = self._batches()
        self.objective = grpo_objective.grpo(
            args.policy_loss, args.temperature, batches.beside, batches.layout.sizes
        )

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """As `Trainer.train`; what async reward functions left behind ends with it."""
        try:
            return super().train(resume_from_checkpoint)
        finally:
            self.rewards.close()
            self.engine.close()

    def evaluate(
        self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rewards, lengths and what else is told of completions, of the adapters as they are.

        Raises ValueError where there is no eval_dataset, neither here nor of the trainer.
        """
        try:
            return super().evaluate(eval_dataset, metric_key_prefix=metric_key_prefix)
        finally:
            self.rewards.close()
            self.engine.close()

    def _evaluator(self, held_out: dict[str, list[Prompt]], prefix: str = "eval") -> Callable:
        sets = {named(name, prefix): some for name, some in held_out.items()}
        return grpo_evaluation.evaluator(self._batches(), sets)

    def _held_out(self, given: Any) -> dict[str, list[Prompt]]:
        def made(dataset: Any) -> list[Prompt]:
            found = self._rows(dataset)
            self.rewards.check(found[0].example)
            return found

        return evaluate.of_sets(given, made)

    def _check_metric(self, more: bool) -> None:
        """Raises ValueError for a metric_for_best_model that no evaluation will give."""
        name = self.args.metric_for_best_model
        if name is None or not self.eval_rows:
            return
        sets = [named(one) for one in self.eval_rows]
        full = name if name.startswith("eval_") else f"eval_{name}"
        known = [f"{one}_{n}" for one in sets for n in ("reward", *self.rewards.means)]
        last = full.rpartition("_")[2]
        given = any(full.startswith(f"{one}_") for one in sets)
        if full not in known and (not given or last in NO_LOSS or "_rewards/" in full):
            raise ValueError(
                f"metric_for_best_model={name!r} is none of {known}, nor another metric after "
                f"{[f'{one}_' for one in sets]}; an evaluation by reward has no loss"
            )

    def _trainable(self, model: Model, args: GRPOConfig) -> None:
        if model.peft and model.peft.dropout:
            say(f"lora_dropout={model.peft.dropout} is not drawn: ratios need the same network")
        trainable(model)
        updates.rates(args, model.adapters)

    def _rows(self, dataset: Any) -> list[Prompt]:
        a = self.args
        longest = self.length - a.max_completion_length
        if longest < 1:
            raise ValueError(
                f"GRPOConfig: max_completion_length={a.max_completion_length} leaves no room for a "
                f"prompt in max_seq_length={self.length}"
            )
        longest = min(longest, a.max_prompt_length or longest)
        how = dict(drop=a.drop_long_prompts, vocab=self.model.config.vocab)
        return prompts(dataset, self.tokenizer, longest, template=a.chat_template_kwargs, **how)

    def _batches(self) -> PolicyBatches:
        a = self.args
        return PolicyBatches(
            self.rows, self.model, a, self.length, self.rewards, self.tokenizer, self.state,
            self.start, a.seed if a.shuffle_dataset else None, self.engine,
        )  # fmt: skip

    def _engine(self) -> Engine:
        """What draws completions."""
        if self.rollout_fn is not None and self.args.use_vllm:
            raise ValueError(
                "GRPOTrainer: rollout_fn draws the completions itself, so that use_vllm=True would "
                "have no effect: give one of them"
            )
        if self.rollout_fn is not None and self.args.eval_temperature is not None:
            raise ValueError(
                "GRPOTrainer: rollout_fn draws an evaluation's completions as it does those of "
                f"training; expected eval_temperature=None, got {self.args.eval_temperature}"
            )
        if self.args.use_vllm:
            return vllm_engine.made(self.model, self.args, self.length, self.rows[0].ids)
        if self.rollout_fn is not None:
            return Custom(self.rollout_fn, self.model, self.length)
        return InProcess(self.model, self.args.rollout_slots, self.args.memory_budget)

    def _known(self, batches: PolicyBatches) -> tuple[PolicyBatches, dict[str, Any]]:
        self._made_batches = batches
        return super()._known(batches)

    def _watch(self, total: int, log: Callable) -> Watch:
        batches = self._made_batches
        self._seen = Seen(batches)

        def told(row: dict[str, Any]) -> None:
            if "loss" not in row:
                log(row)
                return
            row = self._with_rollouts(row, batches)
            log(row)
            grpo_alarms.limits(row, self.args)
            if self.args.alarms:
                batches.alarms.loss(row)
                batches.alarms.gap(row)

        watch = super()._watch(total, told)
        batches.policy = lambda: watch.run.state.trainable
        return watch

    def _with_rollouts(self, row: dict[str, Any], batches: PolicyBatches) -> dict[str, Any]:
        """A step's row with what was told of the generations up to it, and the learner's part."""
        ready = [metrics for step, metrics in batches.told if step <= row["step"]]
        batches.told[:] = [(step, x) for step, x in batches.told if step > row["step"]]
        learner, batches.spent = max(row["seconds"] - batches.spent, 1e-9), 0.0
        steps = len(ready)
        own = {
            "num_tokens": self._seen.by(row["step"]),
            "step_time": round(row["seconds"] / steps, 3),
            "learner_seconds": round(learner / steps, 3),
            "learner_tokens_per_s": round(row["tokens_per_s"] * row["seconds"] / learner, 1),
        }
        return row | _means([metrics for metrics in ready if metrics]) | own

    def _calls(self) -> Callbacks:
        found = super()._calls()
        return found if self._seen is None else replace(found, members=[*found.members, self._seen])

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        """The rows that prompts come from."""
        return [row.example for row in self.rows]

    def _digest(self, rows: Sequence[Prompt]) -> str:
        return digest([row.ids for row in rows])

    def _facts(self, data: dict[str, Any]) -> dict[str, Any]:
        a = self.args
        own = {
            "reference": reference.BASE if self.start is None else short_hash(self.start),
            "rewards": dict(zip(self.rewards.names, self.rewards.weights.tolist(), strict=True)),
            "rollouts": {
                "sampling": [*a.sampling().sampling, a.max_completion_length],
                "prompts": [a.prompts_a_step, a.num_generations, a.updates, a.num_iterations],
                "how": [a.scale_rewards, a.multi_objective_aggregation, a.kl_on_flat_groups],
                "masks": [
                    a.mask_truncated_completions,
                    a.truncated_in_statistics,
                    a.top_entropy_quantile,
                ],
                "shuffled": a.shuffle_dataset,
            },
        }
        if not isinstance(self.engine, InProcess):
            own["rollouts"]["drawn by"] = type(self.engine).__name__
        return super()._facts(data | own)


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers over generations; of anything else the last."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        numbers = all(isinstance(x, int | float) for x in values)
        found[name] = sum(values) / len(values) if numbers and values else (values or [None])[-1]
    return found
