"""SFTConfig and SFTTrainer with the names of TRL and Unsloth."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import numpy as np

from bridge.checkpoint import Checkpoints
from unsloth_jax import optim
from unsloth_jax.train import start
from workflows import diagnose, plan, progress, responses, rows, sft
from workflows.generate import Stopwatch
from workflows.keywords import ranged, say, settle, typed
from workflows.model import Model

CONFIG_IGNORED = {
    "fp16": "the model's dtype decides",
    "bf16": "the model's dtype decides",
    "gradient_checkpointing": "get_peft_model decides",
    "dataset_num_proc": "rows are made in this process",
    "dataloader_num_workers": "rows are made in this process",
    "dataloader_pin_memory": "one copy a step goes to the device",
    "remove_unused_columns": "columns beside the schema's are not read",
    "torch_empty_cache_steps": "there is no torch cache",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "padding_free": "padding costs no loss and no gradient",
    "overwrite_output_dir": "checkpoints are numbered",
    "logging_first_step": "logging_steps decides",
    "logging_strategy": "logging_steps decides",
    "disable_tqdm": "the progress bar shows only in a terminal",
    "data_seed": "seed decides",
    "run_name": "nothing is reported elsewhere",
    "include_num_input_tokens_seen": "tokens are always counted",
    "average_tokens_across_devices": "the loss is divided by all tokens",
    "eval_accumulation_steps": "nothing is evaluated",
    "gradient_checkpointing_kwargs": "get_peft_model decides",
    "unsloth_num_chunks": "the loss chooses its own chunks",
    "unsloth_logit_chunk_multiplier": "the loss chooses its own chunks",
}
CONFIG_LATER = {
    "report_to": ("none", None, [], ["none"]),
    "eval_strategy": ("no", None),
    "eval_steps": (None,),
    "per_device_eval_batch_size": (4, 8, None),
    "eval_packing": (None, False),
    "load_best_model_at_end": (False, None),
    "neftune_noise_alpha": (None, 0),
    "label_smoothing_factor": (0, None),
    "group_by_length": (False, None),
    "embedding_learning_rate": (None,),
    "loss_type": ("nll",),
    "push_to_hub": (False, None),
    "activation_offloading": (False, None),
    "auto_find_batch_size": (False, None),
    "chat_template_path": (None,),
    "dataset_kwargs": (None, {}),
    "eos_token": (None,),
    "pad_token": (None,),
    "packing_strategy": ("bfd", None),
    "pad_to_multiple_of": (None,),
    "lr_scheduler_kwargs": (None, {}),
    "model_init_kwargs": (None, {}),
    "q_galore_config": (None,),
    "vllm_sampling_params": (None,),
    "unsloth_grpo_mini_batch": (None,),
}
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
# Settings with which the next batch or the next update would be another one.
DECISIVE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "optim", "packing", "seed",
)  # fmt: skip
STRATEGIES = ("no", "steps", "epoch")
MATMULS = (None, "bf16", "fp8_backward")
OLD_STYLE = ("dataset_text_field", "packing", "max_seq_length")
RANGES = {
    "per_device_train_batch_size": (1, None), "gradient_accumulation_steps": (1, None),
    "logging_steps": (1, None), "save_steps": (1, None), "save_total_limit": (1, None),
    "max_seq_length": (1, None), "max_length": (1, None), "learning_rate": (0, None),
    "warmup_steps": (0, None), "warmup_ratio": (0, 1), "weight_decay": (0, None),
    "max_grad_norm": (0, None), "adam_beta1": (0, 1, "below"), "adam_beta2": (0, 1, "below"),
    "adam_epsilon": (0, None), "seed": (0, None),
}  # fmt: skip


@dataclass(init=False)
class SFTConfig:
    """How to train; defaults are Unsloth's. Unknown names raise TypeError with the nearest.

    Args:
        max_steps: optimizer steps; at 0 or less, `num_train_epochs` decides.
        max_seq_length, max_length: tokens a row may have; None takes the model's.
        warmup_steps, warmup_ratio: steps, or the share of all steps, of linear warm-up.
        packing: several examples share a row, each in a segment of its own.
        completion_only_loss, assistant_only_loss: which tokens count, as in TRL.
        truncation: cut rows that are too long instead of raising.
        memory_budget: see get_peft_model, whose value it replaces.
        matmul_dtype: of products with 4-bit weights: "bf16" (also None); "fp8_backward" finds
            inputs' gradients in e4m3 (Ada, Hopper), forward stays as it is.
        save_strategy, save_steps, save_total_limit: when checkpoints are written to output_dir.
    """

    output_dir: str | None = None
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    num_train_epochs: float | None = 3
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    warmup_ratio: float = 0.1
    weight_decay: float = 0.001
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    optim: str = "adamw_8bit"
    seed: int = 3407
    logging_steps: int = 1
    logging_dir: str | None = None
    save_strategy: str = "no"
    save_steps: int = 500
    save_total_limit: int | None = None
    max_seq_length: int | None = None
    max_length: int | None = None
    packing: bool = False
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    truncation: bool = False
    memory_budget: int | float | str | None = None
    matmul_dtype: str | None = None

    def __init__(self, **given: Any):
        known = {f.name: f.default for f in fields(type(self))}
        other = {k: v for k, v in given.items() if k not in known}
        settle("SFTConfig", other, known, CONFIG_IGNORED, CONFIG_LATER)
        for name, default in known.items():
            setattr(self, name, given.get(name, default))
        if "warmup_steps" in given and "warmup_ratio" not in given:
            self.warmup_ratio = 0.0
        self._check()

    def _check(self) -> None:
        typed("SFTConfig", vars(self), get_type_hints(SFTConfig))
        ranged("SFTConfig", vars(self), RANGES)
        plan.check_budget(self.memory_budget)
        if self.max_steps <= 0 and not (self.num_train_epochs or 0) > 0:
            raise ValueError(
                "SFTConfig: give max_steps or num_train_epochs over 0, got "
                f"{self.max_steps}, {self.num_train_epochs}"
            )
        known = {"save_strategy": STRATEGIES, "optim": optim.OPTIMIZERS, "matmul_dtype": MATMULS}
        for name, values in known.items():
            if (got := getattr(self, name)) not in values:
                raise ValueError(f"SFTConfig: {name} {got!r} is not supported; {list(values)} are")
        optim.schedule(self.lr_scheduler_type, self.learning_rate, 0, 1)
        if not 1e-7 <= self.learning_rate <= 1:
            say(f"learning_rate={self.learning_rate} is unusual; LoRA learns between 1e-5 and 1e-2")

    def warmup(self, total: int) -> int:
        """Warm-up steps of a run of `total`; a `warmup_steps` under 1 is a share."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total * (self.warmup_steps or self.warmup_ratio))


