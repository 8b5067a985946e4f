"""SFTTrainer with the names of TRL and Unsloth."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth_jax.data import Row
from workflows import evaluate, objective, rows, streams, updates
from workflows.batching import Batches
from workflows.keywords import say, settle, typed
from workflows.model import Model
from workflows.objective import Objective
from workflows.peft_config import adapt
from workflows.preview import preview
from workflows.sft_config import SFTConfig, settled
from workflows.speaking import speaking
from workflows.trainer import Trainer
from workflows.user_metrics import Measured

TRAINER_IGNORED = {
    "data_collator": "rows are collated here",
    "dataset_num_proc": "rows are made in this process",
}
TRAINER_LATER = {
    "model_init": (None,),
    "compute_loss_func": (None,),
    "optimizer_cls_and_kwargs": (None,),
    "quantization_config": (None,),
}
TRAINER_USED = (
    "model", "tokenizer", "processing_class", "train_dataset", "args", "formatting_func",
    "dataset_text_field", "packing", "max_seq_length", "eval_dataset", "callbacks", "peft_config",
    "compute_metrics", "preprocess_logits_for_metrics", "optimizers",
)  # fmt: skip
TRAINER_KINDS = {
    "model": Model, "args": SFTConfig | None, "tokenizer": PreTrainedTokenizerBase | None,
    "processing_class": PreTrainedTokenizerBase | None, "train_dataset": Iterable | Path | None,
    "formatting_func": Callable | None, "compute_metrics": Callable | None,
    "preprocess_logits_for_metrics": Callable | None, "eval_dataset": Iterable | Path | None,
}  # fmt: skip
Masking = Callable[[list[Row]], list[Row]]
OLD_STYLE = ("dataset_text_field", "packing", "max_seq_length")


class SFTTrainer(Trainer):
    """Trains a model's adapters on a data set; `train` changes `model.adapters`.

    Args:
        model: a model with adapters.
        tokenizer, processing_class: by default the model's own.
        train_dataset: rows with text, messages, prompt and completion, or input_ids; a list, a
            data set of `datasets`, a file (.jsonl, .json, .csv, .parquet), a folder or a hub name.
            A streaming data set, or any other iterable that has no length, is read as it is
            needed, in its order, if max_steps is given.
        args: an SFTConfig.
        formatting_func: makes text of examples, as in Unsloth's notebooks.
        eval_dataset: rows of the same kinds, or several such data sets by name.
        callbacks: objects with methods named as transformers' TrainerCallback has them.
        peft_config: PEFT's LoraConfig or a dictionary of its fields, for a model without adapters.
        compute_metrics, preprocess_logits_for_metrics: see workflows.user_metrics.
        optimizers: (an optax transformation, a function of the step that gives the rate to log);
            None in a place leaves what the config says.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: Any = None,
        train_dataset: Iterable | str | Path | None = None,
        args: SFTConfig | None = None,
        processing_class: Any = None,
        formatting_func: Callable | None = None,
        eval_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **other: Any,
    ):
        old = {k: other.pop(k) for k in OLD_STYLE if k in other}
        settle("SFTTrainer", other, TRAINER_USED, TRAINER_IGNORED, TRAINER_LATER)
        given = dict(model=model, args=args, formatting_func=formatting_func)
        given |= dict(tokenizer=tokenizer, processing_class=processing_class)
        given |= dict(train_dataset=train_dataset, eval_dataset=eval_dataset)
        given |= dict(compute_metrics=compute_metrics)
        given |= dict(preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        typed("SFTTrainer", given, TRAINER_KINDS)
        if None not in (tokenizer, processing_class) and tokenizer is not processing_class:
            raise ValueError("SFTTrainer: give tokenizer or processing_class, got two that differ")
        args = settled(SFTConfig() if args is None else args, old)
        self._how = reading(args, formatting_func) | {"vocab": model.config.vocab}
        tokenizer = next(x for x in (processing_class, tokenizer, model.tokenizer) if x is not None)
        tokenizer = speaking(tokenizer, args)
        self.optimizers = updates.handed(optimizers)
        self.user = Measured(compute_metrics, preprocess_logits_for_metrics)
        if peft_config is not None:
            adapt(model, peft_config, args.seed)
        if args.router_aux_loss_coef and not hasattr(model.family, "routed"):
            raise ValueError(
                f"router_aux_loss_coef={args.router_aux_loss_coef} balances experts, but a "
                f"{model.source.config.get('model_type')!r} model has no such loss in transformers"
            )
        self.model, self.args = model, args
        self._datasets, self._masks = (train_dataset, eval_dataset), []
        super().__init__(model, args, tokenizer, train_dataset, eval_dataset, callbacks)
        self._check_metric(more=compute_metrics is not None)

    @property
    def objective(self) -> Objective:
        """The loss that the config and the adapters ask for."""
        dropout = self.model.peft.dropout if self.model.peft else 0.0
        return objective.sft(self.args.losses(dropout), self.args.seed)

    def _rows(self, dataset: Any) -> list[Row]:
        if isinstance(dataset, Iterator):
            raise ValueError(
                f"a {type(dataset).__name__} can be read only once: give a list of its rows, or an "
                "object that begins anew each time, as one of a class with __iter__ does or "
                "datasets.IterableDataset.from_generator(function)"
            )
        made = rows.rows(dataset, self.tokenizer, max_length=self.length, **self._how)
        for mask in self._masks:
            made = mask(made)
        return made

    def mask(self, mask: Masking) -> None:
        """Masks the rows that are there, and all that are read from now on.

        Raises ValueError where rows are streamed.
        """
        if callable(self.rows):
            raise ValueError(
                "markers need rows that are there; a streamed data set is masked without them: "
                "train_on_responses_only(trainer)"
            )
        self.rows, self.eval_rows = mask(self.rows), evaluate.of_each(self.eval_rows, mask)
        self._masks.append(mask)

    def read_again(self, **how: Any) -> None:
        """Makes the rows anew of the data sets given, with other settings of `rows.streamed`."""
        train, held_out = self._datasets
        with ExitStack() as unless_done:
            unless_done.callback(setattr, self, "_how", self._how)
            self._how = self._how | how
            made = self.rows if callable(self.rows) else self._rows(train)
            self.rows, self.eval_rows = made, self._held_out(held_out)
            unless_done.pop_all()

    def _stream(self, dataset: Any) -> streams.Rows | None:
        """How each pass over a streaming data set makes rows; None where all are made at once."""
        known = isinstance(dataset, str | Path | Iterator) or hasattr(dataset, "__len__")
        if known or self.args.max_steps <= 0:
            return None
        say("train_dataset is streamed: its rows come in their order (see dataset.shuffle)")

        def passed(number: int) -> Iterator[Row]:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(number)
            return rows.streamed(dataset, self.tokenizer, max_length=self.length, **self._how)

        return passed

    def preview(self, row: int | Row | Sequence[Row] = 0) -> None:
        """Prints a row of the first epoch by its number, packed if rows are, or the row given.

        Raises IndexError for a number that no row has, ValueError where rows are streamed.
        """
        preview(self._line(row) if isinstance(row, int) else row, self.tokenizer)

    def _line(self, number: int) -> list[Row]:
        batches = self._batches()
        if not isinstance(batches, Batches):
            raise ValueError("rows are streamed and not known before they come; give preview a Row")
        lines = batches.bins(0)
        if not 0 <= number < len(lines):
            raise IndexError(f"row {number}: there are {len(lines)}, numbered from 0")
        return lines[number]


def reading(a: SFTConfig, formatting_func: Callable | None) -> dict[str, Any]:
    """How rows are made of examples."""
    return {
        "dataset_text_field": a.dataset_text_field,
        "formatting_func": formatting_func,
        "completion_only_loss": a.completion_only_loss,
        "assistant_only_loss": a.assistant_only_loss,
        "truncate": a.truncation,
        "split": a.packing and a.packing_strategy == "bfd_split",
    }
