"""SFTTrainer with the names of TRL and Unsloth."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from bridge.checkpoint import Checkpoints
from unsloth_jax import optim
from unsloth_jax.train import start
from workflows import diagnose, plan, progress, responses, rows, sft
from workflows.generate import Stopwatch
from workflows.keywords import ranged, say, settle, typed, written
from workflows.model import Model
from workflows.sft_config import KINDS, NAMES, RANGES, SFTConfig

TRAINER_IGNORED = {
    "data_collator": "rows are collated here",
    "dataset_num_proc": "rows are made in this process",
}
TRAINER_LATER = {
    "eval_dataset": (None,),
    "compute_metrics": (None,),
    "preprocess_logits_for_metrics": (None,),
    "callbacks": (None, []),
    "optimizers": (None, (None, None)),
    "peft_config": (None,),
    "model_init": (None,),
    "compute_loss_func": (None,),
    "optimizer_cls_and_kwargs": (None,),
}
TRAINER_USED = (
    "model", "tokenizer", "processing_class", "train_dataset", "args", "formatting_func",
    "dataset_text_field", "packing", "max_seq_length",
)  # fmt: skip
TRAINER_KINDS = {
    "model": Model, "args": SFTConfig | None, "tokenizer": PreTrainedTokenizerBase | None,
    "processing_class": PreTrainedTokenizerBase | None, "train_dataset": Iterable | None,
    "formatting_func": Callable | None,
}  # fmt: skip
# Settings with which the next batch or the next update would be another one.
DECISIVE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "optim", "packing", "seed",
)  # fmt: skip
RESUME = bool | str | None
OLD_STYLE = ("dataset_text_field", "packing", "max_seq_length")


class TrainOutput(NamedTuple):
    """What `train` returns, in transformers' words."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


def settled(args: SFTConfig, old: Mapping[str, Any]) -> SFTConfig:
    """A copy of the config in which SFTTrainer's own keywords stand; None leaves the config's.

    Raises TypeError and ValueError as SFTConfig does, and says which setting was replaced.
    """
    given = {name: value for name, value in old.items() if value is not None}
    typed("SFTTrainer", given, {name: KINDS[name] for name in given})
    written("SFTTrainer", given, [name for name in NAMES if name in given])
    ranged("SFTTrainer", given, {name: RANGES[name] for name in given if name in RANGES})
    own, plain = copy.copy(args), SFTConfig()
    for name, value in given.items():
        if getattr(own, name) not in (getattr(plain, name), value):
            say(f"SFTTrainer({name}={value!r}) replaces SFTConfig's {getattr(own, name)!r}")
        setattr(own, name, value)
    return own