class TrainOutput(NamedTuple):
    """What `train` returns, in transformers' words."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


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
        if args is not None and not isinstance(args, SFTConfig):
            raise TypeError(f"SFTTrainer: args must be an SFTConfig, got {type(args).__name__}")
        self.model, self.args = model, copy.copy(args) if args is not None else SFTConfig()
        for name, value in old.items():
            setattr(self.args, name, value)
        self.tokenizer = processing_class or tokenizer or model.tokenizer
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

        `resume_from_checkpoint` True continues the newest checkpoint of output_dir, a path that of
        another folder. Raises ValueError where it does not fit, FloatingPointError for a loss that
        is not finite.
        """
        a, m = self.args, self.model
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
            if resume_from_checkpoint:
                given = resume_from_checkpoint
                folder = self._folder() if given is True else Path(given)
                state = sft.resumed(folder, state, facts)
            before = sft.short_hash(state.trainable)
            saving = self._saving(batches, facts, int(state.step))
            self.log_history.clear()
            with progress.bar(total, self._metrics_file(), int(state.step)) as show:
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

    def _saving(self, batches: sft.Batches, facts: dict[str, Any], done: int) -> sft.Saving | None:
        """Raises FileExistsError where output_dir holds later checkpoints than this run's start."""
        if self.args.save_strategy == "no":
            return None
        every = self.args.save_steps if self.args.save_strategy == "steps" else batches.steps(0)
        checkpoints = Checkpoints(self._folder(), self.args.save_total_limit)
        if (latest := checkpoints.latest() or 0) > done:
            checkpoints.close()
            raise FileExistsError(
                f"{self._folder()} holds checkpoint {latest} of an earlier run: continue it with "
                "resume_from_checkpoint=True, or choose another output_dir"
            )
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
