"""What the trainers of preferences share: their keywords, rows, batches and checkpoints' facts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from workflows import updates
from workflows.facts import digest
from workflows.keywords import say, settle, typed
from workflows.model import Model
from workflows.pair_batches import PairBatches
from workflows.pairs import Pair, pairs
from workflows.preference_config import PreferenceConfig, own_names, replaced
from workflows.reference import Reference
from workflows.trainer import Trainer, trainable

IGNORED = {"dataset_num_proc": "rows are made in this process"}
LATER = {
    "data_collator": (None,),
    "compute_metrics": (None,),
    "preprocess_logits_for_metrics": (None,),
    "optimizers": (None, (None, None)),
    "quantization_config": (None,),
    "peft_config": (None,),
    "model_init": (None,),
    "optimizer_cls_and_kwargs": (None,),
    "compute_loss_func": (None,),
}
USED = (
    "model", "args", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "callbacks",
)  # fmt: skip
KINDS = {
    "model": Model, "tokenizer": PreTrainedTokenizerBase | None,
    "processing_class": PreTrainedTokenizerBase | None, "train_dataset": Iterable | Path | None,
    "eval_dataset": Iterable | Path | None,
}  # fmt: skip


class PreferenceTrainer(Trainer):
    """Trains a model's adapters on answers that are preferred to others.

    A trainer says which config it takes and what is lowered (`_objective`).
    """

    config: type[PreferenceConfig] = PreferenceConfig
    reference: Reference | None = None

    def __init__(
        self,
        model: Model,
        args: PreferenceConfig | None = None,
        train_dataset: Iterable | str | Path | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
        **other: Any,
    ):
        where, config = type(self).__name__, self.config
        given = dict(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        given |= dict(processing_class=processing_class, tokenizer=tokenizer, callbacks=callbacks)
        names = own_names(config)
        old = {name: value for name, value in other.items() if name in names}
        rest = {name: value for name, value in other.items() if name not in names}
        settle(where, rest, (*USED, "ref_model", *names), IGNORED, LATER)
        typed(where, {"model": model, **given}, KINDS | {"args": config | None})
        tokenizers = [x for x in (processing_class, tokenizer) if x is not None]
        if len(tokenizers) == 2 and tokenizers[0] is not tokenizers[1]:
            raise ValueError(f"{where}: give tokenizer or processing_class, got two that differ")
        args = replaced(where, config() if args is None else args, old)
        tokenizer = (*tokenizers, model.tokenizer)[0]
        super().__init__(model, args, tokenizer, train_dataset, eval_dataset, callbacks)
        self.objective = self._objective()
        self._check_metric(more=True)

    def _trainable(self, model: Model, args: PreferenceConfig) -> None:
        if model.peft and model.peft.dropout:
            say(f"lora_dropout={model.peft.dropout} is not drawn: disable_dropout=True, as in TRL")
        trainable(model)
        updates.rates(args, model.adapters)

    def _objective(self) -> Any:
        raise TypeError(f"{type(self).__name__} does not say what is lowered")

    def _rows(self, dataset: Any) -> list[Pair]:
        how = self.args.cut(self.length), self.model.config.vocab
        return pairs(dataset, self.tokenizer, *how)

    def _made(
        self, rows: Sequence[Any], batch: int, accumulation: int, packing: bool, seed: int | None
    ) -> PairBatches:
        seed = None if self.args.train_sampling_strategy == "sequential" else seed
        return PairBatches(rows, 2 * batch, accumulation, self.length, False, seed)

    @property
    def train_dataset(self) -> list[dict[str, list[int]]]:
        """The rows that are trained on, as token ids by TRL's names."""
        return [shown(row) for row in self.rows]

    def _digest(self, rows: Sequence[Pair]) -> str:
        return digest([row._replace(reference=None) for row in rows])

    def _facts(self, data: dict[str, Any]) -> dict[str, Any]:
        named = None if self.reference is None else self.reference.name
        return super()._facts(data) | {"reference": named}


def shown(pair: Pair) -> dict[str, list[int]]:
    """A pair's ids by TRL's names."""
    at = pair.chosen.mask.index(1)
    other = pair.rejected.mask.index(1)
    return {
        "prompt_ids": pair.chosen.tokens[:at],
        "chosen_ids": pair.chosen.tokens[at:],
        "rejected_ids": pair.rejected.tokens[other:],
    }


def refuse_reference(where: str, ref_model: Any) -> None:
    """Raises ValueError where a reference model is given."""
    if ref_model is not None:
        raise ValueError(
            f"{where}: ref_model={type(ref_model).__name__} is not supported, expected None: the "
            "reference is the base with the adapters as they stand when the trainer is made, which "
            "costs no second model; train the adapters first to start from another policy"
        )


def referred(rows: Sequence[Pair], batches: PairBatches, reference: Reference) -> list[Pair]:
    """The pairs with their reference log-probabilities, found batch by batch."""
    found = []
    for batch in batches.epoch(0):
        sums = np.asarray(reference(batch)).reshape(batches.accumulation, 2, batches.items)
        found += [tuple(map(float, two)) for two in sums.transpose(0, 2, 1).reshape(-1, 2)]
    return [pair._replace(reference=two) for pair, two in zip(rows, found, strict=False)]