class SFTTrainer:
    """Trains a model's adapters on a data set; `train` changes `model.adapters`.

    Args:
        model: a model with adapters.
        tokenizer, processing_class: by default the model's own.
        train_dataset: rows with text, messages, prompt and completion, or input_ids.
        args: an SFTConfig.
        formatting_func: makes text of examples, as in Unsloth's notebooks.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: Any = None,
        train_dataset: Iterable | None = None,
        args: SFTConfig | None = None,
        processing_class: Any = None,
        formatting_func: Callable | None = None,
        **other: Any,
    ):
        old = {k: other.pop(k) for k in OLD_STYLE if k in other}
        settle("SFTTrainer", other, TRAINER_USED, TRAINER_IGNORED, TRAINER_LATER)
        given = dict(model=model, args=args, formatting_func=formatting_func)
        given |= dict(tokenizer=tokenizer, processing_class=processing_class)
        typed("SFTTrainer", given | {"train_dataset": train_dataset}, TRAINER_KINDS)
        if None not in (tokenizer, processing_class) and tokenizer is not processing_class:
            raise ValueError("SFTTrainer: give tokenizer or processing_class, got two that differ")
        if model.adapters is None:
            raise ValueError("the model has no adapters; call FastLanguageModel.get_peft_model")
        if not jax.tree.leaves(model.adapters):
            raise ValueError(
                f"the model's adapters are empty: target_modules={model.peft.targets} in layers "
                f"{model.peft.layers} name no weight to train"
            )
        if model.peft.dropout:
            raise ValueError(
                f"lora_dropout={model.peft.dropout} of the adapter is not supported yet: only 0"
            )
        if train_dataset is None:
            raise ValueError("SFTTrainer needs a train_dataset")
        self.model, self.args = model, settled(SFTConfig() if args is None else args, old)
        self.tokenizer = next(
            x for x in (processing_class, tokenizer, model.tokenizer) if x is not None
        )
        self.rows = rows.rows(
            train_dataset,
            self.tokenizer,
            max_length=self.length,
            dataset_text_field=self.args.dataset_text_field,
            formatting_func=formatting_func,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
            truncate=self.args.truncation,
        )
        self.log_history: list[dict[str, Any]] = []

    @property
    def length(self) -> int:
        """Tokens a row may have."""
        asked = self.args.max_seq_length or self.args.max_length or self.model.max_seq_length
        if asked > self.model.max_seq_length:
            say(f"rows have at most the model's max_seq_length={self.model.max_seq_length} tokens")
        return min(asked, self.model.max_seq_length)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Runs the steps that are left; on any exit `model.adapters` is the last finite state.

        The model takes the trainer's tokenizer, so that exports hold the template trained with.

        `resume_from_checkpoint` True continues the newest checkpoint of output_dir, a path that of
        another folder. Raises ValueError where it does not fit, FileExistsError where a new run's
        output_dir holds checkpoints, FloatingPointError for a loss that is not finite.
        """
        source = self._source(resume_from_checkpoint)
        a, m = self.args, self.model
        # What is saved and what answers takes the template that was trained with.
        m.tokenizer = self.tokenizer
        batches, total = self._batches(), self.total_steps()
        rate = optim.schedule(a.lr_scheduler_type, a.learning_rate, a.warmup(total), total)
        clock = Stopwatch()
        optimizer = optim.make(
            a.optim, rate, weight_decay=a.weight_decay, max_grad_norm=a.max_grad_norm or 0.0,
            b1=a.adam_beta1, b2=a.adam_beta2, eps=a.adam_epsilon,
        )  # fmt: skip
        facts = self._facts(total)
        prepared = plan.prepared(m, optimizer, batches, total, a.memory_budget)
        with m.multiplied_in(a.matmul_dtype), prepared as step:
            state = start(m.adapters, optimizer)
            if source is not None:
                state = sft.resumed(source, state, facts)
            before = sft.short_hash(state.trainable)
            self._refuse_to_mix(int(state.step))
            saving = self._saving(batches, facts)
            self.log_history.clear()
            own = source is not None and self._folder().absolute() in (source, source.parent)
            kept = int(state.step) if own else 0
            with progress.bar(total, self._metrics_file(), kept) as show:
                log = lambda row: (self.log_history.append(row), show(row))
                find = diagnose.first_bad_layer(m.family, m.config, m.scale)
                run = sft.Run(
                    step, state, m.params, batches, rate, total, log, a.logging_steps, saving, find
                )  # fmt: skip
                try:
                    run()
                finally:
                    m.adapters = run.state.trainable
                    if run.saving:
                        run.saving.checkpoints.close()
        progress.adapters(before, sft.short_hash(m.adapters))
        return _output(int(run.state.step), run.losses, clock())

    def _source(self, resume: Any) -> Path | None:
        """The absolute path of what is continued; None starts anew. Raises where it is no path."""
        typed("train", {"resume_from_checkpoint": resume}, {"resume_from_checkpoint": RESUME})
        if self._folder().is_file():
            raise ValueError(f"output_dir={str(self._folder())!r} is a file, expected a folder")
        if resume is None or resume is False:
            return None
        if resume is not True:
            written("train", {"resume_from_checkpoint": resume}, ["resume_from_checkpoint"])
        return (self._folder() if resume is True else Path(resume)).absolute()

    def _batches(self) -> sft.Batches:
        a = self.args
        sizes = a.per_device_train_batch_size, a.gradient_accumulation_steps
        return sft.Batches(self.rows, *sizes, self.length, a.packing, a.seed)

    def total_steps(self) -> int:
        """Optimizer steps of a whole run."""
        a = self.args
        if a.max_steps > 0:
            return a.max_steps
        return math.ceil(self._batches().steps(0) * a.num_train_epochs)

    def _folder(self) -> Path:
        return Path(self.args.output_dir or "unsloth_training_checkpoints")

    def _metrics_file(self) -> Path | None:
        return None if self.args.output_dir is None else self._folder() / "metrics.jsonl"

    def _refuse_to_mix(self, done: int) -> None:
        """Raises FileExistsError where output_dir holds later checkpoints than this run's start.

        The log beside them is theirs, so that a run which writes only a log is refused too.
        """
        writes = self.args.output_dir is not None or self.args.save_strategy != "no"
        if not writes or not self._folder().is_dir():
            return
        checkpoints = Checkpoints(self._folder())
        latest = checkpoints.latest() or 0
        checkpoints.close()
        if latest > done:
            raise FileExistsError(
                f"{self._folder()} holds checkpoint {latest} of an earlier run: continue it with "
                "resume_from_checkpoint=True, or choose another output_dir"
            )

    def _saving(self, batches: sft.Batches, facts: dict[str, Any]) -> sft.Saving | None:
        if self.args.save_strategy == "no":
            return None
        every = self.args.save_steps if self.args.save_strategy == "steps" else batches.steps(0)
        checkpoints = Checkpoints(self._folder(), self.args.save_total_limit)
        return sft.Saving(checkpoints, every, facts)

    def _facts(self, total: int) -> dict[str, Any]:
        """Everything that decides which batch and which update comes next."""
        args = {name: getattr(self.args, name) for name in DECISIVE}
        data = json.dumps([[row.tokens, row.mask] for row in self.rows])
        facts = args | {
            "loss": sft.LOSS,
            "steps in all": total,
            "warm-up steps": self.args.warmup(total),
            "length": self.length,
            "data": f"{len(self.rows)} rows, sha256 {hashlib.sha256(data.encode()).hexdigest()}",
            "base model": [Path(self.model.name).name, str(self.model.dtype), self.model.quantized],
            "adapter scale": self.model.scale,
            "fp8": self.args.matmul_dtype if self.args.matmul_dtype != "bf16" else None,
        }
        return json.loads(json.dumps(facts))


