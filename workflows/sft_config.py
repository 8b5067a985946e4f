"""SFTConfig: how to train, in the names of TRL and Unsloth."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

from unsloth_jax import optim
from unsloth_jax.optim import Schedule
from workflows import batching, foreign_keywords, objective, plan, report_to, samples
from workflows.keywords import ranged, say, settle, typed, written

CONFIG_IGNORED = foreign_keywords.IGNORED | {
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
    "include_num_input_tokens_seen": "tokens are always counted",
    "average_tokens_across_devices": "the loss is divided by all tokens",
    "eval_accumulation_steps": "an evaluation keeps sums only",
    "prediction_loss_only": "an evaluation keeps sums only",
    "fp16_full_eval": "the model's dtype decides",
    "bf16_full_eval": "the model's dtype decides",
    "gradient_checkpointing_kwargs": "get_peft_model decides",
    "length_column_name": "lengths are counted here",
    "unsloth_num_chunks": "the loss chooses its own chunks",
    "unsloth_logit_chunk_multiplier": "the loss chooses its own chunks",
}
CONFIG_LATER = foreign_keywords.LATER | {
    "push_to_hub": (False, None),
    "activation_offloading": (False, None),
    "auto_find_batch_size": (False, None),
    "dataset_kwargs": (None, {}),
    "model_init_kwargs": (None, {}),
    "q_galore_config": (None,),
    "vllm_sampling_params": (None,),
    "unsloth_grpo_mini_batch": (None,),
}
STRATEGIES = ("no", "steps", "epoch")
MATMULS = (None, "bf16", "fp8_backward")
CHOICES = {
    "save_strategy": STRATEGIES, "eval_strategy": STRATEGIES, "optim": optim.OPTIMIZERS,
    "matmul_dtype": MATMULS, "loss_type": tuple(objective.LOSSES),
    "train_sampling_strategy": batching.SAMPLING, "packing_strategy": batching.PACKING,
}  # fmt: skip
RANGES = {
    "per_device_train_batch_size": (1, None), "gradient_accumulation_steps": (1, None),
    "logging_steps": (1, None), "save_steps": (1, None), "save_total_limit": (1, None),
    "max_seq_length": (1, None), "max_length": (1, None), "learning_rate": (0, None),
    "per_device_eval_batch_size": (1, None), "eval_steps": (1e-9, None),
    "warmup_steps": (0, None), "warmup_ratio": (0, 1), "weight_decay": (0, None),
    "max_grad_norm": (0, None), "adam_beta1": (0, 1, "below"), "adam_beta2": (0, 1, "below"),
    "neftune_noise_alpha": (0, None), "label_smoothing_factor": (0, 1, "below"),
    "router_aux_loss_coef": (0, None),
    "embedding_learning_rate": (0, None), "loraplus_lr_ratio": (1e-9, None),
    "sample_steps": (1e-9, None), "sample_max_new_tokens": (1, None),
    "adam_epsilon": (1e-30, None), "seed": (0, None), "max_steps": (None, 2**31 - 1),
}  # fmt: skip


NAMES = (
    "output_dir", "dataset_text_field", "metric_for_best_model", "eos_token", "pad_token",
    "chat_template_path", "run_name", "project", "logging_dir",
)  # fmt: skip


@dataclass(init=False)
class SFTConfig:
    """How to train; defaults are Unsloth's. Unknown names raise TypeError with the nearest.

    Args:
        max_steps: optimizer steps; at 0 or less, `num_train_epochs` decides.
        max_seq_length, max_length: tokens a row may have; None takes the model's.
        lr_scheduler_type, lr_scheduler_kwargs: a schedule of transformers and its settings. That
            of "reduce_lr_on_plateau" and "greedy" follows metric_for_best_model, without warm-up.
        warmup_steps, warmup_ratio: steps, or the share of all steps, of linear warm-up.
        embedding_learning_rate: of embed_tokens and lm_head where they are trained whole.
        loraplus_lr_ratio: the rate of adapters' b over that of a (LoRA+).
        optim_args: more of an optimizer's settings: "momentum=0.9,nesterov=True", or a mapping.
        loss_type: "nll", or "dft", which weighs each token by its probability.
        label_smoothing_factor: share of the mean over the vocabulary in each token's loss.
        neftune_noise_alpha: size of the noise on embeddings (NEFTune), in training only.
        router_aux_loss_coef: weight of the loss of unevenly used experts; None or 0 leaves it out.
        eos_token, pad_token: tokens of the tokenizer that take these parts in its copy.
        chat_template_path: a Jinja file with the chat template.
        packing: several examples share a row, each in a segment of its own.
        packing_strategy: "bfd" (best fit decreasing); "bfd_split" also cuts rows that are too long
            into several instead of raising. Streamed rows are packed by first fit, as they come.
        train_sampling_strategy: "random", "sequential", or "group_by_length": rows of like length
            share a step, so that little is padding; also group_by_length=True.
        pad_to_multiple_of: the width of batches; None and "auto" take 64, at most max_length.
        completion_only_loss, assistant_only_loss: which tokens count, as in TRL.
        truncation: cut rows that are too long instead of raising.
        memory_budget: see get_peft_model, whose value it replaces.
        matmul_dtype: of products with 4-bit weights: "bf16" (also None); "fp8_backward" finds
            inputs' gradients in e4m3 (Ada, Hopper), forward stays as it is.
        eval_strategy, eval_steps, eval_on_start: when the trainer's eval_dataset is evaluated; with
            "no" every tenth of the run, as in Unsloth. Under 1 a share of all steps.
        per_device_eval_batch_size: at most the training batch, so that evaluation needs no more.
        eval_packing: None packs where `packing` does.
        load_best_model_at_end: the model gets the adapters of the best evaluation, by
            metric_for_best_model ("loss", or the name of another metric) and greater_is_better.
        save_strategy, save_steps, save_total_limit: when checkpoints are written to output_dir.
        output_dir: also gets metrics.jsonl, a line a logged step. A resumed run goes on with that
            file; a new one moves it aside to metrics.1.jsonl, metrics.2.jsonl and so on, and
            refuses a folder that holds checkpoints. Without output_dir there is no such file.
        report_to: "tensorboard", "wandb", "trackio", "mlflow", several, "all" installed ones; None
            is "none". Metrics have transformers' names, such as train/loss and eval/loss.
        run_name, project, logging_dir: how the run is named there; where tensorboard's files go.
        sample_prompts: texts or lists of messages that are answered greedily during the run, into
            the log's rows ("samples": prompt and completion).
        sample_steps, sample_max_new_tokens: how often (under 1 a share of all steps; by default
            with the evaluations, else each tenth) and at the end; tokens of an answer.
    """

    output_dir: str | None = None
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    num_train_epochs: float | None = 3
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping | None = None
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
    eval_strategy: str = "no"
    eval_steps: int | float | None = None
    eval_on_start: bool = False
    per_device_eval_batch_size: int = 4
    eval_packing: bool | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    memory_budget: int | float | str | None = None
    matmul_dtype: str | None = None
    embedding_learning_rate: float | None = None
    loraplus_lr_ratio: float | None = None
    optim_args: str | Mapping | None = None
    loss_type: str = "nll"
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    router_aux_loss_coef: float | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template_path: str | None = None
    packing_strategy: str = "bfd"
    train_sampling_strategy: str = "random"
    group_by_length: bool = False
    pad_to_multiple_of: int | str | None = None
    report_to: str | list | tuple | None = "none"
    run_name: str | None = None
    project: str | None = None
    logging_dir: str | None = None
    sample_prompts: list | tuple | None = None
    sample_steps: int | float | None = None
    sample_max_new_tokens: int = 64

    # What a config of another trainer changes: names it has not, names without effect, values.
    absent: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[Mapping[str, str]] = CONFIG_IGNORED
    later: ClassVar[Mapping[str, tuple]] = CONFIG_LATER
    choices: ClassVar[Mapping[str, Iterable]] = CHOICES
    ranges: ClassVar[Mapping[str, tuple]] = RANGES
    judged_by: ClassVar[str] = "loss"  # what the best evaluation is, where nothing says

    def __init__(self, **given: Any):
        every = {f.name: f.default for f in fields(type(self))}
        known = {name: default for name, default in every.items() if name not in self.absent}
        other = {k: v for k, v in given.items() if k not in known}
        settle(type(self).__name__, other, known, self.ignored, self.later)
        for name, default in every.items():
            setattr(self, name, given.get(name, default) if name in known else default)
        if "warmup_steps" in given and "warmup_ratio" not in given:
            self.warmup_ratio = 0.0
        if self.loss_type == "chunked_nll":  # TRL's older name
            self.loss_type = "nll"
        self._check()
        judged = self.load_best_model_at_end or self.follows
        if judged and self.metric_for_best_model is None:
            self.metric_for_best_model = self.judged_by
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    def _check(self) -> None:
        where = type(self).__name__
        kinds = get_type_hints(type(self))
        typed(where, vars(self), {name: kinds[name] for name in vars(self)})
        written(where, vars(self), NAMES)
        ranged(where, vars(self), self.ranges)
        if None not in (both := {self.max_seq_length, self.max_length}) and len(both) > 1:
            raise ValueError(
                f"{where}: max_seq_length={self.max_seq_length} and max_length="
                f"{self.max_length} name the same limit; expected one of them"
            )
        plan.check_budget(self.memory_budget)
        batching.check(self)
        report_to.names(self.report_to)
        samples.checked(self.sample_prompts)
        if self.max_steps <= 0 and not (self.num_train_epochs or 0) > 0:
            raise ValueError(
                f"{where}: give max_steps or num_train_epochs over 0, got "
                f"{self.max_steps}, {self.num_train_epochs}"
            )
        for name, values in self.choices.items():
            if (got := getattr(self, name)) not in values:
                raise ValueError(f"{where}: {name} {got!r} is not supported; {list(values)} are")
        self.schedule(0, 1)
        if self.embedding_learning_rate is not None and not self.learning_rate:
            raise ValueError(
                f"{where}: embedding_learning_rate follows the schedule of learning_rate, which "
                "is 0"
            )
        self._check_loss()
        if not 1e-7 <= self.learning_rate <= 1:
            say(f"learning_rate={self.learning_rate} is unusual; LoRA learns between 1e-5 and 1e-2")

    def _check_loss(self) -> None:
        objective.sft(self.losses(), self.seed)

    def losses(self, dropout: float | int = 0.0) -> objective.Options:
        """What the loss of a run is, with adapters of this dropout."""
        shares = self.label_smoothing_factor, self.neftune_noise_alpha or 0, dropout
        shares = *shares, self.router_aux_loss_coef or 0
        return objective.Options(self.loss_type, *map(float, shares))

    def schedule(self, warmup: int, total: int) -> Schedule:
        """The learning rate of each step, as transformers gives it.

        Raises ValueError for a name or a setting that is not known.
        """
        more = dict(self.lr_scheduler_kwargs or {})
        if self.follows:  # transformers takes "min" for any metric
            more = {"mode": "max" if self.greater_is_better else "min"} | more
        return optim.schedule(self.lr_scheduler_type, self.learning_rate, warmup, total, **more)

    @property
    def follows(self) -> bool:
        """Whether the learning rate follows the evaluations' metric."""
        return self.lr_scheduler_type in optim.FOLLOWING

    def warmup(self, total: int) -> int:
        """Warm-up steps of a run of `total`; a `warmup_steps` under 1 is a share."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total * (self.warmup_steps or self.warmup_ratio))


KINDS = get_type_hints(SFTConfig)


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