def _output(done: int, losses: list[float], seconds: float) -> TrainOutput:
    loss = float(np.mean(losses)) if losses else float("nan")
    speed = len(losses) / seconds
    metrics = {"train_runtime": seconds, "train_steps_per_second": speed, "train_loss": loss}
    return TrainOutput(done, loss, metrics)


RESPONSES_KINDS = {
    "trainer": SFTTrainer, "instruction_part": str | None, "response_part": str | None,
    "force_match": bool, "tokenizer": PreTrainedTokenizerBase | None, "last_response_only": bool,
}  # fmt: skip


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> SFTTrainer:
    """The trainer, its rows supervised on the assistant's answers only.

    Args:
        instruction_part, response_part: texts that open a user's and the assistant's turn; without
            them the chat template's own are found.
        last_response_only: only each row's last answer counts.

    Raises ValueError for one part without the other, or a row that keeps no supervised token.
    """
    given = dict(
        trainer=trainer, instruction_part=instruction_part, response_part=response_part,
        force_match=force_match, tokenizer=tokenizer, last_response_only=last_response_only,
    )  # fmt: skip
    typed("train_on_responses_only", given, RESPONSES_KINDS)
    if return_function:
        raise ValueError("train_on_responses_only: return_function=True is not supported yet")
    trainer.rows = responses.responses_only(
        trainer.rows,
        tokenizer or trainer.tokenizer,
        instruction_part,
        response_part,
        force_match=force_match,
        last_response_only=last_response_only,
    )
    return trainer
